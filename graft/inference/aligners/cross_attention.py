"""Word times from Whisper's cross-attention: a Whisper reads the text that is known already, and its decoder shows where it listens.

    clip, text -> encoder, decoder -> attention of each head to each word -> the two heads that listen best -> words and pauses, by frames

Teacher forcing, its prefix and attention over the clip's own frames alone are those of OpenAI's `whisper.timing.find_alignment`. There
heads come from a list for each checkpoint, are read a token early, and a word lasts until the next begins, through any pause. Here the text
is spelled, letter by letter, and the heads are chosen for each clip, of any checkpoint, as in Yeh et al., Whisper Has an Internal Word
Aligner, 2025; and pauses, in which nobody speaks, belong to no word. Where words are joined without a pause, Whisper base finds half of
the borders to 30 ms so, and to 250 ms by the listed heads.
"""

import os
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperTokenizer

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.features import Featurizer
from graft.audio.vad import FRAME as SCORE_FRAME
from graft.audio.vad import Speech, SpeechDetector
from graft.errors import ModelError
from graft.inference.aligners.protocol import spread, timed
from graft.inference.aligners.viterbi import best_paths, word_spans
from graft.inference.transcript import Word
from graft.model.configuration import WINDOW_FRAMES
from graft.model.encoder import pad_with_silence

FRAME = 320
"""Samples of an encoder frame: 20 ms."""
CANDIDATES = 8
"""Heads of the largest norms, of which those that listen best are chosen."""
HEADS = 2
"""The most that are chosen: others listen to what is said later, or earlier."""
NEARLY = 0.9
"""Part of the best head's attention to its own words that another must have."""
COARSE = 3
"""Frames that are one while heads are chosen; a word has one at least."""
LEAST_SHARE = 0.01
"""What a word has of a frame in which nothing attends to it, so that no frame alone decides."""

MOST_EVIDENCE = 3.0
"""Nats a frame that loudness and a detector can say for speech or for a pause."""
LOUDNESS_WINDOW = 400
"""Samples."""
LOUDER_DB = 6.0
"""Than the clip's quiet frames: as likely speech as not."""
LOUDEST_RANGE_DB = 35.0
"""Quieter than the clip's loud frames by more is no speech, however quiet the quiet ones are."""
SLOPE_DB = 2.0


