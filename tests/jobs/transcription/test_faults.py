"""Test that bulk transcription survives kills: each recording is transcribed once, as in an undisturbed run."""

import contextlib
import itertools
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.support import media, tiny_models
from tests.support.faults import DEADLINE_S, Machines, machines, processes
from tests.support.paths import ROOT

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow, pytest.mark.ray]

RECORDINGS, KILLS = 1200, 20  # fewer are through before they are disturbed
COMING_S = 120
"""Longest wait for a process of a kind: on a busy machine a run starts for a minute."""
ROUNDED = {"read_s", "heard_s", "confidence", "logprobs"}
"""Columns that differ between runs: times, and numbers that depend on the batch by rounding."""


class Archive:
    """Short recordings, one of them broken, and the runs that transcribe them."""

    def __init__(self, home: Path, count: int = RECORDINGS) -> None:
        self.home = home
        self.graft = tiny_models.save_tiny_graft(home / "graft")
        (home / "calls").mkdir()
        for number, path in zip(
            range(count), itertools.cycle(sorted(media.PROMPTS, key=lambda one: one.stat().st_size)[20:60])
        ):
            shutil.copy(path, home / "calls" / f"{number:04}.flac")
        (home / "calls" / f"{count // 3:04}.flac").write_bytes(b"no audio")

    def start(self, out: str) -> subprocess.Popen[bytes]:
        settings = ["items_per_batch=3", "formats=[txt]", "chunks.padding_s=0.1"]
        command = [
            sys.executable,
            "-m",
            "jobs.transcribe",
            f"model={self.graft}",
            f"audio={self.home / 'calls'}",
            f"out={self.home / out}",
        ]
        with (self.home / f"{out}.log").open("ab") as log:
            return subprocess.Popen([*command, *settings], cwd=ROOT, stdout=log, stderr=log)

    def finish(self, run: subprocess.Popen[bytes], out: str) -> None:
        assert run.wait(DEADLINE_S * 2) == 0, (self.home / f"{out}.log").read_text()[-3000:]

    def written(self, out: str) -> int:
        """Count the recordings whose results are complete on disk."""
        marks = (self.home / out / "work" / "done").glob("*.parquet")
        return 3 * sum(".pending" not in mark.name for mark in marks)

    def rows(self, out: str) -> list[dict]:
        parts = sorted((self.home / out / "recordings").glob("*.parquet"))
        return [row for part in parts for row in pq.read_table(part, partitioning=None).to_pylist()]


def kill(title: str, run: subprocess.Popen[bytes]) -> bool:
    """Kill one process with a title as soon as there is one; returns whether one came within COMING_S seconds."""
    deadline = time.monotonic() + COMING_S
    while time.monotonic() < deadline and run.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            random.choice(processes(title)).kill()
            return True
        time.sleep(0.1)
    return False


def kill_node(ray_cluster: Machines) -> bool:
    ray_cluster.kill(random.choice(ray_cluster.nodes))
    ray_cluster.add()
    return True


def test_twenty_kills_cost_time_and_nothing_else(tmp_path):
    archive = Archive(tmp_path)
    with machines(2) as cluster:
        run = archive.start("undisturbed")
        archive.finish(run, "undisturbed")

        random.seed(0)
        run = archive.start("disturbed")

        def kill_driver() -> bool:
            nonlocal run
            run.kill()
            run.wait()
            run = archive.start("disturbed")
            return True

        acts: dict[str, Callable[[], bool]] = {
            "driver": kill_driver,
            "transcriber": lambda: kill("ItemTranscriber", run),
            "reader": lambda: kill("ItemReader", run),
            "node": lambda: kill_node(cluster),
        }
        done: Counter[str] = Counter()
        while done.total() < KILLS:
            enough = done.total() * (RECORDINGS // (KILLS + 10))
            wait_for(lambda enough=enough: archive.written("disturbed") > enough, run)
            time.sleep(random.uniform(0, 1))
            # The kind that was killed least comes first; where readers are through already, the next kind does.
            done[next(kind for kind in sorted(acts, key=lambda kind: done[kind]) if acts[kind]())] += 1
        archive.finish(run, "disturbed")
    assert min(done[kind] for kind in acts) >= 2, done

    expected, rows = archive.rows("undisturbed"), archive.rows("disturbed")
    assert [row["id"] for row in rows] == [f"{number:04}.flac" for number in range(RECORDINGS)]
    assert [row["id"] for row in rows if row["error"]] == ["0400.flac"]
    for row, wanted in zip(rows, expected, strict=True):
        for one in [row, wanted]:
            one["logprobs"] = [segment.pop("mean_logprob") for segment in one["segments"]]
        assert {name: value for name, value in row.items() if name not in ROUNDED} == {
            name: value for name, value in wanted.items() if name not in ROUNDED
        }
        assert row["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-5)
    texts = {
        name: sorted(path.read_bytes() for path in (tmp_path / name / "files").iterdir())
        for name in ("disturbed", "undisturbed")
    }
    assert texts["disturbed"] == texts["undisturbed"]
    items = [
        row
        for path in (tmp_path / "disturbed" / "work" / "items").iterdir()
        for row in pq.read_table(path, columns=["id"]).to_pylist()
    ]
    assert len({row["id"] for row in items}) == len(items) == RECORDINGS


def test_a_machine_of_two_cpus_has_room_for_rays_own_tasks(tmp_path):
    archive = Archive(tmp_path, count=45)
    with machines(1):
        run = archive.start("out")
        wait_for(lambda: archive.written("out") > 5, run)
        run.kill()
        run.wait()
        archive.finish(archive.start("out"), "out")  # with results to leave out
    rows = archive.rows("out")
    assert [row["id"] for row in rows] == [f"{number:04}.flac" for number in range(45)]
    assert [row["id"] for row in rows if row["error"]] == ["0015.flac"]


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        assert run.poll() is None, f"the run ended with {run.returncode} before it was disturbed enough"
        time.sleep(0.05)
