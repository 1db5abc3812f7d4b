"""One seed decides all that varies about a sample, in any process, for one sample or for many."""

import subprocess
import sys

import numpy as np
import pytest

from graft.data.sample_seeds import generator, make_sample_seeds, uniform


def test_seeds_differ_by_seed_epoch_row_and_occurrence():
    rows = np.arange(1000, dtype=np.int32)
    many = [
        make_sample_seeds(seed, epoch, rows, np.full(1000, occurrence))
        for seed in (0, 1)
        for epoch in (0, 1)
        for occurrence in (0, 1)
    ]
    sample_seeds = np.concatenate(many)
    assert sample_seeds.dtype == np.int64
    assert (sample_seeds >= 0).all()
    assert len(np.unique(sample_seeds)) == len(sample_seeds)


def test_numbers_are_uniform_and_independent_of_each_other():
    sample_seeds = make_sample_seeds(0, 0, np.arange(100_000), np.zeros(100_000, int))
    speed, gain = uniform(sample_seeds, "speed"), uniform(sample_seeds, "gain")
    for numbers in (speed, gain):
        assert abs(np.histogram(numbers, bins=10, range=(0, 1))[0] / 10_000 - 1).max() < 0.05
    assert abs(np.corrcoef(speed, gain)[0, 1]) < 0.02
    assert abs(np.corrcoef(speed[1:], speed[:-1])[0, 1]) < 0.02


@pytest.mark.processes
def test_one_sample_in_another_process_gets_what_many_get_here():
    sample_seeds = make_sample_seeds(3, 1, np.arange(5), np.zeros(5, int))
    code = (
        "import sys; from graft.data.sample_seeds import *; sample_seed = int(sys.argv[1]); "
        "print(float(uniform(sample_seed, 'speed')), generator(sample_seed, 'noise').random())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(sample_seeds[4])], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [float(number) for number in printed] == [
        uniform(sample_seeds, "speed")[4],
        generator(sample_seeds[4], "noise").random(),
    ]
