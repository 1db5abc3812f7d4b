"""Test predictions while they are written: nothing is lost or doubled by a kill, and time is divided fairly."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import DataError
from jobs.evaluation.predict import PREDICTIONS_FILE, PredictionFile, divide_time, speeds
from jobs.evaluation.predictions import Prediction
from tests.support import tiny_models
from tests.support.faults import DEADLINE_S
from tests.support.jobs import left_by_evaluate
from tests.support.paths import ROOT
from tests.support.speech_corpus import BROKEN, corpus, row, save_tiny_whisper

LINES = [Prediction(f"clip {number}", "test", "graft", "a b", "a\u2028b", 1.5) for number in range(3)]
KILLS, CLIPS = 10, 400
TIMES = ("seconds", "started_at", "transcription_s", "mean_logprob")
"""Keys that differ between runs: times, and numbers that depend on the batch by rounding."""


def test_a_torn_line_is_removed_and_what_is_whole_is_kept(tmp_path: Path) -> None:
    path = tmp_path / PREDICTIONS_FILE
    file = PredictionFile(path)
    file.append(LINES[:2])
    whole = path.read_bytes()
    with path.open("ab") as torn:
        torn.write(json.dumps(LINES[2].to_json()).encode()[:-5])
    again = PredictionFile(path)
    assert path.read_bytes() == whole
    assert list(again.predictions.values()) == LINES[:2]
    again.append(LINES[2:])
    assert list(PredictionFile(path).predictions.values()) == LINES


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / PREDICTIONS_FILE
    path.write_text('{"id": "a", "hypothesis": 3}\n')
    with pytest.raises(DataError, match="line 1 is no prediction"):
        PredictionFile(path)
    assert path.read_text() == '{"id": "a", "hypothesis": 3}\n'


def test_clips_that_run_at_a_time_share_it() -> None:
    assert divide_time([]) == []
    assert divide_time([(100, 4)]) == [4]
    assert divide_time([(100, 4), (102, 4)]) == [3, 3]  # two seconds alone, one of the two that they share
    assert divide_time([(100, 1), (200, 1)]) == [1, 1]  # a pause, as after a kill, is nobody's
    assert divide_time([(100, 3), (101, 1)]) == [2.5, 0.5]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=12))
def test_shares_add_up_to_the_time_in_which_anything_ran(spans: list[tuple[int, int]]) -> None:
    shares = divide_time(spans)
    running = {second for start, length in spans for second in range(start, start + length)}
    assert sum(shares) == pytest.approx(len(running))
    assert all(0 < share <= length + 1e-9 for share, (_, length) in zip(shares, spans, strict=True))


def test_a_clip_that_two_sets_share_counts_once_in_the_speed() -> None:
    def line(name: str, set_name: str, started_at: float) -> Prediction:
        return Prediction(name, set_name, "graft", "a", "a", 6.0, seconds=2.0, more={"started_at": started_at})

    assert speeds([line("a", "test", 1.0), line("b", "test", 3.0), line("b", "swapped", 1.0)]) == {"graft": 3.0}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_ten_kills_lose_no_prediction(tmp_path: Path) -> None:
    graft, whisper = tiny_models.save_tiny_graft(tmp_path / "graft"), save_tiny_whisper(tmp_path / "whisper")
    rows = [row(f"t{seed}", seed) for seed in range(CLIPS)]
    rows.insert(CLIPS // 2, row("broken", 1, **BROKEN))
    data = corpus(tmp_path / "test.parquet", rows)

    def start(name: str) -> subprocess.Popen[bytes]:
        settings = [f"model={graft}", f"baseline={whisper}", f"data.test={data}", "windows=true", "batch_clips=2"]
        command = [sys.executable, "-m", "jobs.evaluate", *settings, "checks=5", f"out={tmp_path / name}"]
        with (tmp_path / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def finish(name: str) -> list[dict]:
        assert start(name).wait(DEADLINE_S * 2) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
        left_by_evaluate(tmp_path / name)
        lines = map(json.loads, (tmp_path / name / PREDICTIONS_FILE).read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]

    undisturbed = finish("undisturbed")
    assert len(undisturbed) == 2 * (CLIPS + 1)
    path, chance = tmp_path / "killed" / PREDICTIONS_FILE, random.Random(7)
    before: list[str] = []

    def lines() -> list[str]:
        return path.read_text().split("\n")[:-1] if path.is_file() else []  # the last may be torn

    for number in range(KILLS):
        run = start("killed")
        # Some are killed as they start, the others when they have written some more.
        enough = len(before) + chance.randint(1, 2 * CLIPS // KILLS)
        deadline = time.monotonic() + (chance.uniform(1, 20) if number % 3 == 0 else DEADLINE_S)
        while time.monotonic() < deadline and len(lines()) < enough and run.poll() is None:
            time.sleep(0.05)
        assert run.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        run.kill()
        run.wait()
        assert lines()[: len(before)] == before
        before = lines()
    assert len(before) > CLIPS // 2
    assert finish("killed") == undisturbed
