"""Augment training clips, so that no two epochs meet the same clip; every choice follows from a sample's seed.

    clip -> speed -> room -> noise at a signal-to-noise ratio -> band, telephone -> gain
         -> log-mels -> masks over time and frequency

Sources: Ko et al. 2015, Audio augmentation for speech recognition; Polack 1988, whose model of a room's late response
is noise that decays exponentially; ITU-T G.711, telephone speech in 8 bits; Park et al. 2019, SpecAugment. soxr changes
the speed, as it also resamples clips of other rates, because torchaudio is installed on few machines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import soxr

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.features import Features
from graft.data.row_groups import StoredAudio
from graft.data.sample_seeds import generator, uniform
from graft.data.settings import AugmentRecipe, SpecAugmentRecipe
from graft.errors import AudioError, DataError

SLOWED_LIMIT_S = 29.9
"""Longest clip in seconds after slowing down: Whisper takes 30 s, and durations in corpora are rounded."""
NO_SPEECH_S = (0.5, 15.0)
SILENCE_DBFS = -80.0
NOISE_KINDS = ("white", "pink", "speech-shaped")
TELEPHONE_HZ = (300.0, 3400.0)
TELEPHONE_RATE = 8000
DIRECT_S = 0.0025
"""Seconds between the direct sound and the first reflection: a way longer by 0.9 m."""


def sample_speeds(factors: Sequence[float], durations_s: np.ndarray, sample_seeds: np.ndarray) -> np.ndarray:
    """Draw each sample's speed (samples,) from the factors that keep it within SLOWED_LIMIT_S; 1 where none does."""
    choices = np.sort(np.asarray(factors, np.float64))[::-1]  # the fastest first
    slowest = np.clip(durations_s / SLOWED_LIMIT_S, 0, 1)  # (samples,)
    fitting = (choices >= slowest[:, None]).sum(axis=1)  # (samples, factors) -> number of the first ones that fit
    chosen = np.floor(uniform(sample_seeds, "speed") * fitting).astype(int)
    return np.where(fitting > 0, choices[np.minimum(chosen, len(choices) - 1)], 1.0)


def change_speed(clip: AudioClip, factor: float) -> AudioClip:
    """Play a clip `factor` times as fast, which raises its pitch: round(samples / factor) samples."""
    if factor == 1:
        return clip
    count = max(1, round(len(clip.samples) / factor))
    samples = soxr.resample(clip.samples, SAMPLE_RATE * factor, SAMPLE_RATE, quality="HQ")[:count]
    return AudioClip(np.pad(samples, (0, count - len(samples))))


