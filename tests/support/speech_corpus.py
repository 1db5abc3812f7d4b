"""Write small corpora of shaped noise and a tiny Whisper, for tests that need rows rather than speech."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from graft.audio.clip import SAMPLE_RATE
from graft.data.dataset import write_corpus
from tests.support import tiny_models
from tests.support.built_once import built_once

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def flac(seconds: float, seed: int = 0) -> bytes:
    """Encode bursts of noise of changing loudness."""
    generator = np.random.default_rng(seed)
    count = int(seconds * SAMPLE_RATE)
    loudness = np.repeat(generator.uniform(0.01, 0.3, count // 800 + 1), 800)[:count]
    file = io.BytesIO()
    soundfile.write(file, (generator.standard_normal(count) * loudness).astype(np.float32), SAMPLE_RATE, format="flac")
    return file.getvalue()


def row(name: str, seed: int, **changed: Any) -> dict[str, Any]:
    """Make a labelled clip of about a second with two to four words; `changed` replaces any of its values."""
    generator = np.random.default_rng(seed)
    seconds = round(float(generator.uniform(0.6, 1.4)), 2)
    text = " ".join(generator.choice(WORDS, size=int(generator.integers(2, 5))))
    wav = {"bytes": flac(seconds, seed), "path": f"{name}.flac"}
    return {"ID": name, "duration": seconds, "wav": wav, "spk_id": "s", "sex": "male", "text": text, **changed}


def corpus(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as a parquet file; returns its path."""
    write_corpus(rows, path, rows_per_group=8)
    return str(path)


BROKEN = {"wav": {"bytes": b"no audio at all", "path": "broken.flac"}}


@built_once
def save_tiny_whisper(folder: Path, *, varied: bool = False, languages: Sequence[str] = ()) -> str:
    """Write a whole tiny Whisper, which answers with random bytes; with `varied`, short answers have no loops.

    One that knows `languages` has tokens of these, from 40 on.
    """
    words = tiny_models.tokenizer()
    config = tiny_models.whisper_config()
    config.vocab_size = len(words)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = [words.pad_token_id] * 3
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    if varied:
        model.model.decoder.embed_positions.weight.data *= 10
    if languages:  # which change what is written, and are not written themselves
        places = range(40, 40 + len(languages))
        model.model.decoder.embed_tokens.weight.data[places] *= 50
        for layer in model.model.decoder.layers:
            for projection in (layer.self_attn.v_proj, layer.self_attn.out_proj):
                projection.weight.data *= 4
        model.generation_config = GenerationConfig(
            decoder_start_token_id=3,
            no_timestamps_token_id=5,
            lang_to_id={f"<|{code}|>": place for place, code in zip(places, languages, strict=True)},
            suppress_tokens=list(places),
            task_to_id={"transcribe": 6},
            eos_token_id=config.eos_token_id,
        )
    model.save_pretrained(folder)
    WhisperTokenizer(vocab=words.get_vocab(), merges=[]).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return str(folder)
