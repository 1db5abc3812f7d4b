"""Open a plain Whisper checkpoint for transcription: the model, and what makes its prompts."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, WhisperForConditionalGeneration, WhisperTokenizer

from graft.checkpoints.build import load_whole, reading
from graft.processor import WhisperPrompter


def open_whisper(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[WhisperForConditionalGeneration, WhisperPrompter]:
    """Load a Whisper's folder or hub id with its prompter.

    `dtype` is of the weights, by default the checkpoint's own; on a CPU, which multiplies float16 slowly, float32 takes
    the place of it. Raises ModelError where files are missing or broken.
    """
    model = load_whole(WhisperForConditionalGeneration, str(path), dtype=dtype)
    if model.dtype == torch.float16 and torch.device(device).type == "cpu":
        model = model.float()
    return model.to(device).eval(), open_prompter(path)


def open_prompter(path: str | Path) -> WhisperPrompter:
    """Load the prompter that open_whisper returns, without the model. Raises ModelError as open_whisper does."""
    with reading(str(path)):
        config: Any = AutoConfig.from_pretrained(path)
        tokenizer = WhisperTokenizer.from_pretrained(path)
        try:
            generation_config = GenerationConfig.from_pretrained(path)
        except OSError:  # checkpoints of before 2023 have none
            generation_config = GenerationConfig.from_model_config(config)
    return WhisperPrompter(mel_count=config.num_mel_bins, tokenizer=tokenizer, generation_config=generation_config)