class WhisperAligner:
    """Aligns with any Whisper checkpoint, which takes the text for English.

    Spread are texts of more tokens than its decoder takes (444 of most Whispers') and of more than 16 words a second. Raises MissingExtra
    without the package silero-vad, ModelError for a checkpoint that doesn't say how its texts begin.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name or f"{Path(folder).name}, cross-attention"
        model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto")
        self._model = model.to(device).eval()
        self._prefix = _prefix(model.generation_config, os.fspath(folder))
        self._tokenizer = WhisperTokenizer.from_pretrained(folder)
        self._featurizer = Featurizer(model.config.num_mel_bins)
        self._detector = SpeechDetector()
        self._busy = threading.Lock()

    def align(self, clip: AudioClip, text: str) -> tuple[Word, ...]:
        """Time the words of a text; see Aligner."""
        words = text.split()
        frame_count = -(-len(clip.samples) // FRAME)
        with self._busy:
            tokens = self._tokens(words)
            if tokens is None or not words or len(words) > -(-frame_count // COARSE):
                return spread(words, clip.duration_s)
            attention = self._attention(clip, tokens, frame_count)
            speech = self._detector.find(clip)
        spans = _word_frames(attention, _evidence(clip, speech, frame_count))
        frame_s = FRAME / SAMPLE_RATE
        return timed(words, [(first * frame_s, end * frame_s) for first, end in spans], clip.duration_s)

    def _tokens(self, words: Sequence[str]) -> list[list[int]] | None:
        """The tokens of each word: letter by letter, or whole where those are too many, None where whole words are too."""
        most = self._model.config.max_target_positions - len(self._prefix)
        spelled, whole = ([[f" {word[0]}", *word[1:]] for word in words], [[f" {word}"] for word in words])
        for parts in (spelled, whole):
            ids = iter(
                self._tokenizer([part for word in parts for part in word] or [""], add_special_tokens=False)[
                    "input_ids"
                ]
            )
            tokens = [[token for part in islice(ids, len(word)) for token in part] for word in parts]
            if sum(map(len, tokens)) <= most:
                return tokens
        return None

    @torch.inference_mode()
    def _attention(self, clip: AudioClip, tokens: Sequence[Sequence[int]], frame_count: int) -> np.ndarray:
        """How much heads attend to the clip's frames for each word: (CANDIDATES, words, frames); each token's attention sums to 1."""
        features = self._featurizer(clip)
        mel = pad_with_silence(
            torch.from_numpy(features.mel[None]), torch.tensor([features.frame_count]), WINDOW_FRAMES
        )
        device = self._model.device
        self._model.set_attn_implementation("sdpa")
        states = self._model.get_encoder()(mel.to(device, self._model.dtype)).last_hidden_state
        self._model.set_attn_implementation("eager")  # which takes twice the time, but tells its weights
        ids = torch.tensor([[*self._prefix, *(token for word in tokens for token in word)]], device=device)
        decoded = self._model.get_decoder()(ids, encoder_hidden_states=states, output_attentions=True, use_cache=False)
        owners = torch.repeat_interleave(torch.tensor([len(word) for word in tokens])).to(device)
        rows = [layer[0, :, len(self._prefix) :, :frame_count].float() for layer in decoded.cross_attentions]
        words = torch.cat([_by_words(layer, owners, len(tokens)) for layer in rows])
        norms = words.square().sum(dim=1).sqrt().sum(dim=-1)
        return words[norms.topk(min(CANDIDATES, len(norms))).indices].cpu().numpy()


def _prefix(generation: Any, folder: str) -> list[int]:
    """What precedes the text: English-only checkpoints are told neither language nor task."""
    if getattr(generation, "no_timestamps_token_id", None) is None:
        raise ModelError(
            f"{folder}: generation_config.json names no no_timestamps_token_id: take that of the Whisper it was made from"
        )
    told = (
        [generation.lang_to_id["<|en|>"], generation.task_to_id["transcribe"]]
        if getattr(generation, "lang_to_id", None)
        else []
    )
    return [generation.decoder_start_token_id, *told, generation.no_timestamps_token_id]


def _by_words(attention: torch.Tensor, owners: torch.Tensor, word_count: int) -> torch.Tensor:
    """Attention while tokens are read (heads, tokens, frames) -> for the words that own them (heads, words, frames)."""
    heads, _, frames = attention.shape
    attention = attention / (attention.sum(dim=-1, keepdim=True) + 1e-9)
    return attention.new_zeros(heads, word_count, frames).index_add_(1, owners, attention)


def _word_frames(attention: np.ndarray, evidence: np.ndarray) -> list[tuple[int, int]]:
    """Find each word's first frame and the one after its last.

    attention (heads, words, frames); evidence (frames,) in nats, over 0 for speech and under it for a pause.
    """
    heads = _best_heads(attention, evidence)
    return word_spans(
        _aligned(np.log(_shares(attention[heads]).mean(axis=0) + LEAST_SHARE), evidence), attention.shape[1]
    )


def _best_heads(attention: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """The heads that attend most to where they find the words themselves, a word being worth as much as another."""
    thirds = np.arange(0, attention.shape[-1], COARSE)
    attention, evidence = (np.add.reduceat(part, thirds, axis=-1) for part in (attention, evidence))
    paths = _aligned(COARSE * np.log(_shares(attention) + LEAST_SHARE), evidence)
    own = paths[:, None, :] == np.arange(attention.shape[1])[:, None]
    faith = ((attention * own).sum(axis=-1) / (attention.sum(axis=-1) + 1e-9)).mean(axis=-1)
    best = np.argsort(-faith)[:HEADS]
    return best[faith[best] >= NEARLY * faith[best[0]]]


def _shares(attention: np.ndarray) -> np.ndarray:
    """Each word's share of the attention to a frame: (..., words, frames)."""
    return attention / (attention.sum(axis=-2, keepdims=True) + 1e-9)


def _aligned(scores: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Align words, and pauses where there are any, with frames.

    scores (..., words, frames), evidence (frames,) -> the word of each frame (..., frames), -1 for a pause.
    """
    *heads, words, frames = scores.shape
    states = np.empty((*heads, frames, 2 * words + 1), np.float32)
    states[..., ::2] = -np.maximum(evidence, 0)[:, None]
    states[..., 1::2] = np.moveaxis(scores, -1, -2) + np.minimum(evidence, 0)[:, None]
    is_word = np.arange(2 * words + 1) % 2 == 1
    paths, _ = best_paths(states, may_skip=is_word)
    return np.where(is_word[paths], paths // 2, -1)


def _evidence(clip: AudioClip, speech: Speech, frame_count: int) -> np.ndarray:
    """What loudness and the detector say for speech in each frame, in nats.

    Loudness tells a word's borders best, a detector holds out in noise.
    """
    middles = np.arange(frame_count) * FRAME + FRAME // 2
    energy = np.cumsum(np.pad(np.square(clip.samples, dtype=np.float64), LOUDNESS_WINDOW))
    first = middles + LOUDNESS_WINDOW // 2
    level = 10 * np.log10((energy[first + LOUDNESS_WINDOW] - energy[first]) / LOUDNESS_WINDOW + 1e-10)
    quiet, loud = np.percentile(level, (5, 95))
    threshold = max(min(quiet + LOUDER_DB, (quiet + loud) / 2), loud - LOUDEST_RANGE_DB)
    scores = np.clip(speech.scores[middles.clip(max=len(clip.samples) - 1) // SCORE_FRAME], 1e-3, 1 - 1e-3)
    detected = np.clip(np.log(scores / (1 - scores)), -MOST_EVIDENCE, MOST_EVIDENCE)
    return np.clip((level - threshold) / SLOPE_DB + detected, -MOST_EVIDENCE, MOST_EVIDENCE)
