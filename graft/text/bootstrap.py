"""Estimate by the bootstrap how far error rates would move on other clips or speakers like these.

    values of clips -> sums over units (speakers or clips) -> sums of resamples -> rates -> interval or verdict

The clips of one speaker share what makes them hard, so that speakers are drawn where they are known. Two systems are
compared on the same draws: what makes a draw hard for both cancels out in the difference of their rates.
Source: Bisani & Ney, Bootstrap estimates for confidence intervals in ASR performance evaluation, ICASSP 2004.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graft.errors import DataError

RESAMPLES = 2000
LEVEL = 0.95
Seed = int | Sequence[int]
LEAST_UNITS = 6
"""Fewer clips or speakers show no difference: all would favour one system by chance in more than 1 of 20 cases."""
_BLOCK = 4_000_000
"""Draws at a time, so that memory stays at tens of MB."""


@dataclass(frozen=True)
class Difference:
    """The rate of one system minus that of another, with its interval; negative where the first one is better."""

    difference: float
    low: float
    high: float
    units: int
    """Number of speakers or clips that were drawn from."""

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out 0, and rests on LEAST_UNITS."""
        return self.units >= LEAST_UNITS and (self.low > 0 or self.high < 0)

    def verdict(self, first: str, second: str) -> str:
        """Say in words which system is better, by how many percentage points of the rate, and the interval."""
        points, low, high = (100 * value for value in (self.difference, self.low, self.high))
        if not self.is_shown:
            few = f", from only {self.units} speakers or clips" if self.units < LEAST_UNITS else ""
            interval_text = f"[{low:+.1f}, {high:+.1f}]"
            return f"no difference shown between {first} and {second}: {points:+.1f} points {interval_text}{few}"
        if points < 0:
            return f"{first} is better than {second} by {-points:.1f} points [{-high:.1f}, {-low:.1f}]"
        return f"{second} is better than {first} by {points:.1f} points [{low:.1f}, {high:.1f}]"


def resample_sums(
    values: ArrayLike, units: ArrayLike | None = None, *, seed: Seed = 0, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Draw as many units as there are, with replacement, and sum their values: (clips, measures) -> (resamples, same).

    `units` is the number of each clip's unit, from 0; by default each clip is one. The same seed and units give the
    same draws. Raises DataError for no clips.
    """
    table = np.asarray(values, np.float64)
    if not len(table):
        raise DataError("no clips to estimate an interval from")
    if units is not None:
        table = _sum_units(table, np.asarray(units))
    random, count = np.random.default_rng(seed), len(table)
    sums = np.empty((resamples, table.shape[1]))
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = random.integers(count, size=(size, count), dtype=np.int32)
        drawn += np.arange(size, dtype=np.int32)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)  # how often each unit is drawn
        sums[start : start + size] = times @ table
    return sums


def interval(samples: ArrayLike, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval of a statistic's resamples."""
    low, high = np.quantile(np.asarray(samples), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rate_of(errors: ArrayLike, words: ArrayLike) -> NDArray[np.float64]:
    """Return errors / max(1, words)."""
    return np.asarray(errors, np.float64) / np.maximum(1, np.asarray(words, np.float64))


def _sum_units(table: NDArray[np.float64], units: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = np.zeros((int(units.max()) + 1, table.shape[1]))
    np.add.at(sums, units, table)
    return sums
