"""Word times from a CTC model (wav2vec2 and its kin): the likeliest way through blanks and letters that spells the text.

Source: the forced alignment of torchaudio's tutorials, whose `forced_align` is no more; from there too comes the wildcard ("star") that
stands where the model has no letter.
"""

import os
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.errors import ModelError
from graft.inference.aligners.protocol import spread, timed
from graft.inference.aligners.viterbi import best_paths, word_spans
from graft.inference.transcript import Word

LEAST_SAMPLES = 1600
"""Shorter clips are heard with silence after them: the convolutions of wav2vec2 need 400 samples."""
WILDCARD = -1
"""A label that stands for whatever is heard."""
PREFERENCE = 0.01
"""Nats by which a wildcard is less likely than a letter that is heard, lest it take its neighbours', and likelier than a blank."""


class CtcAligner:
    """Aligns with a folder or hub id that AutoModelForCTC opens and whose vocabulary is letters.

    Letters are sought as they are, in upper case, in lower case, and without accents; others are left out, and a word without any lasts
    from the one before it to the next. Spread are texts of more letters than the model has frames. Raises ModelError for a vocabulary
    without letters.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        folder = os.fspath(folder)
        self.name = name or f"{Path(folder).name}, CTC"
        model: Any = AutoModelForCTC.from_pretrained(folder, dtype=dtype or "auto")
        self._model = model.to(device).eval()
        self._extractor = AutoFeatureExtractor.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._blank = model.config.pad_token_id
        self._ids = {
            text: label for text, label in tokenizer.get_vocab().items() if len(text) == 1 and label != self._blank
        }
        if not any(map(str.isalpha, self._ids)):
            raise ModelError(
                f"{folder}: its CTC vocabulary has no letters: use a model that spells, e.g. facebook/wav2vec2-base-960h"
            )
        self._between = self._ids.pop(getattr(tokenizer, "word_delimiter_token", None) or " ", None)
        self._busy = threading.Lock()

    def align(self, clip: AudioClip, text: str) -> tuple[Word, ...]:
        """Time the words of a text; see Aligner. Clips may be of any length that fits into memory."""
        words = text.split()
        if not words:
            return ()
        with self._busy:
            logprobs = self._logprobs(clip)
        spans = word_frames(logprobs, [self._labels(word) for word in words], blank=self._blank, between=self._between)
        if not spans:
            return spread(words, clip.duration_s)
        frame_s = max(len(clip.samples), LEAST_SAMPLES) / SAMPLE_RATE / len(logprobs)
        return timed(words, [(first * frame_s, end * frame_s) for first, end in spans], clip.duration_s)

    @torch.inference_mode()
    def _logprobs(self, clip: AudioClip) -> np.ndarray:
        """Natural log-probabilities (frames, vocabulary)."""
        samples = np.pad(clip.samples, (0, max(0, LEAST_SAMPLES - len(clip.samples))))
        inputs = self._extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")[self._model.main_input_name]
        logits = self._model(inputs.to(self._model.device, self._model.dtype)).logits[0]
        return logits.float().log_softmax(dim=-1).cpu().numpy()

    def _labels(self, word: str) -> list[int]:
        found = [next((self._ids[form] for form in _forms(letter) if form in self._ids), None) for letter in word]
        return [label for label in found if label is not None] or [WILDCARD]


def word_frames(
    logprobs: np.ndarray, labels: Sequence[Sequence[int]], *, blank: int, between: int | None
) -> list[tuple[int, int]]:
    """Find each word's first frame and the one after its last in the likeliest spelling; none at all where frames are too few for it.

    logprobs (frames, vocabulary), labels of each word; `between` stands between words, None where nothing does.
    """
    spelled: list[int] = []
    owners: list[int] = []
    for word, own in enumerate(labels):
        gap = [between] if word and between is not None else []
        spelled += [*gap, *own]
        owners += [-1] * len(gap) + [word] * len(own)
    ids = np.array(spelled)
    scores = np.empty((len(logprobs), 2 * len(ids) + 1), np.float32)
    scores[:, ::2] = logprobs[:, [blank]]
    if between is not None:  # models write it before the first word and after the last too
        scores[:, [0, -1]] = logprobs[:, [blank, between]].max(axis=1, keepdims=True)
    wildcard = logprobs.max(axis=1) + np.where(logprobs.argmax(axis=1) == blank, PREFERENCE, -PREFERENCE)
    scores[:, 1::2] = np.where(ids == WILDCARD, wildcard[:, None], logprobs[:, ids])
    may_skip = np.zeros(scores.shape[1], bool)
    may_skip[3::2] = ids[1:] != ids[:-1]  # between two of the same letter a blank must stand
    path, fit = best_paths(scores, may_skip)
    if not np.isfinite(fit):
        return []
    state_owners = np.full(scores.shape[1], -1)
    state_owners[1::2] = owners
    return word_spans(state_owners[path], len(labels))


def _forms(letter: str) -> tuple[str, ...]:
    """How a vocabulary may write a letter, the likeliest first."""
    plain = unicodedata.normalize("NFKD", letter)[0]
    return (letter, letter.upper(), letter.lower(), plain, plain.upper(), plain.lower())
