"""Draws: one number decides all that varies about a sample, alike in any process and for one sample or many."""

import subprocess
import sys

import numpy as np

from graft.data.sample_seeds import generator, sample_seeds, uniform


def test_draws_differ_by_seed_epoch_row_and_occurrence():
    rows = np.arange(1000, dtype=np.int32)
    many = [
        sample_seeds(seed, epoch, rows, np.full(1000, again)) for seed in (0, 1) for epoch in (0, 1) for again in (0, 1)
    ]
    draws = np.concatenate(many)
    assert draws.dtype == np.int64
    assert (draws >= 0).all()
    assert len(np.unique(draws)) == len(draws)


def test_numbers_are_uniform_and_independent_of_each_other():
    draws = sample_seeds(0, 0, np.arange(100_000), np.zeros(100_000, int))
    speed, gain = uniform(draws, "speed"), uniform(draws, "gain")
    for numbers in (speed, gain):
        assert abs(np.histogram(numbers, bins=10, range=(0, 1))[0] / 10_000 - 1).max() < 0.05
    assert abs(np.corrcoef(speed, gain)[0, 1]) < 0.02
    assert abs(np.corrcoef(speed[1:], speed[:-1])[0, 1]) < 0.02


def test_one_sample_in_another_process_gets_what_many_get_here():
    draws = sample_seeds(3, 1, np.arange(5), np.zeros(5, int))
    code = (
        "import sys; from graft.data.sample_seeds import *; draw = int(sys.argv[1]); "
        "print(float(uniform(draw, 'speed')), generator(draw, 'noise').random())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(draws[4])], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [float(number) for number in told] == [uniform(draws, "speed")[4], generator(draws[4], "noise").random()]
