"""Keep the last samples of audio that comes bit by bit, by their positions from its start."""

from collections import deque

import numpy as np


class SampleBuffer:
    """Holds the samples from `start` to `end`; positions count from the first sample that was ever added."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self._blocks: deque[np.ndarray] = deque()

    def add(self, samples: np.ndarray) -> None:
        """Add samples at the end."""
        if len(samples):
            self._blocks.append(samples)
            self.end += len(samples)

    def copy(self, start: int, end: int) -> np.ndarray:
        """Return the samples between two positions, as far as they are held."""
        parts, position = [np.zeros(0, np.float32)], self.start
        for block in self._blocks:
            parts.append(block[max(start - position, 0) : max(end - position, 0)])
            position += len(block)
        return np.concatenate(parts)

    def drop_before(self, position: int) -> None:
        """Forget blocks that end at or before a position."""
        while self._blocks and self.start + len(self._blocks[0]) <= position:
            self.start += len(self._blocks.popleft())
