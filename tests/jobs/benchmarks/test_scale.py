"""The benchmark of growth: workers get their own batches in order, their processes are accounted for, and all of it on a tiny graft."""

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
from jobs.benchmarks.scale_split import Stream, measured, pass_through
from jobs.benchmarks.scale_usage import KINDS, cpu_s, peak_mb, usage
from tests.support import tiny_models

BLOCK = {"audio_s": np.array([5.0]), "input_features": np.zeros((1, 2, 8, 100), np.float32)}
WORKERS = 3


def test_what_a_driver_and_its_processes_use_is_told_by_kind() -> None:
    work = "import time; held = bytearray(64 << 20)\nwhile time.process_time() < 0.4: pass\nprint(flush=True); input()"
    before = usage(os.getpid())
    with subprocess.Popen([sys.executable, "-c", work, "ray::SplitCoordinator"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after = usage(os.getpid())
        child.communicate(b"\n")
    assert (after[os.getpid()].kind, after[child.pid].kind) == ("driver", "ray")
    assert cpu_s(before, after)["ray"] >= 0.3
    assert peak_mb(after, "ray") >= 64
    assert peak_mb(after, "loaders") == 0


def test_every_worker_gets_its_own_batches_at_its_own_pace() -> None:
    """Raises RuntimeError where one does not."""
    (passed,) = pass_through([Stream("paced", WORKERS, range(40 * WORKERS), BLOCK, rate=100, is_made=True)])
    assert passed.asked_per_s == pytest.approx(WORKERS * 100 / 5)
    assert 0 < passed.batches_per_s < 1.1 * passed.asked_per_s
    assert 0 <= passed.waited < 1
    assert set(KINDS) <= set(passed.cpu_ms)
    assert passed.batch_mb == pytest.approx(2 * 8 * 100 * 4 / 1e6, rel=0.01)
    assert min(passed.coordinator_mb, passed.driver_mb) > 50


def test_too_short_a_stream_is_refused() -> None:
    taken = [
        [{"at": float(second), "waited": 0.0, "position": second, "audio_s": 5.0, "bytes": 1.0} for second in range(9)]
    ]
    looks = [(second, usage(os.getpid())) for second in (-1.0, 2.5, 4.5, 10.0)]
    stream = Stream("at once", 1, range(9), BLOCK, rate=math.inf)
    assert measured(stream, taken, looks).batches == 2  # between the looks inside
    with pytest.raises(GraftError, match="at once, 1 workers: too short to measure: give more --seconds"):
        measured(stream, taken, [looks[0], looks[3]])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graft, file = tiny_models.save_tiny_graft(tmp_path / "graft"), tmp_path / "scale.json"
    few = ["--consumers", "1", "2", "--workers", "1", "2", "--seconds", "4", "--steps", "24"]
    assert bench(["scale", "--graft", str(graft), *few, "--json", str(file)]) == 0
    numbers, told = json.loads(file.read_text()), capsys.readouterr().out
    assert list(numbers) == ["split", "real", "train"]
    for names in (("light 1", "whole 2", "at once 2"), ("real 1", "real 2"), ("train 1", "train 2")):
        part = numbers[list(numbers)[("light" not in names[0]) + ("train" in names[0])]]
        for name in names:
            assert part[f"{name} batches_per_s"] > 0
            assert part[f"{name} coordinator_cpu_ms"] > 0
    assert numbers["split"]["limit_h200s"] > 1
    assert told.count("extrapolated") == 3
    assert "controller MB" in told
