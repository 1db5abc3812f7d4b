"""Generate sounds without speech from a seed: any text that a model writes for them is invented."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.data.augmentation import NOISE_KINDS, generate_noise
from graft.data.sample_seeds import generator

LENGTHS_S = ((2.0, 6.0), (8.0, 30.0), (30.5, 40.0))
"""Shortest and longest seconds of a sound, which is made once for each pair; the last is over Whisper's window."""
NOISE_DBFS = (-40.0, -20.0)
TONES_DBFS = -20.0
NEARLY_SILENT_DBFS = -60.0

_ROOTS = (0, 9, 5, 7)
_SCALE = (0, 2, 4, 5, 7, 9, 11)
MELODIES: dict[str, Sequence[Sequence[int]]] = {
    "chords": [(root, root + 4, root + 7, root + 12) for root in _ROOTS],
    "scale": [(step,) for step in (*_SCALE, 12, *reversed(_SCALE))],
    "arpeggio": [(root + step,) for root in _ROOTS for step in (0, 4, 7, 12)],
}
"""Name of a melody -> its chords, in semitones above the key."""
RINGS = {
    "ringback": ((440.0, 480.0), (2.0, 4.0)),
    "double": ((400.0, 450.0), (0.4, 0.2, 0.4, 2.0)),
    "trill": ((1319.0, 1568.0), (*(0.04,) * 23, 1.0)),
}
"""Name of a ringing -> the frequencies in Hz that sound together, and the seconds of sound and of silence in turns."""

Maker = Callable[[int, np.random.Generator], np.ndarray]
"""(count, random generator) -> samples (count,)."""


@dataclass(frozen=True)
class Sound:
    """A clip without speech, its kind and its own name."""

    kind: str
    name: str
    clip: AudioClip
    is_shortest: bool = False
    """Whether it is the shortest of its name."""


def generate_sounds(kind: str, seed: int = 0) -> Iterator[Sound]:
    """Generate the sounds of a kind in SOUNDS, 2 to 40 s long; all kinds together have a few dozen.

    Equal seeds give equal bits.
    """
    for name, make in SOUNDS[kind].items():
        for number, (shortest, longest) in enumerate(LENGTHS_S, start=1):
            rng = generator(seed, f"{kind} {name} {number}")
            samples = make(round(rng.uniform(shortest, longest) * SAMPLE_RATE), rng)
            clip = AudioClip(samples.astype(np.float32))
            yield Sound(kind, f"{kind}-{name}-{number}", clip, is_shortest=number == 1)


def _hum(count: int, rng: np.random.Generator) -> np.ndarray:
    """Make the hum of mains at 50 or 60 Hz, with its harmonics."""
    mains = float(rng.choice([50.0, 60.0]))
    return _scale_to(NEARLY_SILENT_DBFS, _sines([mains * harmonic for harmonic in (1, 2, 3, 5)], count))


def _noise(count: int, rng: np.random.Generator, *, kind: str, dbfs: float) -> np.ndarray:
    # A click has the long-term spectrum of speech: even from 100 to 500 Hz, 9 dB an octave less above, roughly as in
    # Byrne et al. 1994.
    hertz = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    spectrum = np.where(hertz < 100, 0, np.maximum(hertz / 500, 1) ** -1.5)
    click = np.fft.fftshift(np.fft.irfft(spectrum, count))
    return _scale_to(dbfs, generate_noise(kind, click, rng))


def _music(count: int, rng: np.random.Generator, *, melody: Sequence[Sequence[int]]) -> np.ndarray:
    """Repeat a melody in a random key at a random speed."""
    key_hertz, note_s = 110 * 2 ** (rng.integers(12) / 12), rng.uniform(0.2, 0.8)
    chords = [sum(_note(key_hertz * 2 ** (step / 12), note_s) for step in chord) for chord in melody]
    return _scale_to(TONES_DBFS, np.resize(np.concatenate(chords), count))


def _note(hertz: float, seconds: float) -> np.ndarray:
    """Make the sound of a struck string: higher harmonics are weaker and decay sooner."""
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    number = np.arange(1, 7)[:, None]
    harmonics = np.exp(-2 * number * times) * np.sin(2 * np.pi * number * hertz * times) / number  # (6, samples)
    return np.minimum(times / 0.01, 1) * harmonics.sum(axis=0)  # an attack of 10 ms


def _ring(count: int, rng: np.random.Generator, *, hertz: Sequence[float], cadence_s: Sequence[float]) -> np.ndarray:
    counts = [round(seconds * SAMPLE_RATE) for seconds in cadence_s]
    sounding = np.repeat(np.arange(len(counts)) % 2 == 0, counts)  # sound and silence in turns
    return _scale_to(TONES_DBFS, np.resize(sounding, count) * _sines(hertz, count))


def _sines(hertz: Sequence[float], count: int) -> np.ndarray:
    times = np.arange(count) / SAMPLE_RATE
    return np.sin(2 * np.pi * np.asarray(hertz)[:, None] * times).sum(axis=0)  # (frequencies, samples) -> (samples,)


def _scale_to(dbfs: float, samples: np.ndarray) -> np.ndarray:
    """Scale samples to this root mean square."""
    return samples * (10 ** (dbfs / 20) / np.sqrt(np.mean(np.square(samples))))


SOUNDS: dict[str, dict[str, Maker]] = {
    "silence": {
        "digital": lambda count, rng: np.zeros(count),
        "hum": _hum,
        "hiss": partial(_noise, kind="white", dbfs=NEARLY_SILENT_DBFS),
    },
    "noise": {
        f"{kind}{dbfs:.0f}dBFS": partial(_noise, kind=kind, dbfs=dbfs) for kind in NOISE_KINDS for dbfs in NOISE_DBFS
    },
    "tones": {name: partial(_music, melody=melody) for name, melody in MELODIES.items()},
    "ringing": {name: partial(_ring, hertz=hertz, cadence_s=cadence_s) for name, (hertz, cadence_s) in RINGS.items()},
}
"""Kind -> name of a sound -> function that makes samples of it."""
