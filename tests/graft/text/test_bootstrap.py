"""Resamples draw clips or speakers with replacement; the interval of a difference is that of paired draws."""

import numpy as np
import pytest

from graft.errors import DataError
from graft.text.bootstrap import Difference, interval, rate_of, resample_sums


def rates(errors, words, **settings):
    sums = resample_sums(np.stack([errors, words], axis=1), **settings)
    return rate_of(sums[:, 0], sums[:, 1])


def test_the_interval_agrees_with_the_normal_approximation():
    # Each of 1,000 clips of 10 words is all wrong or all right: the rate's standard error is sqrt(p (1 - p) / clips).
    clips, p = 1000, 0.2
    errors, words = np.repeat([10, 0], [200, 800]), np.full(clips, 10)
    samples = rates(errors, words, resamples=4000)
    half = 1.96 * np.sqrt(p * (1 - p) / clips)
    assert interval(samples) == pytest.approx((p - half, p + half), abs=0.1 * half)
    low, high = interval(samples, level=0.5)
    assert (high - low) / 2 == pytest.approx(0.6745 / 1.96 * half, rel=0.1)


def test_speakers_are_drawn_whole():
    # 20 speakers of 50 clips, of which each is all wrong or all right: speakers are what varies, not clips.
    errors, words = np.repeat([1, 0] * 10, 50), np.ones(1000)
    speakers = np.repeat(np.arange(20), 50)
    by_speaker = interval(rates(errors, words, units=speakers, resamples=4000))
    half = 1.96 * np.sqrt(0.25 / 20)
    assert by_speaker == pytest.approx((0.5 - half, 0.5 + half), abs=0.15 * half)
    by_clip = interval(rates(errors, words))
    assert by_clip[1] - by_clip[0] < 0.3 * (by_speaker[1] - by_speaker[0])
    assert (rates(errors, words, units=np.arange(1000)) == rates(errors, words)).all()


def test_resamples_are_seeded_and_weigh_clips_by_their_words():
    errors, words = np.arange(60) % 7, 50 + np.arange(60)
    assert (rates(errors, words, seed=3) == rates(errors, words, seed=3)).all()
    assert (rates(errors, words, seed=3) != rates(errors, words, seed=4)).any()
    assert (rates(errors, words, seed=(3, 0)) != rates(errors, words, seed=(3, 1))).any()
    low, high = interval(rates(np.ones(40), np.tile([100, 1], 20)))
    assert low < 40 / 2020 < high < 0.05  # the mean of the clips' rates would be 0.505
    assert interval(rates([0], [3])) == (0, 0)
    assert interval(rates([1], [0])) == (1, 1)
    with pytest.raises(DataError, match="no clips"):
        resample_sums(np.zeros((0, 2)))


def test_many_clips_take_the_same_draws_in_blocks():
    errors, words = np.arange(5000) % 3, np.full(5000, 5)  # 10 million draws are three blocks.
    samples = rates(errors, words)
    assert samples.shape == (2000,)
    assert (samples[:1000] != samples[1000:]).mean() > 0.9
    low, high = interval(samples)
    assert low < errors.sum() / words.sum() < high < low + 0.01


def test_paired_draws_show_a_difference_that_separate_intervals_do_not():
    random = np.random.default_rng(0)
    words = random.integers(1, 30, 400)
    hard = random.integers(0, 2, 400)  # what makes a clip hard for both systems
    first = hard * words // 2
    second = first + (random.random(400) < 0.2)
    table = np.stack([first, second, words], axis=1)
    sums = resample_sums(table)
    one, other = rate_of(sums[:, 0], sums[:, 2]), rate_of(sums[:, 1], sums[:, 2])
    assert interval(one)[1] > interval(other)[0]
    found = Difference(first.sum() / words.sum() - second.sum() / words.sum(), *interval(one - other), 400)
    assert found.is_shown
    assert found.low < found.difference < found.high < 0


def test_verdicts_are_in_words():
    assert Difference(-0.019, -0.033, -0.004, 50).verdict("graft", "whisper") == (
        "graft is better than whisper by 1.9 points [0.4, 3.3]"
    )
    assert Difference(0.019, 0.004, 0.033, 50).verdict("graft", "whisper") == (
        "whisper is better than graft by 1.9 points [0.4, 3.3]"
    )
    assert Difference(-0.002, -0.009, 0.005, 50).verdict("graft", "whisper") == (
        "no difference shown between graft and whisper: -0.2 points [-0.9, +0.5]"
    )
    assert not Difference(0.0, 0.0, 0.0, 50).is_shown
    few = Difference(-0.019, -0.033, -0.004, 5)
    assert (
        few.verdict("a", "b")
        == "no difference shown between a and b: -1.9 points [-3.3, -0.4], from only 5 speakers or clips"
    )
