"""Windows and chunks hold every sample, or every sample of speech, once and in order, and are cut where it is quiet."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from graft.audio.chunking import ChunkSettings, chunk_bounds, speech_chunks, windows
from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.features import Featurizer
from graft.audio.vad import FRAME, Speech


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


def spans_at(*seconds: tuple[float, float]) -> list[tuple[int, int]]:
    return [(round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)) for start, end in seconds]


def bounds(
    spans: list[tuple[int, int]], *, seconds: float = 120, scores: np.ndarray | None = None, **changed: float
) -> list[tuple[float, float]]:
    """Return the chunks' bounds in seconds."""
    count = round(seconds * SAMPLE_RATE)
    scores = np.ones(-(-count // FRAME)) if scores is None else scores
    return [
        (start / SAMPLE_RATE, end / SAMPLE_RATE)
        for start, end in chunk_bounds(spans, scores, count, ChunkSettings(**changed))
    ]


@st.composite
def spoken(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int]:
    """Generate spans of speech of any lengths, the number of samples of the clip, and a seed for its scores."""
    lengths = st.integers(1, 20_000) | st.integers(1, 900_000)
    places = np.cumsum(draw(st.lists(st.tuples(lengths, lengths), max_size=20)), dtype=int).tolist()
    spans = list(zip(places[::2], places[1::2], strict=True))
    return spans, (spans[-1][1] if spans else 0) + draw(st.integers(0, 50_000)), draw(st.integers(0, 3))


@settings(max_examples=200, deadline=None)
@given(spoken(), st.floats(2, 30), st.floats(0, 0.5), st.floats(0, 5))
def test_chunks_hold_all_speech_once_in_order_and_none_is_too_long(
    clip: tuple[list[tuple[int, int]], int, int], max_s: float, padding_s: float, max_pause_s: float
) -> None:
    spans, sample_count, seed = clip
    scores = np.random.default_rng(seed).random(-(-sample_count // FRAME))
    chosen = ChunkSettings(max_s=max_s, padding_s=padding_s, max_pause_s=max_pause_s)
    chunks = chunk_bounds(spans, scores, sample_count, chosen)
    assert chunks == chunk_bounds(spans, scores, sample_count, chosen)
    flat = [place for chunk in chunks for place in chunk]
    assert flat == sorted(flat)
    assert all(isinstance(place, int) and 0 <= place <= sample_count for place in flat)
    held = sum(max(0, min(end, stop) - max(begin, start)) for begin, end in spans for start, stop in chunks)
    assert held == sum(end - begin for begin, end in spans)
    for start, stop in chunks:
        assert 0 < stop - start <= max_s * SAMPLE_RATE
    for (_, end), (begin, _) in pairwise(spans):
        if begin - end > max_pause_s * SAMPLE_RATE:
            assert not any(start < end and begin < stop for start, stop in chunks)


def test_short_pauses_stay_inside_and_long_ones_are_skipped() -> None:
    spans = spans_at((5, 8), (9, 12), (13.9, 14), (17, 20))
    assert bounds(spans, padding_s=0.1) == [(4.9, 14.1), (16.9, 20.1)]
    assert bounds(spans, padding_s=0.1, max_pause_s=0.5) == [(4.9, 8.1), (8.9, 12.1), (13.8, 14.1), (16.9, 20.1)]


def test_padding_ends_at_the_clip_and_in_the_middle_of_a_short_pause() -> None:
    spans = spans_at((0.1, 8), (8.2, 9.9))
    assert bounds(spans, seconds=10, padding_s=0.5, max_pause_s=0) == [(0, 8.1), (8.1, 10)]
    assert bounds(spans, seconds=10, padding_s=0, max_pause_s=0) == [(0.1, 8), (8.2, 9.9)]


def test_speech_for_two_chunks_is_cut_at_the_longest_pause_of_the_second_half() -> None:
    spans = spans_at((0, 10), (11.5, 16), (17, 20), (20.3, 27), (27.4, 40))
    assert bounds(spans, padding_s=0.1) == [(0, 16.1), (16.9, 40.1)]


def test_speech_without_a_pause_is_cut_where_it_is_least_like_speech() -> None:
    scores = np.ones(2000)
    dip = round(21.3 * SAMPLE_RATE / FRAME)
    scores[dip - 3 : dip + 3] = 0.8
    scores[300:306] = 0.6  # 9.7 s: too early
    (first, cut), (again, last) = bounds(spans_at((0, 40)), scores=scores)
    assert cut == again == dip * FRAME / SAMPLE_RATE
    assert (first, last) == (0, 40.15)


def test_chunks_are_views_of_the_clip_and_none_without_speech() -> None:
    clip = AudioClip(noise(10))
    (chunk,) = speech_chunks(clip, Speech(((48_001, 80_001),), np.ones(313), "silero"))
    assert chunk.start_s == (48_001 - 2400) / SAMPLE_RATE
    np.testing.assert_array_equal(chunk.clip.samples, clip.samples[45_601:82_401])
    assert np.shares_memory(chunk.clip.samples, clip.samples)
    assert speech_chunks(clip, Speech((), np.zeros(313), "silero")) == []


@pytest.mark.parametrize("wrong", [{"max_s": 30.1}, {"max_s": 1.0}, {"padding_s": 1.0}, {"max_pause_s": -1.0}])
def test_settings_that_the_model_cannot_hear_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ChunkSettings(**wrong)
