"""Transcribe with plain Whisper, as transformers runs it: the baseline that every result is printed beside."""

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
from graft.checkpoints.quiet import no_loading_bars

# Most tokens of the answer to a 30 s window: half of the decoder's positions, as in OpenAI's own decoding.
MAX_TOKENS = 224

# The text of one window, the sum of its tokens' log-probabilities, and their number.
WindowAnswer = tuple[str, float, int]


@dataclass(frozen=True)
class WhisperTranscript:
    """The text of a clip and the mean natural log-probability of its tokens, the end token of each window included.

    The probabilities are those that greedy decoding chooses by: suppressed tokens have none, as in OpenAI's
    `avg_logprob`.
    """

    text: str
    mean_logprob: float


class WhisperBaseline:
    """Transcribes English greedily with a Whisper checkpoint, in windows of 30 s, without timestamps or fallbacks."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 8,
    ) -> None:
        self.batch_size = batch_size
        with no_loading_bars():
            model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto")
        self._model = model.to(device).eval()
        self._model.generation_config.max_length = MAX_TOKENS
        self._extractor = WhisperFeatureExtractor.from_pretrained(folder)
        self._tokenizer = WhisperTokenizer.from_pretrained(folder)

    def transcribe_many(self, clips: Sequence[AudioClip]) -> list[WhisperTranscript]:
        """Transcribe clips of any length, `batch_size` windows at a time; the texts are stripped.

        Every token of a long clip's windows counts the same in its mean log-probability.
        """
        chunks = [(index, chunk.clip) for index, clip in enumerate(clips) for chunk in windows(clip)]
        # Windows of similar length end at about the same step, so they share batches.
        order = sorted(range(len(chunks)), key=lambda number: len(chunks[number][1].samples))
        answers: dict[int, WindowAnswer] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            answers |= zip(batch, self._decode([chunks[number][1] for number in batch]), strict=True)
        windows_of: list[list[WindowAnswer]] = [[] for _ in clips]
        for number, (index, _) in enumerate(chunks):
            windows_of[index].append(answers[number])
        return [_join_windows(own) for own in windows_of]

    @torch.inference_mode()
    def _decode(self, clips: Sequence[AudioClip]) -> list[WindowAnswer]:
        inputs = self._extractor(
            [clip.samples for clip in clips], sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt"
        )
        # English-only checkpoints refuse a language.
        multilingual = getattr(self._model.generation_config, "lang_to_id", None)
        task = {"language": "en", "task": "transcribe"} if multilingual else {}
        choices = _RecordChoices()
        ids = self._model.generate(
            inputs["input_features"].to(self._model.device, self._model.dtype),
            attention_mask=inputs["attention_mask"].to(self._model.device),
            do_sample=False,
            num_beams=1,
            return_timestamps=False,
            logits_processor=LogitsProcessorList([choices]),
            **task,
        )
        texts = map(str.strip, self._tokenizer.batch_decode(ids, skip_special_tokens=True))
        return list(zip(texts, *choices.sums_until(self._model.generation_config.eos_token_id), strict=True))


def _join_windows(answers: Sequence[WindowAnswer]) -> WhisperTranscript:
    count = sum(count for _, _, count in answers)
    total = sum(logprob_sum for _, logprob_sum, _ in answers)
    return WhisperTranscript(
        " ".join(text for text, _, _ in answers if text), total / count if count else float("-inf")
    )


class _RecordChoices(LogitsProcessor):
    """Records each greedy choice and its log-probability from the final scores of generate.

    The scores themselves, which generate can return, would take 46 MB for each window.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # log-probabilities and tokens, (B,) each

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = scores.log_softmax(-1).max(-1)
        self._steps.append((chosen.values, chosen.indices))
        return scores

    def sums_until(self, end: int | Sequence[int]) -> tuple[list[float], list[int]]:
        """Return the sum of the log-probabilities of each row's tokens up to its first `end`, and their number.

        The end token is included in both.
        """
        logprobs, tokens = (torch.stack(part, dim=1) for part in zip(*self._steps, strict=True))  # (B, T) each
        ends = torch.isin(tokens, torch.as_tensor(end, device=tokens.device))
        counted = ends.cumsum(1) - ends.long() == 0
        return (logprobs * counted).sum(1).tolist(), counted.sum(1).tolist()