@dataclass(frozen=True, slots=True)
class NoiseClip:
    """A clip of a noise corpus, as it is stored there."""

    id: str
    audio: StoredAudio

    def samples(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw a part of the clip, float32 (count,), which repeats where the clip is shorter.

        Raises DataError naming the clip.
        """
        try:
            noise = self.audio.clip().samples
        except (AudioError, DataError) as error:
            raise DataError(f"noise clip {self.id}: {error}") from error
        start = int(rng.integers(max(1, len(noise) - count + 1)))
        return np.resize(noise[start:], count)


def wants_noise(recipe: AugmentRecipe | None, sample_seeds: np.ndarray) -> np.ndarray:
    """Tell which samples get noise: bool (samples,)."""
    noise = recipe.noise if recipe else None
    return uniform(sample_seeds, "noise share") < (noise.share if noise else 0.0)


class Augmenter:
    """Augments clips and their features by a recipe; equal sample seeds give equal bits."""

    def __init__(self, recipe: AugmentRecipe) -> None:
        self.recipe = recipe

    def clip(
        self, clip: AudioClip, sample_seed: int, *, duration_s: float, noise: NoiseClip | None = None
    ) -> AudioClip:
        """Change a clip; `duration_s` is its length by which the plan drew the speed.

        Noise is made where none is given. Raises DataError for a noise clip that cannot be read.
        """
        speed = float(sample_speeds(self.recipe.speed, np.array([duration_s]), np.array([sample_seed]))[0])
        in_room = self._reverberate(change_speed(clip, speed), sample_seed)
        heard = self._transmit(self._add_noise(in_room, sample_seed, noise), sample_seed)
        return self._amplify(heard, sample_seed)

    def features(self, features: Features, sample_seed: int) -> Features:
        """Mask the log-mels of a clip's own frames, without those of the padding after it."""
        if self.recipe.specaugment is None:
            return features
        mel = features.mel.copy()
        own = mel[:, : features.frame_count]
        own[_mask(own.shape, self.recipe.specaugment, generator(sample_seed, "specaugment"))] = own.mean()
        return replace(features, mel=mel)

    def _reverberate(self, clip: AudioClip, sample_seed: int) -> AudioClip:
        room = self.recipe.room
        if room is None or not uniform(sample_seed, "room share") < room.share:
            return clip
        rng = generator(sample_seed, "room")
        response = room_response(rng.uniform(*room.rt60_s), rng.uniform(*room.direct_db), rng)
        return AudioClip(reverberate(clip.samples, response))

    def _transmit(self, clip: AudioClip, sample_seed: int) -> AudioClip:
        samples, band = clip.samples, self.recipe.band
        if band and uniform(sample_seed, "band share") < band.share:
            samples = limit_band(samples, 0.0, generator(sample_seed, "band").uniform(*band.cutoff_hz))
        if uniform(sample_seed, "telephone share") < self.recipe.telephone:
            samples = telephone(samples, mu_law=bool(uniform(sample_seed, "telephone law") < 0.5))
        return replace(clip, samples=samples)

    def _add_noise(self, clip: AudioClip, sample_seed: int, noise: NoiseClip | None) -> AudioClip:
        if self.recipe.noise is None or not wants_noise(self.recipe, np.array(sample_seed)):
            return clip
        rng = generator(sample_seed, "noise")
        if noise:
            added = noise.samples(len(clip.samples), rng)
        else:
            added = generate_noise(str(rng.choice(NOISE_KINDS)), clip.samples, rng)
        wanted = _power(clip.samples) / 10 ** (rng.uniform(*self.recipe.noise.snr_db) / 10)
        power = _power(added)
        return AudioClip(clip.samples + added * np.float32(np.sqrt(wanted / power))) if power > 0 else clip

    def _amplify(self, clip: AudioClip, sample_seed: int) -> AudioClip:
        if self.recipe.gain_db is None:
            return clip
        lowest, highest = self.recipe.gain_db
        gain = 10 ** ((lowest + (highest - lowest) * float(uniform(sample_seed, "gain"))) / 20)
        peak = float(np.abs(clip.samples).max())
        return AudioClip(clip.samples * np.float32(min(gain, max(1.0, 1 / max(peak, 1e-9)))))


def generate_noise(kind: str, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make noise as long as the samples, float32: `white`, `pink` (power falls with frequency) or `speech-shaped`.

    Speech-shaped noise has the samples' own long-term spectrum and random phases, which sounds like a steady murmur.
    """
    if kind == "white":
        return rng.standard_normal(len(samples), dtype=np.float32)
    length = 1 << (len(samples) - 1).bit_length()  # FFTs of powers of two are ten times as fast as most others.
    spectrum = np.fft.rfft(rng.standard_normal(length, dtype=np.float32))
    shape = np.maximum(np.arange(len(spectrum)), 1) ** -0.5 if kind == "pink" else np.abs(np.fft.rfft(samples, length))
    return np.fft.irfft(spectrum * shape.astype(np.float32), length)[: len(samples)].astype(np.float32)


def room_response(rt60_s: float, direct_db: float, rng: np.random.Generator) -> np.ndarray:
    """Make a room's response, float32 (samples,): the direct sound at once, then noise that falls by 60 dB in `rt60_s`.

    The reverberated sound has `direct_db` less energy than the direct one.
    """
    count = max(1, round(rt60_s * SAMPLE_RATE))
    tail = rng.standard_normal(count) * 10 ** (-3 * np.arange(count) / count)
    tail *= np.sqrt(10 ** (-direct_db / 10) / np.sum(np.square(tail)))
    return np.concatenate([[1.0], np.zeros(round(DIRECT_S * SAMPLE_RATE)), tail]).astype(np.float32)


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve samples with a room's response: as many samples, of the same power, float32."""
    length = 1 << (len(samples) + len(response) - 2).bit_length()
    spectrum = np.fft.rfft(samples, length) * np.fft.rfft(response, length)
    heard = np.fft.irfft(spectrum, length)[: len(samples)]
    return (heard * np.sqrt(_power(samples) / max(_power(heard), 1e-20))).astype(np.float32)


def limit_band(samples: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """Keep the frequencies between two, with slopes of a tenth of each frequency: as many samples, float32."""
    length = 1 << (len(samples) - 1).bit_length()
    hertz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    gain = np.clip((high_hz - hertz) / (0.1 * high_hz) + 1, 0, 1)
    if low_hz:
        gain *= np.clip((hertz - low_hz) / (0.1 * low_hz) + 1, 0, 1)
    return np.fft.irfft(np.fft.rfft(samples, length) * gain, length)[: len(samples)].astype(np.float32)


def telephone(samples: np.ndarray, *, mu_law: bool) -> np.ndarray:
    """Send samples through a telephone line: its band, 8 kHz, 8 bits by G.711's µ-law or A-law; as many, float32."""
    line = soxr.resample(limit_band(samples, *TELEPHONE_HZ), SAMPLE_RATE, TELEPHONE_RATE)
    peak = max(float(np.abs(line).max(initial=0.0)), 1.0)
    coded = _g711(line / peak, mu_law=mu_law) * peak
    heard = soxr.resample(coded.astype(np.float32), TELEPHONE_RATE, SAMPLE_RATE)[: len(samples)]
    return np.pad(heard, (0, len(samples) - len(heard))).astype(np.float32)


def _g711(samples: np.ndarray, *, mu_law: bool) -> np.ndarray:
    """Round samples from -1 to 1 to the 256 levels of G.711's companding curves."""
    size = np.abs(samples)
    if mu_law:
        level = np.round(127 * np.log1p(255 * size) / np.log(256)) / 127
        return np.sign(samples) * np.expm1(level * np.log(256)) / 255
    a, scale = 87.6, 1 + np.log(87.6)
    level = np.where(size < 1 / a, a * size, 1 + np.log(np.maximum(a * size, 1))) / scale
    level = np.round(127 * level) / 127
    decoded = np.where(level < 1 / scale, level * scale / a, np.exp(level * scale - 1) / a)
    return np.sign(samples) * decoded


def no_speech_durations(count: int, seed: int) -> np.ndarray:
    """Draw the durations of `count` samples without speech, in whole mel frames: uniform from 0.5 to 15 s."""
    shortest, longest = NO_SPEECH_S
    return np.round(shortest + (longest - shortest) * uniform(np.arange(count), f"no speech {seed}"), 2)


def no_speech_clip(duration_s: float, sample_seed: int, noise: NoiseClip | None = None) -> AudioClip:
    """Make a clip without speech: digital silence, or noise of -80 to -20 dBFS, the given one if there is one."""
    rng, count = generator(sample_seed, "no speech"), round(duration_s * SAMPLE_RATE)
    silence = np.zeros(count, np.float32)
    if rng.random() < 1 / 4:
        return AudioClip(silence)
    samples = noise.samples(count, rng) if noise else generate_noise(str(rng.choice(NOISE_KINDS[:2])), silence, rng)
    loudness = 10 ** (rng.uniform(SILENCE_DBFS, -20) / 20)
    return AudioClip(samples * np.float32(loudness / max(np.sqrt(_power(samples)), 1e-9)))


def _mask(shape: tuple[int, ...], recipe: SpecAugmentRecipe, rng: np.random.Generator) -> np.ndarray:
    """Draw a mask of features, True where they are masked: bool (mels, frames)."""
    mels, frames = shape
    mask = np.zeros(shape, bool)
    over_time = (mask.T, recipe.time_masks, min(round(recipe.time_s * 100), frames // 5))
    over_frequency = (mask, recipe.freq_masks, min(recipe.freq_bins, mels))
    for rows, count, widest in (over_time, over_frequency):
        for _ in range(count):
            width = int(rng.integers(widest + 1))
            start = int(rng.integers(len(rows) - width + 1))
            rows[start : start + width] = True
    return mask


def _power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))
