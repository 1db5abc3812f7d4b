"""windows: every sample once, in order, none too long, cut where it is quiet."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.audio import SAMPLE_RATE, AudioClip
from graft.chunking import windows
from graft.features import Featurizer


def noise(seconds: float, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(seconds=st.floats(0.001, 40), max_s=st.floats(1, 12), seed=st.integers(0, 5))
def test_every_sample_is_in_exactly_one_window_and_none_is_too_long(seconds: float, max_s: float, seed: int) -> None:
    samples = noise(seconds, seed=seed)
    chunks = windows(AudioClip(samples), max_s=max_s)
    np.testing.assert_array_equal(np.concatenate([chunk.clip.samples for chunk in chunks]), samples)
    starts = np.cumsum([0] + [len(chunk.clip.samples) for chunk in chunks[:-1]])
    np.testing.assert_array_equal([chunk.start_s for chunk in chunks], starts / SAMPLE_RATE)
    for chunk in chunks:
        assert 0 < chunk.clip.duration_s <= max_s
    for chunk in chunks[:-1]:
        assert chunk.clip.duration_s >= max_s - min(5, max_s / 2) - 1e-3


def test_what_fits_is_left_whole() -> None:
    for seconds in (0.01, 29.9, 30):
        clip = AudioClip(noise(seconds))
        (chunk,) = windows(clip)
        assert chunk.start_s == 0
        assert chunk.clip.samples.base is clip.samples
        assert chunk.clip.duration_s == clip.duration_s


def test_one_sample_more_is_two_windows_that_the_featurizer_takes() -> None:
    chunks = windows(AudioClip(noise(30 + 1 / SAMPLE_RATE)))
    assert len(chunks) == 2
    assert all(chunk.clip.duration_s > 0.09 for chunk in chunks)
    assert sum(Featurizer()(chunk.clip).mel.shape[1] for chunk in chunks) >= 3000


@pytest.mark.parametrize("pause_s", [25.0, 26.3, 28.77, 29.8])
def test_the_cut_is_in_the_middle_of_the_pause(pause_s: float) -> None:
    samples = noise(40)
    samples[round(pause_s * SAMPLE_RATE) : round((pause_s + 0.2) * SAMPLE_RATE)] *= 0.01
    first, second = windows(AudioClip(samples))
    assert first.clip.duration_s == pytest.approx(pause_s + 0.1, abs=0.001)
    assert second.start_s == first.clip.duration_s


def test_a_quieter_pause_wins_and_one_outside_the_last_5_s_is_not_seen() -> None:
    samples = noise(40)
    for pause_s, level in [(20.0, 0.0), (26.0, 0.1), (28.0, 0.2)]:
        samples[round(pause_s * SAMPLE_RATE) : round((pause_s + 0.2) * SAMPLE_RATE)] *= level
    first, _ = windows(AudioClip(samples))
    assert first.clip.duration_s == pytest.approx(26.1, abs=0.001)


def test_digital_silence_gives_the_fewest_windows() -> None:
    chunks = windows(AudioClip(np.zeros(60 * SAMPLE_RATE, np.float32)))
    assert [round(chunk.start_s, 2) for chunk in chunks] == [0, 29.9, 59.8]


@pytest.mark.parametrize("max_s", [0.0, -1.0, 0.99, float("nan")])
def test_a_window_under_a_second_is_refused(max_s: float) -> None:
    with pytest.raises(ValueError, match="at least 1 s"):
        windows(AudioClip(noise(3)), max_s=max_s)
