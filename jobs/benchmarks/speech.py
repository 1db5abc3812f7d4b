"""What benchmarks hear: noise in the shape of speech, of lengths and with words like a corpus's, the same for the same seed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.data.dataset import clip_row, write_corpus

WORDS = (
    "the",
    "of",
    "and",
    "to",
    "that",
    "is",
    "was",
    "he",
    "for",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
    "had",
    "not",
    "are",
    "but",
)
WORDS_PER_S = 2.5
SHORTEST_S, LONGEST_S, MEAN_S = 2.0, 20.0, 10.0


def durations(count: int, rng: np.random.Generator) -> np.ndarray:
    """Seconds of `count` clips, 2 to 20 with a mean of 10: evenly spaced quantiles of a log-normal, shuffled."""
    normal = np.sort(np.random.default_rng(0).standard_normal(100_001))
    spread = np.exp(0.45 * normal[((np.arange(count) + 0.5) / count * len(normal)).astype(int)])
    factor = MEAN_S
    for _ in range(20):  # clipping moves the mean
        factor *= MEAN_S / np.clip(factor * spread, SHORTEST_S, LONGEST_S).mean()
    return rng.permutation(np.clip(factor * spread, SHORTEST_S, LONGEST_S))


def speech_like(rng: np.random.Generator, sample_count: int) -> np.ndarray:
    """Noise with the long-term spectrum of speech, falling 9 dB an octave above 500 Hz, in syllables of 1/4 s with pauses between."""
    spectrum = np.fft.rfft(rng.standard_normal(sample_count))
    frequency = np.fft.rfftfreq(sample_count, 1 / SAMPLE_RATE)
    noise = np.fft.irfft(spectrum * (1 + frequency / 500) ** -1.5, sample_count)
    syllables = np.maximum(0, np.sin(2 * np.pi * 2 * np.arange(sample_count) / SAMPLE_RATE)) ** 2
    return 0.3 * noise / np.abs(noise).max() * (syllables + 0.01)


def labelled_clips(count: int, *, seed: int = 0) -> Iterator[tuple[AudioClip, str]]:
    """Clips of these durations with as many words as would be spoken."""
    rng = np.random.default_rng(seed)
    for duration_s in durations(count, rng):
        words = rng.choice(WORDS, size=round(duration_s * WORDS_PER_S))
        yield AudioClip(speech_like(rng, int(duration_s * SAMPLE_RATE)).astype(np.float32)), " ".join(words)


def write_speech_corpus(path: Path, *, clips: int, times: int) -> str:
    """Write a corpus of FLAC clips, each of which stands in it `times` times, in row groups of 100; returns its path."""
    rows = [clip_row("made", clip, text) for clip, text in labelled_clips(clips)]
    write_corpus((row | {"ID": f"{time}-{number}"} for time in range(times) for number, row in enumerate(rows)), path)
    return str(path)
