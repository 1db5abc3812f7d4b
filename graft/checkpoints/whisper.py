"""Open a plain Whisper checkpoint for transcription: the model, and its processor."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, WhisperForConditionalGeneration, WhisperTokenizer

from graft.checkpoints.build import load_whole, reading
from graft.processor import PlainWhisperProcessor


def open_whisper(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[WhisperForConditionalGeneration, PlainWhisperProcessor]:
    """Load a Whisper's folder or hub id with its processor.

    `dtype` is of the weights, by default the checkpoint's own; on a CPU, which multiplies float16 slowly, float32 takes
    the place of it. Raises ModelError where files are missing or broken.
    """
    model = load_whole(WhisperForConditionalGeneration, str(path), dtype=dtype)
    if model.dtype == torch.float16 and torch.device(device).type == "cpu":
        model = model.float()
    return model.to(device).eval(), open_whisper_processor(path)


def open_whisper_processor(path: str | Path) -> PlainWhisperProcessor:
    """Load the processor that open_whisper returns, without the model. Raises ModelError as open_whisper does."""
    with reading(str(path)):
        config: Any = AutoConfig.from_pretrained(path)
        tokenizer = WhisperTokenizer.from_pretrained(path)
        try:
            generation_config = GenerationConfig.from_pretrained(path)
        except OSError:  # checkpoints of before 2023 have none
            generation_config = GenerationConfig.from_model_config(config)
    return PlainWhisperProcessor(
        mel_count=config.num_mel_bins,
        tokenizer=tokenizer,
        generation_config=generation_config,
        max_length=config.max_target_positions,
    )
