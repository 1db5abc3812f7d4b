"""Plain Whisper, as transformers runs it: the baseline that every result is printed beside."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from graft.audio import SAMPLE_RATE, AudioClip
from graft.chunking import windows

MAX_TOKENS = 224
"""Of a 30 s window's answer: half of the decoder's positions, as in OpenAI's own decoding."""


class WhisperBaseline:
    """A Whisper checkpoint that transcribes English greedily, in windows padded to 30 s, without timestamps or fallbacks."""

    def __init__(
        self, folder: str | os.PathLike[str], *, device: str = "cpu", dtype: torch.dtype | None = None, batch_size: int = 8
    ) -> None:
        self.batch_size = batch_size
        model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto")
        self._model = model.to(device).eval()
        self._model.generation_config.max_length = MAX_TOKENS
        self._extractor = WhisperFeatureExtractor.from_pretrained(folder)
        self._tokenizer = WhisperTokenizer.from_pretrained(folder)

    def transcribe_many(self, clips: Sequence[AudioClip]) -> list[str]:
        """Transcribe clips of any length, `batch_size` windows at a time; the texts are stripped."""
        chunks = [(place, chunk.clip) for place, clip in enumerate(clips) for chunk in windows(clip)]
        # Windows of like length end at about the same step.
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index][1].samples))
        texts = [""] * len(chunks)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, text in zip(batch, self._decode([chunks[index][1] for index in batch]), strict=True):
                texts[index] = text
        parts: list[list[str]] = [[] for _ in clips]
        for (place, _), text in zip(chunks, texts, strict=True):
            parts[place].append(text)
        return [" ".join(filter(None, part)) for part in parts]

    @torch.inference_mode()
    def _decode(self, clips: Sequence[AudioClip]) -> list[str]:
        inputs = self._extractor(
            [clip.samples for clip in clips], sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt"
        )
        # English-only checkpoints refuse to be told the language.
        languages = {"language": "en", "task": "transcribe"} if getattr(self._model.generation_config, "lang_to_id", None) else {}
        ids = self._model.generate(
            inputs["input_features"].to(self._model.device, self._model.dtype),
            attention_mask=inputs["attention_mask"].to(self._model.device),
            do_sample=False,
            num_beams=1,
            return_timestamps=False,
            **languages,
        )
        return [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]
