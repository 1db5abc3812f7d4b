"""Test the description of test sets."""

import pytest

from jobs.evaluation.data_statistics import describe_sets
from jobs.evaluation.predictions import Prediction


def test_each_clip_counts_once_and_a_cut_loses_its_share_of_the_words() -> None:
    predictions = [
        Prediction(name, "dev", system, " ".join(["word"] * words), "x", seconds)
        for system in ("graft", "whisper")
        for name, words, seconds in (("a", 20, 10.0), ("b", 120, 60.0), ("silent", 0, 5.0))
    ]
    found = describe_sets([*predictions, Prediction("c", "other", "graft", "a b", "a b", 2.0)])
    assert found.keys() == {"dev", "other"}
    dev = found["dev"]
    assert (dev["clips"], dev["words"], dev["hours"]) == (2, 140, pytest.approx(70 / 3600))
    assert dev["cut"] == {
        "limit_s": 30.0,
        "clips": 1,
        "seconds": 30.0,
        "words": 60.0,
        "word_share": pytest.approx(60 / 140),
    }
    assert dev["words_per_s"] == 2.0
    assert sum(dev["histogram"]["clips"]) == 2
    assert dev["duration_s"]["0"] == 10.0
    assert found["other"]["cut"]["word_share"] == 0
