"""Make sample seeds: 63-bit integers from which everything random about a training sample follows.

A sample seed is a hash of (seed, epoch, row, occurrence). So the plan, for a million samples at a time, and a loader in
another process, for one, draw the same numbers. Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

import zlib
from typing import Any

import numpy as np


def make_sample_seeds(seed: int, epoch: int, rows: np.ndarray, occurrences: np.ndarray) -> np.ndarray:
    """Make the seeds of rows that occur in an epoch for the `occurrences`-th time: int64 (samples,), of 63 bits."""
    return (_mix(seed, epoch, rows, occurrences) >> np.uint64(1)).astype(np.int64)


def uniform(sample_seeds: np.ndarray | int, purpose: str) -> np.ndarray:
    """Draw a float64 in [0, 1) from each sample seed, another one for every purpose."""
    return (_mix(sample_seeds, zlib.crc32(purpose.encode())) >> np.uint64(11)) * 2.0**-53


def generator(sample_seed: int, purpose: str) -> np.random.Generator:
    """Make a random generator from a sample seed, another one for every purpose."""
    return np.random.default_rng([int(sample_seed), zlib.crc32(purpose.encode())])


def _mix(*values: Any) -> np.ndarray:
    """Hash integers, or arrays of them elementwise, to uint64."""
    hashed = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        for value in values:
            hashed = hashed + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            hashed = hashed ^ (hashed >> np.uint64(31))
    return hashed
