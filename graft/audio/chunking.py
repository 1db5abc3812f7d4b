"""Cut a clip of any length, where it is quiet, into chunks of its speech or windows of all of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from pydantic import Field

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.vad import FRAME, Speech, SpeechDetector, SpeechSettings
from graft.config import Recipe

SEARCH_S = 5.0
QUIET_S = 0.2
TELLING = 4
"""Chunks at the start of a recording among which the one is that tells its language."""

Span = tuple[int, int]
"""Start and end in samples."""


class ChunkSettings(Recipe):
    """How stretches of speech become chunks."""

    max_s: float = Field(default=28.0, ge=2, le=30)
    """Longest chunk in seconds, padding included."""
    padding_s: float = Field(default=0.15, ge=0, le=0.5)
    """Seconds kept before and after speech, up to half of the silence between two chunks."""
    max_pause_s: float = Field(default=2.0, ge=0)
    """Longest silence inside a chunk, in seconds; a longer one ends the chunk and is skipped."""
    skip_silence: bool = True
    """Skip what is no speech. If false, all is transcribed, and text without speech is flagged `no_speech`."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """A window of a clip, where in the clip it starts, and whether anybody speaks in it (None: unknown)."""

    start_s: float
    clip: AudioClip
    has_speech: bool | None = None


def find_telling(chunks: Sequence[Chunk]) -> int:
    """Return the place of the chunk that tells the language of a recording: the longest of its first TELLING chunks.

    One without speech is taken only where all are.
    """
    keys = [(chunk.has_speech is not False, len(chunk.clip.samples)) for chunk in chunks[:TELLING]]
    return keys.index(max(keys))


class Chunker:
    """Cuts clips where nobody speaks; equal samples and settings give equal chunks. Use one for each thread.

    Raises MissingExtra without the package of the speech detector.
    """

    def __init__(self, speech: SpeechSettings | None = None, settings: ChunkSettings | None = None) -> None:
        self.settings = settings or ChunkSettings()
        self._detector = SpeechDetector(speech)

    def __call__(self, clip: AudioClip) -> list[Chunk]:
        """Cut a clip of any length into its speech or, where silence is not skipped, into windows of all of it."""
        speech = self._detector.find(clip)
        if self.settings.skip_silence:
            return speech_chunks(clip, speech, self.settings)
        return [_with_speech_flag(window, speech) for window in windows(clip, max_s=self.settings.max_s)]


def speech_chunks(clip: AudioClip, speech: Speech, settings: ChunkSettings | None = None) -> list[Chunk]:
    """Cut the speech that was found in a clip into chunks, in order and apart; none if there is no speech.

    The samples are views.
    """
    bounds = chunk_bounds(speech.spans, speech.scores, len(clip.samples), settings or ChunkSettings())
    return [Chunk(start / SAMPLE_RATE, AudioClip(clip.samples[start:end]), has_speech=True) for start, end in bounds]


def chunk_bounds(spans: Sequence[Span], scores: np.ndarray, sample_count: int, settings: ChunkSettings) -> list[Span]:
    """Merge spans of speech into bounds of chunks.

    Every sample of speech is in one chunk, no sample is in two, and no chunk is too long. Speech that is too long for
    one chunk is cut at the longest silence in the second half of what fits; where there is none, where it is least like
    speech by the detector's `scores`.
    """
    padding = round(settings.padding_s * SAMPLE_RATE)
    longest = int(settings.max_s * SAMPLE_RATE) - 2 * padding
    runs: list[list[Span]] = []  # with pauses of at most max_pause_s in between
    for span in spans:
        if runs and span[0] - runs[-1][-1][1] <= settings.max_pause_s * SAMPLE_RATE:
            runs[-1].append(span)
        else:
            runs.append([span])
    return _pad_parts([part for run in runs for part in _cut_run(run, scores, longest)], padding, sample_count)


def windows(clip: AudioClip, *, max_s: float = 30.0) -> list[Chunk]:
    """Cut a clip into consecutive windows of at most `max_s` seconds, which is at least 1.

    A window that would be longer ends in the middle of the quietest 0.2 s of its last 5 s (of its last half, if `max_s`
    is under 10). Every sample is in exactly one window; the samples are views, not copies. Raises ValueError for a
    shorter `max_s`.
    """
    if not max_s >= 1:
        raise ValueError(f"max_s is {max_s}: at least 1 s")
    max_samples = int(max_s * SAMPLE_RATE)
    start, chunks = 0, []
    while start < len(clip.samples):
        window = clip.samples[start : start + max_samples]
        if start + max_samples < len(clip.samples):
            search = min(int(SEARCH_S * SAMPLE_RATE), len(window) // 2)
            energy = np.square(window[-search:], dtype=np.float64)
            window = window[: len(window) - search + quietest(energy, int(QUIET_S * SAMPLE_RATE))]
        chunks.append(Chunk(start / SAMPLE_RATE, AudioClip(window)))
        start += len(window)
    return chunks


def quietest(energy: np.ndarray, width: int) -> int:
    """Find the middle of the `width` entries in a row with the least sum, the last of equal ones.

    With fewer entries it is their end.
    """
    if len(energy) < width:
        return len(energy)
    total = np.concatenate([[0.0], np.cumsum(energy)])
    sums = total[width:] - total[:-width]  # (len(energy) - width + 1,)
    return len(sums) - 1 - int(np.argmin(sums[::-1])) + width // 2


def _with_speech_flag(window: Chunk, speech: Speech) -> Chunk:
    start = round(window.start_s * SAMPLE_RATE)
    end = start + len(window.clip.samples)
    return replace(window, has_speech=any(begin < end and start < stop for begin, stop in speech.spans))


def _cut_run(run: list[Span], scores: np.ndarray, longest: int) -> Iterator[Span]:
    """Cut a run into parts of at most `longest` samples."""
    while (start := run[0][0]) + longest < run[-1][1]:
        cut = _find_cut(run, scores, start + longest // 2, start + longest)
        yield start, max(min(end, cut) for begin, end in run if begin < cut)
        run = [(max(begin, cut), end) for begin, end in run if end > cut]
    yield start, run[-1][1]


def _find_cut(run: list[Span], scores: np.ndarray, earliest: int, latest: int) -> int:
    """Find the middle of the longest pause in reach, or else of the QUIET_S that scores lowest; the last of equals."""
    pauses = [(end, begin) for (_, end), (begin, _) in pairwise(run) if end <= latest and begin >= earliest]
    if pauses:
        end, begin = max(reversed(pauses), key=lambda pause: pause[1] - pause[0])
        return (end + begin) // 2
    first, last = -(-earliest // FRAME), latest // FRAME  # whole frames between earliest and latest
    width = round(QUIET_S * SAMPLE_RATE / FRAME)
    return (first + quietest(scores[first:last].astype(np.float64), width)) * FRAME


def _pad_parts(parts: Sequence[Span], padding: int, sample_count: int) -> list[Span]:
    """Extend parts by `padding` samples on either side, at most by half of the silence to the next part."""
    if not parts:
        return []
    before = [parts[0][0], *((begin - end) // 2 for (_, end), (begin, _) in pairwise(parts))]
    after = [*before[1:], sample_count - parts[-1][1]]
    room = zip(parts, before, after, strict=True)
    return [(start - min(padding, left), end + min(padding, right)) for (start, end), left, right in room]
