"""Follow who speaks in audio that comes bit by bit: a score for every 32 ms -> speech begins, speech ends.

Silero's network scores the audio as it does for uploads (graft.audio.vad). An upload's speech is found looking back and
ahead; here it begins as soon as SURE_S of it were heard, and ends after a pause that the session sets.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from graft.audio.clip import SAMPLE_RATE
from graft.audio.vad import FAINT, FRAME, PAUSE_S, SURE_S

if TYPE_CHECKING:  # torch, which an ingress replica imports with its first session
    from graft.audio.silero import Silero

HYSTERESIS = 0.15
"""Speech that has begun goes on while its score is at most so much below the threshold, as in Silero's own iterator."""
LEAST_THRESHOLD, MOST_THRESHOLD = 0.02, 0.98

Scorer = Callable[[np.ndarray], np.ndarray]
"""Scores the next block of samples, a multiple of FRAME long."""


@functools.cache
def _network() -> "Silero":
    from graft.audio.silero import Silero

    return Silero()


def open_scorer() -> Scorer:
    """Return the scorer of a new stream of audio; the first one of a process loads the network, in seconds."""
    from graft.audio.silero import ScoreStream

    return ScoreStream(_network())


class TurnDetector:
    """Says for each frame of FRAME samples whether somebody speaks.

    Positions are in samples from the first frame on. `speech_start` is where the speech under way began, None in
    silence; `speech_end` is where its last sound ended so far.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = min(max(threshold, LEAST_THRESHOLD), MOST_THRESHOLD)
        self.position = 0
        self.reset()

    def reset(self) -> None:
        """Forget the speech under way."""
        self.speech_start: int | None = None
        self.speech_end = self.position
        self._stretch_start: int | None = None  # of sounds that may become speech
        self._sure_samples = 0

    @property
    def silence(self) -> int:
        """Samples since the last sound of speech."""
        return self.position - self.speech_end

    def add(self, score: float) -> bool:
        """Take the next frame's score; returns whether speech has just begun."""
        start, self.position = self.position, self.position + FRAME
        if self.speech_start is not None:
            if score >= max(self.threshold - HYSTERESIS, self.threshold * FAINT):
                self.speech_end = self.position
            return False
        if score >= FAINT * self.threshold:
            self._stretch_start = start if self._stretch_start is None else self._stretch_start
            self._sure_samples += FRAME if score >= self.threshold else 0
            self.speech_end = self.position
        elif self.silence >= PAUSE_S * SAMPLE_RATE:
            self._stretch_start, self._sure_samples = None, 0
        if self._sure_samples < SURE_S * SAMPLE_RATE:
            return False
        self.speech_start, self._stretch_start, self._sure_samples = self._stretch_start, None, 0
        return True
