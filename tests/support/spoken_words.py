"""Make speech whose words have known times, check the promise of every aligner, and save a tiny CTC model."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio
from graft.inference.segments import Word
from graft.text.characters import split_words
from tests.support.paths import ROOT

SPOKEN = ROOT / "tests" / "data" / "words"
PROMPTS = ROOT / "jobs" / "data" / "prompts"

Piece = tuple[np.ndarray, list[str]]
"""Speech without silence around it, and its words."""
Span = tuple[float, float]
"""Start and end in seconds."""


def in_order(words: Sequence[Word], text: str, start_s: float, end_s: float) -> bool:
    """Return whether words are those of the text, in order and without overlap, between two times."""
    times = [start_s, *(time for word in words for time in (word.start_s, word.end_s)), end_s]
    return [word.text for word in words] == [word for _, word in split_words(text)] and times == sorted(times)


def spoken(*words: str) -> list[Piece]:
    """Return recordings of single words, all of one voice."""
    return [(trim(read_audio(SPOKEN / f"{word}.flac").samples), [word]) for word in words]


def prompts(count: int) -> list[Piece]:
    """Return recordings of sentences, of the same voice."""
    rows = [json.loads(line) for line in (PROMPTS / "train.jsonl").read_text().splitlines()[:: 60 // count][:count]]
    return [(trim(read_audio(PROMPTS / row["audio"]).samples), row["text"].split()) for row in rows]


def trim(samples: np.ndarray) -> np.ndarray:
    """Cut samples to the stretch from the first to the last 10 ms that are within 35 dB of the loudest."""
    energy = np.convolve(np.square(samples, dtype=np.float64), np.full(160, 1 / 160), "same")
    loud = np.flatnonzero(energy > energy.max() / 10**3.5)
    return samples[loud[0] : loud[-1] + 1]


def concatenate(
    pieces: Sequence[Piece], pauses_s: Sequence[float], *, noise: float = 0.0
) -> tuple[AudioClip, str, list[Span]]:
    """Join pieces with a pause before each and one at the end; returns the clip, its text and each piece's span."""
    silences = [np.zeros(round(pause_s * SAMPLE_RATE), np.float32) for pause_s in pauses_s]
    samples, spans = silences[0], []
    for (speech, _), silence in zip(pieces, silences[1:], strict=True):
        spans.append((len(samples) / SAMPLE_RATE, (len(samples) + len(speech)) / SAMPLE_RATE))
        samples = np.concatenate([samples, speech, silence])
    hiss = np.random.default_rng(1).normal(0, noise, len(samples))
    return (
        AudioClip((samples + hiss).astype(np.float32)),
        " ".join(word for _, words in pieces for word in words),
        spans,
    )


def border_errors(words: Sequence[Word], pieces: Sequence[Piece], spans: Sequence[Span]) -> np.ndarray:
    """Return how far the first and last word of each piece are from its start and end, in seconds: (pieces, 2)."""
    ends = np.cumsum([len(said) for _, said in pieces])
    firsts = ends - [len(said) for _, said in pieces]
    return np.abs(
        [[words[first].start_s, words[end - 1].end_s] for first, end in zip(firsts, ends, strict=True)]
        - np.array(spans)
    )


def save_ctc(folder: Path, letters: dict[str, int]) -> Path:
    """Save a tiny wav2vec2 with 20 ms frames and this vocabulary."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(letters))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        pad_token_id=letters["<pad>"],
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32, 32, 32),
        conv_kernel=(40, 8, 4),
        conv_stride=(20, 4, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "C": 7, "D": 8}
