"""Sounds without speech follow from their seed, and have the lengths, loudness and frequencies that they should."""

from collections import Counter

import numpy as np
import pytest

from graft.audio.clip import SAMPLE_RATE
from graft.data import nonspeech
from graft.data.nonspeech import LENGTHS_S, SOUNDS, Sound, generate_sounds


def all_sounds(seed: int = 0) -> list[Sound]:
    return [sound for kind in SOUNDS for sound in generate_sounds(kind, seed)]


@pytest.fixture(scope="module")
def sounds() -> list[Sound]:
    return all_sounds()


def loudness(sound: Sound) -> float:
    """Measure the root mean square in dBFS."""
    return float(10 * np.log10(np.mean(np.square(sound.clip.samples, dtype=np.float64))))


@pytest.mark.seconds
def test_a_few_dozen_sounds_of_each_kind_and_length(sounds: list[Sound]) -> None:
    assert 24 <= len(sounds) == len({sound.name for sound in sounds}) <= 60
    assert Counter(sound.kind for sound in sounds) == {
        kind: len(makers) * len(LENGTHS_S) for kind, makers in SOUNDS.items()
    }
    for kind in SOUNDS:
        lengths = [sound.clip.duration_s for sound in sounds if sound.kind == kind]
        assert min(lengths) >= 2
        assert 0 < sum(length > 30 for length in lengths) < len(lengths)
        assert max(lengths) <= 40


@pytest.mark.seconds
def test_loudness_is_as_named_and_nothing_clips(sounds: list[Sound]) -> None:
    for sound in sounds:
        assert sound.clip.samples.dtype == np.float32
        if "digital" in sound.name:
            assert not sound.clip.samples.any()
            continue
        expected = -60 if sound.kind == "silence" else -40 if "-40dBFS" in sound.name else -20
        assert loudness(sound) == pytest.approx(expected, abs=0.01), sound.name
        assert np.abs(sound.clip.samples).max() < 1, sound.name


def share_below(sound: Sound, hertz: float) -> float:
    power = np.abs(np.fft.rfft(sound.clip.samples)) ** 2
    return float(power[: round(hertz * len(sound.clip.samples) / SAMPLE_RATE)].sum() / power.sum())


@pytest.mark.seconds
def test_sounds_are_where_their_names_say(sounds: list[Sound]) -> None:
    shares = {sound.name: share_below(sound, 1000) for sound in sounds if sound.clip.samples.any()}
    assert shares["noise-white-20dBFS-1"] == pytest.approx(1 / 8, abs=0.02)
    assert 0.5 < shares["noise-pink-20dBFS-1"] < 0.9 < shares["noise-speech-shaped-20dBFS-1"] < 0.99
    assert shares["silence-hum-1"] > 0.999
    assert shares["ringing-trill-1"] < 0.01 < 0.99 < shares["ringing-ringback-1"]
    pauses = {name: np.mean(sound.clip.samples == 0) for sound in sounds if (name := sound.name).startswith("ringing")}
    assert all(0.2 < share < 0.8 for share in pauses.values()), pauses


def test_a_seed_decides_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonspeech, "LENGTHS_S", ((2.0, 3.0),))
    for one, again, other in zip(all_sounds(), all_sounds(), all_sounds(1), strict=True):
        assert np.array_equal(one.clip.samples, again.clip.samples)
        assert one.name == other.name
        assert not np.array_equal(one.clip.samples, other.clip.samples)
