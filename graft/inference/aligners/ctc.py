"""Find word times with a CTC model (wav2vec2 and its kin), by forced alignment of the text's letters.

clip -> log-probabilities (frames, letters) -> the likeliest CTC path that spells the text -> the frames of each word

torchaudio's `forced_align` finds the path where torchaudio can be imported; elsewhere `viterbi_alignment` finds the
same one. The wildcard, a label for characters that the model has no letter for, follows the "star" token of
torchaudio's tutorials on forced alignment.
"""

import functools
import os
import threading
import unicodedata
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.checkpoints.quiet import no_loading_bars
from graft.errors import ModelError
from graft.inference.aligners.protocol import spread_words, timed_words
from graft.inference.segments import Word
from graft.text.characters import compose, split_words

# Shorter clips are padded with silence to this length: the convolutions of wav2vec2 need 400 samples.
LEAST_SAMPLES = 1600
# Label that matches any sound.
WILDCARD = -1
# Nats by which a wildcard scores below the likeliest letter, so that it takes no frames of its neighbours, and above a
# blank. A tenth of it parts the edge from a blank: of paths that tie, torchaudio does not always return the best.
PREFERENCE = 0.01


class CtcAligner:
    """Aligns with a folder or hub id that AutoModelForCTC opens and whose vocabulary is letters.

    Each letter is looked up as it is written, in upper case, in lower case, and by the parts that Unicode takes it
    apart into, such as é without its accent or a Korean syllable's jamo; letters that are not in the vocabulary are
    left out, and a word without any letter lasts from the previous word to the next. A text is spread over the clip
    where most of its letters are left out, as Russian's are by an English model, or where it has more letters than the
    model has frames. Raises ModelError for a vocabulary without letters.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        folder = os.fspath(folder)
        self.name = name or f"{Path(folder).name}, CTC"
        with no_loading_bars():
            model: Any = AutoModelForCTC.from_pretrained(folder, dtype="auto")
        self._model = model.to(device).eval()
        self._extractor = AutoFeatureExtractor.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._blank = model.config.pad_token_id
        self._ids = {
            text: label for text, label in tokenizer.get_vocab().items() if len(text) == 1 and label != self._blank
        }
        if not any(map(str.isalpha, self._ids)):
            raise ModelError(
                f"{folder}: its CTC vocabulary has no letters: "
                "use a model that spells, e.g. facebook/wav2vec2-base-960h"
            )
        self._delimiter = self._ids.pop(getattr(tokenizer, "word_delimiter_token", None) or " ", None)
        self._lock = threading.Lock()

    def find_language(self, clip: AudioClip) -> str | None:
        """Return None: the letters of a CTC model are those of its own language."""
        return None

    def align(self, clip: AudioClip, text: str, language: str | None = None) -> tuple[Word, ...]:
        """Return the words of a text with their times, as Aligner says; the language does not matter.

        A clip may have any length that fits into memory.
        """
        written = split_words(text)
        words = [word for _, word in written]
        letters = [letter for letter in compose(text) if letter.isalpha()]
        if 2 * sum(bool(self._spell(letter)) for letter in letters) < len(letters):
            return spread_words(words, clip.duration_s)
        if not words:
            return ()
        with self._lock:
            logprobs = self._logprobs(clip)
        spans = word_frames(
            logprobs,
            [self._labels(word) for word in words],
            blank=self._blank,
            delimiter=self._delimiter,
            joined={place for place, (gap, _) in enumerate(written) if not gap},
        )
        if not spans:
            return spread_words(words, clip.duration_s)
        frame_s = max(len(clip.samples), LEAST_SAMPLES) / SAMPLE_RATE / len(logprobs)
        return timed_words(words, [(first * frame_s, end * frame_s) for first, end in spans], clip.duration_s)

    @torch.inference_mode()
    def _logprobs(self, clip: AudioClip) -> np.ndarray:
        """Compute natural log-probabilities (frames, vocabulary)."""
        samples = np.pad(clip.samples, (0, max(0, LEAST_SAMPLES - len(clip.samples))))
        inputs = self._extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")[self._model.main_input_name]
        logits = self._model(inputs.to(self._model.device, self._model.dtype)).logits[0]
        return logits.float().log_softmax(dim=-1).cpu().numpy()

    def _labels(self, word: str) -> list[int]:
        """Look up the letters of a word; a word without any is one wildcard."""
        return [label for letter in compose(word) for label in self._spell(letter)] or [WILDCARD]

    def _spell(self, letter: str) -> list[int]:
        """Return the labels of a letter, or else of its parts; none where the vocabulary has neither."""
        found = self._find(letter)
        parts = [found] if found is not None else [self._find(part) for part in unicodedata.normalize("NFKD", letter)]
        return [part for part in parts if part is not None]

    def _find(self, letter: str) -> int | None:
        forms = (letter, letter.upper(), letter.lower())
        return next((self._ids[form] for form in forms if form in self._ids), None)


def word_frames(
    logprobs: np.ndarray,
    words: Sequence[Sequence[int]],
    *,
    blank: int,
    delimiter: int | None,
    joined: Collection[int] = (),
) -> list[tuple[int, int]]:
    """Find the first frame of each word and the frame after its last on the likeliest CTC path.

    logprobs (frames, vocabulary), labels of each word; `delimiter` is the label between words, None for a model without
    one; it does not stand before the words at the places `joined`. Returns an empty list where there are fewer frames
    than the labels need.
    """
    # Two columns follow the vocabulary: the wildcard, and the edge, which stands before the first and after the last
    # word, where models write blanks and delimiters in any order.
    wildcard = logprobs.max(axis=1) + np.where(logprobs.argmax(axis=1) == blank, PREFERENCE, -PREFERENCE)
    silence = logprobs[:, [blank] if delimiter is None else [blank, delimiter]].max(axis=1)
    scores = np.column_stack([logprobs, wildcard, silence + PREFERENCE / 10]).astype(np.float32)  # (T, C + 2)
    # One frame before the clip and one after it can only be edge: no frame of the clip itself then has to be.
    scores = np.pad(scores, ((1, 1), (0, 0)), constant_values=-np.inf)  # (T + 2, C + 2)
    scores[[0, -1], -1] = 0.0

    vocabulary = logprobs.shape[1]
    labels, owners = [vocabulary + 1], [-1]  # the word of each label, -1 for edges and delimiters
    for word, own in enumerate(words):
        gap = [delimiter] if word and delimiter is not None and word not in joined else []
        labels += [*gap, *(vocabulary if label == WILDCARD else label for label in own)]
        owners += [-1] * len(gap) + [word] * len(own)
    labels, owners = [*labels, vocabulary + 1], [*owners, -1]

    repeats = sum(label == before for before, label in pairwise(labels))
    if len(scores) < len(labels) + repeats:  # a blank must stand between a label and the same label again
        return []
    path, score = find_alignment()(scores, labels, blank=blank)
    if not np.isfinite(score):
        return []
    # (T + 2,) labels of the path -> the index of each in `labels` -> the word that it belongs to
    is_label = path != blank
    is_first = is_label & (path != np.concatenate([[blank], path[:-1]]))
    frame_owners = np.where(is_label, np.array(owners)[np.cumsum(is_first) - 1], -1)
    return word_spans(frame_owners[1:-1], len(words))


@functools.cache
def find_alignment() -> Callable[..., tuple[np.ndarray, float]]:
    """Return torchaudio_alignment, or viterbi_alignment where torchaudio is missing or does not load beside this torch.

    torchaudio 2.11 from PyPI needs the CUDA libraries of torch, so that it does not load beside a CPU build.
    """
    try:
        import torchaudio.functional  # noqa: F401
    except (ImportError, OSError):
        return viterbi_alignment
    return torchaudio_alignment


def viterbi_alignment(logprobs: np.ndarray, labels: Sequence[int], *, blank: int) -> tuple[np.ndarray, float]:
    """Find the likeliest CTC path of labels (L,) by the Viterbi algorithm in numpy.

    logprobs (T, C) -> the label of each frame (T,), blanks included, and the sum of their log-probabilities, -inf where
    T frames are too few for the labels.
    """
    ids = np.full(2 * len(labels) + 1, blank)  # the states: a blank, a label, a blank, ..., a label, a blank
    ids[1::2] = labels
    may_skip = np.zeros(len(ids), bool)
    may_skip[3::2] = ids[3::2] != ids[1:-2:2]  # a blank may be skipped, except between a label and the same label again
    states, score = best_paths(logprobs[:, ids], may_skip)
    return ids[states], float(score)


def best_paths(scores: np.ndarray, may_skip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the state of each frame on the path with the largest sum of scores.

    scores (..., frames, states), may_skip (states,) -> paths (..., frames) and their sums (...). From one frame to the
    next the state stays or advances by one; it advances by two onto a state that `may_skip` the one before it. The
    first frame is in one of the first two states, the last frame in one of the last two. A sum is -inf where no path
    exists.
    """
    frames, states = scores.shape[-2:]
    best = np.full_like(scores[..., 0, :], -np.inf)  # (..., states): the sum of the best path that ends in each state
    best[..., :2] = scores[..., 0, :2]
    moves = np.zeros((frames, *best.shape), np.int8)  # how many states each best path advanced to get there
    for frame in range(1, frames):
        reached = np.full((3, *best.shape), -np.inf, best.dtype)
        reached[0] = best
        reached[1, ..., 1:] = best[..., :-1]
        reached[2, ..., 2:] = np.where(may_skip[2:], best[..., :-2], -np.inf)
        moves[frame] = reached.argmax(axis=0)
        best = reached.max(axis=0) + scores[..., frame, :]
    # The moves lead back from the better of the last two states to the first frame.
    state = np.where(best[..., -1] > best[..., -2], states - 1, states - 2)
    path = np.empty((frames, *state.shape), np.int64)
    for frame in reversed(range(frames)):
        path[frame] = state
        state = state - np.take_along_axis(moves[frame], state[..., None], axis=-1)[..., 0]
    return np.moveaxis(path, 0, -1), best[..., -2:].max(axis=-1)


def torchaudio_alignment(logprobs: np.ndarray, labels: Sequence[int], *, blank: int) -> tuple[np.ndarray, float]:
    """Find the path and the score that `viterbi_alignment` finds, with torchaudio, in compiled code.

    Of paths with exactly equal scores it may return another one, or a worse one. Raises RuntimeError where T frames are
    too few for the labels.
    """
    from torchaudio.functional import forced_align

    targets = torch.tensor([labels], dtype=torch.int32)  # (1, L)
    paths, scores = forced_align(torch.from_numpy(logprobs)[None], targets, blank=blank)  # (1, T, C) -> (1, T) each
    return paths[0].numpy(), float(scores.sum())


def word_spans(owners: np.ndarray, word_count: int) -> list[tuple[int, int]]:
    """Find the first frame of each word and the frame after its last.

    `owners` (frames,) holds the word that each frame belongs to, -1 for none; every word must have a frame.
    """
    frames = [np.flatnonzero(owners == word) for word in range(word_count)]
    return [(int(own[0]), int(own[-1]) + 1) for own in frames]
