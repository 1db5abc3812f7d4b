"""The benchmark of growth: workers get their own batches in order, and their processes are accounted for."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graft.errors import GraftError
from jobs.bench import main as bench
from jobs.benchmarks.measuring import DRIVER, Watched, cpu_s, look_at, watch
from jobs.benchmarks.scale import KINDS, measured, pass_through
from tests.support import tiny_models

BLOCK = {"audio_s": np.array([5.0]), "input_features": np.zeros((1, 2, 8, 100), np.float32)}
WORKERS = 3


def test_the_time_and_memory_of_processes_are_told_by_kind() -> None:
    work = "import time; held = bytearray(64 << 20)\nwhile time.process_time() < 0.4: pass\nprint(flush=True); input()"
    before = look_at(os.getpid())
    with subprocess.Popen([sys.executable, "-c", work, "ray::SplitCoordinator"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after = look_at(os.getpid())
        child.communicate(b"\n")
    assert after[os.getpid()].title == DRIVER
    assert "SplitCoordinator" in after[child.pid].title
    assert cpu_s(before, after, "SplitCoordinator") >= 0.3
    seen = Watched(None, [(0.0, before), (1.0, after)])
    assert seen.peak_mb("SplitCoordinator") >= 64
    assert seen.peak_mb("LoadBatches") == 0


@pytest.mark.usefixtures("ray_started")
@pytest.mark.slow
def test_every_worker_gets_its_own_batches_at_its_own_pace() -> None:
    """The stream raises RuntimeError where a worker gets others' batches."""
    passed = measured(watch(pass_through, WORKERS, range(40 * WORKERS), BLOCK, 100.0))
    assert 0 < passed["batches/s"] < 1.1 * WORKERS * 100 / 5
    assert passed["audio s/batch"] == 5
    assert 0 <= passed["wait %"] < 100
    assert {f"{kind} ms" for kind in KINDS} < set(passed)
    assert passed["loaders ms"] > 0
    assert min(passed["coordinator MB"], passed["driver MB"]) > 50


def test_too_short_a_stream_is_refused() -> None:
    # a batch each second: when it came, how long it was waited for, its position, its seconds of audio
    taken = [np.array([(float(second), 0.0, second, 5.0) for second in range(9)])]
    looks = [(second, look_at(os.getpid())) for second in (-1.0, 2.5, 4.5, 10.0)]
    assert measured(Watched(taken, looks))["batches/s"] == 1  # those between the looks inside
    with pytest.raises(GraftError, match="1 workers: too few batches to measure: give more --seconds"):
        measured(Watched(taken, [looks[0], looks[3]]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_are_printed_and_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graft, file = tiny_models.save_tiny_graft(tmp_path / "graft"), tmp_path / "scale.json"
    few = ["--consumers", "1", "2", "--workers", "1", "2", "--seconds", "4"]
    assert bench(["scale", "--model", str(graft), *few, "--json", str(file)]) == 0
    numbers, printed = json.loads(file.read_text()), capfd.readouterr().out
    assert list(numbers) == ["split", "ingest", "workers"]
    for count in (1, 2):
        assert numbers["split"][f"split {count} batches/s"] > 0
        assert numbers["split"][f"split {count} coordinator ms"] > 0
    assert numbers["split"]["extrapolated_h200s"] > 1
    assert 0 < numbers["ingest"]["extrapolated_cores_per_h200"] < math.inf
    assert numbers["ingest"]["loaders_ms_per_audio_s"] > 0
    assert all(numbers["workers"][f"workers {count} {name}"] > 0 for count in (1, 2) for name in ("x", "driver MB"))
    assert printed.count("extrapolated") == 4
    assert "controller MB" in printed
