"""A clip of any length -> windows that the model can hear, cut where it is quietest."""

from dataclasses import dataclass

import numpy as np

from graft.audio import SAMPLE_RATE, AudioClip

SEARCH_S = 5.0
QUIET_S = 0.2


@dataclass(frozen=True, eq=False)
class Chunk:
    """A window of a clip and where in the clip it starts."""

    start_s: float
    clip: AudioClip


def windows(clip: AudioClip, *, max_s: float = 30.0) -> list[Chunk]:
    """Cut a clip into consecutive windows of at most `max_s` seconds, at least 1.

    A window that would be longer ends in the middle of the quietest 0.2 s of its last 5 s (of its last half, if `max_s` is under 10).
    Every sample is in exactly one window; the samples are views, not copies. Raises ValueError for a shorter `max_s`.
    """
    if not max_s >= 1:
        raise ValueError(f"max_s is {max_s}: at least 1 s")
    max_samples = int(max_s * SAMPLE_RATE)
    start, chunks = 0, []
    while start < len(clip.samples):
        window = clip.samples[start : start + max_samples]
        if start + max_samples < len(clip.samples):
            window = window[: _quietest_cut(window)]
        chunks.append(Chunk(start / SAMPLE_RATE, AudioClip(window)))
        start += len(window)
    return chunks


def _quietest_cut(window: np.ndarray) -> int:
    """The middle of the quietest QUIET_S near the window's end; of equally quiet ones the last."""
    search = min(int(SEARCH_S * SAMPLE_RATE), len(window) // 2)
    quiet = int(QUIET_S * SAMPLE_RATE)
    energy = np.concatenate([[0.0], np.cumsum(np.square(window[-search:], dtype=np.float64))])
    quiet_energy = energy[quiet:] - energy[:-quiet]  # (search - quiet + 1,)
    last_quietest = len(quiet_energy) - 1 - int(np.argmin(quiet_energy[::-1]))
    return len(window) - search + last_quietest + quiet // 2
