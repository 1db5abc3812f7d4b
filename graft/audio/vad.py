"""Find where somebody speaks in a recording.

samples -> blocks of 16 s -> a score for every 32 ms (Silero's network, or loudness) -> spans of samples
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.config import Recipe

FRAME = 512
"""Samples of one score."""
BLOCK = 512 * FRAME

FAINT = 0.2
"""Share of the threshold that scores beside speech need to belong to it: a detector is unsure of its first and last
sounds."""
PAUSE_S = 0.1
"""Shortest pause between two stretches of speech: stops like p and t are silent for nearly as long."""
SURE_S = 0.09
"""Seconds of scores at or over the threshold that a stretch of speech has at least; with less it is a click."""

LOUDER_DB = 10.0
QUIETEST_DBFS = -60.0
SLOPE_DB = 2.0
BACKGROUND_S = 10.0
BACKGROUND_PERCENTILE = 10


class SpeechSettings(Recipe):
    """How speech is detected."""

    detector: Literal["silero", "energy"] = "silero"
    """silero is a network trained on voices; energy takes all that is 10 dB louder than the sound around it for
    speech."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Score from 0 to 1 that speech reaches. A lower threshold finds more speech, and takes more noise for it."""


@dataclass(frozen=True, eq=False)
class Speech:
    """The speech in a clip, and the name of the detector that found it.

    `spans` are (start, end) in samples, ordered and apart; `scores` (frames,) are 0 to 1, one for every FRAME samples,
    the last perhaps for fewer.
    """

    spans: tuple[tuple[int, int], ...]
    scores: np.ndarray
    detector: str


class SpeechDetector:
    """Finds speech; the result depends on the samples and the settings alone.

    Raises MissingExtra without the package silero-vad.
    """

    def __init__(self, settings: SpeechSettings | None = None) -> None:
        self.settings = settings or SpeechSettings()
        self._scores = energy_scores
        if self.settings.detector == "silero":
            from graft.audio.silero import Silero

            self._scores = Silero().scores

    def find(self, clip: AudioClip) -> Speech:
        """Find the speech in a clip of any length."""
        count = len(clip.samples)
        blocks = (clip.samples[start : start + BLOCK] for start in range(0, count, BLOCK))
        scores = self._scores(np.pad(block, (0, -len(block) % FRAME)) for block in blocks)  # to whole frames
        spans = speech_spans(scores, count, self.settings.threshold)
        return Speech(tuple(spans), scores, self.settings.detector)


def speech_spans(scores: np.ndarray, sample_count: int, threshold: float) -> list[tuple[int, int]]:
    """Find spans of samples with speech: stretches of scores over FAINT of `threshold` that reach it for SURE_S in all.

    Stretches less than PAUSE_S apart are one.
    """
    sure = scores >= threshold
    inside = np.concatenate([[False], scores >= FAINT * threshold, [False]])
    changes = np.flatnonzero(inside[1:] != inside[:-1])  # first frames and ends of stretches in turns
    stretches: list[tuple[int, int]] = []  # in frames
    for first, end in changes.reshape(-1, 2).tolist():
        if stretches and (first - stretches[-1][1]) * FRAME < PAUSE_S * SAMPLE_RATE:
            first, _ = stretches.pop()
        stretches.append((first, end))
    spoken = ((first, end) for first, end in stretches if sure[first:end].sum() * FRAME >= SURE_S * SAMPLE_RATE)
    return [(first * FRAME, min(end * FRAME, sample_count)) for first, end in spoken]


def energy_scores(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Score frames by how much louder they are than the quiet tenth of the 30 s around them.

    A score is 0.5 at 10 dB more, and less under -60 dBFS.

    Speech in noise that is as loud gets low scores, tones that come and go high ones.
    """
    levels = [np.zeros(0)]
    for block in blocks:
        power = np.square(block.reshape(-1, FRAME), dtype=np.float64).mean(axis=1)  # (samples,) -> (frames,)
        levels.append(10 * np.log10(power + 1e-10))
    level = np.concatenate(levels)
    # The background of a frame is the level of quiet frames within its section of 10 s or the neighbours of that.
    section = round(BACKGROUND_S * SAMPLE_RATE / FRAME)
    starts = range(0, len(level), section)
    quiet = [np.percentile(level[start : start + section], BACKGROUND_PERCENTILE) for start in starts]
    lowest = [min(quiet[max(index - 1, 0) : index + 2]) for index in range(len(quiet))]
    background = np.repeat(lowest, section)[: len(level)]
    threshold = np.maximum(background + LOUDER_DB, QUIETEST_DBFS)
    return 1 / (1 + np.exp((threshold - level) / SLOPE_DB))
