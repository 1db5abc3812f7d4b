"""Plain Whisper, as transformers runs it: the baseline that every result is printed beside."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from graft.audio.chunking import windows
from graft.audio.clip import SAMPLE_RATE, AudioClip

MAX_TOKENS = 224
"""Of a 30 s window's answer: half of the decoder's positions, as in OpenAI's own decoding."""


@dataclass(frozen=True)
class WhisperTranscript:
    """What is heard in a clip, and the mean natural log-probability of its tokens, the end of each window's answer among them.

    The probabilities are those that greedy decoding chooses by: suppressed tokens have none, as in OpenAI's own `avg_logprob`.
    """

    text: str
    mean_logprob: float


class WhisperBaseline:
    """A Whisper checkpoint that transcribes English greedily, in windows padded to 30 s, without timestamps or fallbacks."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 8,
    ) -> None:
        self.batch_size = batch_size
        model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto")
        self._model = model.to(device).eval()
        self._model.generation_config.max_length = MAX_TOKENS
        self._extractor = WhisperFeatureExtractor.from_pretrained(folder)
        self._tokenizer = WhisperTokenizer.from_pretrained(folder)

    def transcribe_many(self, clips: Sequence[AudioClip]) -> list[str]:
        """Transcribe clips of any length, `batch_size` windows at a time; the texts are stripped."""
        return [hearing.text for hearing in self.hear_many(clips)]

    def hear_many(self, clips: Sequence[AudioClip]) -> list[WhisperTranscript]:
        """Transcribe clips as `transcribe_many` does, and say how sure of each; every token of a long clip's windows counts the same."""
        chunks = [(place, chunk.clip) for place, clip in enumerate(clips) for chunk in windows(clip)]
        # Windows of like length end at about the same step.
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index][1].samples))
        answers: dict[int, _Answer] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            answers |= zip(batch, self._decode([chunks[index][1] for index in batch]), strict=True)
        parts: list[list[_Answer]] = [[] for _ in clips]
        for index, (place, _) in enumerate(chunks):
            parts[place].append(answers[index])
        return [_joined(part) for part in parts]

    @torch.inference_mode()
    def _decode(self, clips: Sequence[AudioClip]) -> list["_Answer"]:
        inputs = self._extractor(
            [clip.samples for clip in clips], sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt"
        )
        # English-only checkpoints refuse to be told the language.
        languages = (
            {"language": "en", "task": "transcribe"}
            if getattr(self._model.generation_config, "lang_to_id", None)
            else {}
        )
        choices = _Choices()
        ids = self._model.generate(
            inputs["input_features"].to(self._model.device, self._model.dtype),
            attention_mask=inputs["attention_mask"].to(self._model.device),
            do_sample=False,
            num_beams=1,
            return_timestamps=False,
            logits_processor=LogitsProcessorList([choices]),
            **languages,
        )
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        sums, counts = choices.until(self._model.generation_config.eos_token_id)
        return [_Answer(text.strip(), total, count) for text, total, count in zip(texts, sums, counts, strict=True)]


@dataclass(frozen=True)
class _Answer:
    """To one window: its text, the sum of its tokens' log-probabilities, and how many they are."""

    text: str
    logprob_sum: float
    token_count: int


def _joined(answers: Sequence[_Answer]) -> WhisperTranscript:
    count = sum(answer.token_count for answer in answers)
    total = sum(answer.logprob_sum for answer in answers)
    return WhisperTranscript(
        " ".join(answer.text for answer in answers if answer.text), total / count if count else float("-inf")
    )


class _Choices(LogitsProcessor):
    """Notes each greedy choice and its log-probability from generate's scores, the last to see them; to keep those takes 46 MB a window."""

    def __init__(self) -> None:
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # log-probabilities and tokens, (B,) each

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = scores.log_softmax(-1).max(-1)
        self._steps.append((chosen.values, chosen.indices))
        return scores

    def until(self, end: int | Sequence[int]) -> tuple[list[float], list[int]]:
        """Sum the log-probabilities of each row's tokens up to its first `end`, that one included; and count the tokens."""
        logprobs, tokens = (torch.stack(part, dim=1) for part in zip(*self._steps, strict=True))  # (B, T)
        ends = torch.isin(tokens, torch.as_tensor(end, device=tokens.device))
        counted = ends.cumsum(1) - ends.long() == 0
        return (logprobs * counted).sum(1).tolist(), counted.sum(1).tolist()
