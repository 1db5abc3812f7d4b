"""Test jobs.transcribe on disks that are full, read-only or gone: one line says so, and the same command goes on."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.transcription.assembly import whole_files
from tests.support import media, tiny_models
from tests.support.faults import until
from tests.support.jobs import transcribe
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_started")]
RECORDINGS = 40


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("disks")
    (home / "calls").mkdir()
    for number in range(RECORDINGS):
        shutil.copy(media.SHORTEST_FIRST[number % 8], home / "calls" / f"{number:02}.flac")
    model = tiny_models.save_tiny_graft(home / "graft")
    settings = ["items_per_batch=1", "formats=[txt, srt, json]", "chunks.padding_s=0.1"]
    return [f"model={model}", f"audio={home / 'calls'}", *settings]


def texts(out: Path) -> dict[str, str]:
    parts = [pq.read_table(part, partitioning=None).to_pylist() for part in (out / "recordings").glob("*.parquet")]
    rows = {row["id"]: row["text"] for part in parts for row in part}
    files = {path.name: path.read_text() for path in (out / "files").iterdir() if path.suffix != ".json"}
    whole = {path.name: json.loads(path.read_text())["text"] for path in (out / "files").glob("*.json")}
    assert len(rows) == RECORDINGS
    return rows | files | whole


@pytest.fixture(scope="module")
def expected(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert transcribe(*arguments, f"out={out}") == 0
    return texts(out)


@pytest.mark.parametrize(
    ("options", "after"),
    [("size=300k", "size=64m"), ("size=700k", "size=64m"), ("nr_inodes=60", "nr_inodes=9000")],
    ids=["of results", "of transcripts", "of inodes"],
)
def test_a_full_disk_is_one_line_and_loses_nothing(
    arguments: list[str],
    expected: dict[str, str],
    mount: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    options: str,
    after: str,
) -> None:
    out = mount(options) / "out"
    capsys.readouterr()
    assert transcribe(*arguments, f"out={out}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = (
        rf"graft: error: the disk of {out} is full \(No space left on device\): (\d+) of {RECORDINGS} work items are "
    )
    said += rf"kept in {out}; mend that, then the same command goes on from there"
    assert (found := re.fullmatch(said, line)), line
    assert 0 < int(found[1]) <= RECORDINGS
    kept = set(whole_files(out / "work"))
    for path in (out / "files").glob("[!.]*"):
        if path.suffix != ".json":
            assert path.read_text() == expected[path.name]
    mount(f"remount,{after}")
    assert transcribe(*arguments, f"out={out}") == 0
    assert kept <= set(whole_files(out / "work"))
    assert texts(out) == expected
    assert not [path for path in out.rglob(".*")]


def test_a_disk_that_is_read_only_or_gone_is_one_line(
    arguments: list[str],
    expected: dict[str, str],
    mount: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = mount("size=64m")
    out = disk / "out"
    mount("remount,ro")
    capsys.readouterr()
    assert transcribe(*arguments, f"out={out}") == 2
    assert capsys.readouterr().err == (
        f"graft: error: output {out} cannot be written: Read-only file system: choose another out=\n"
    )
    mount("remount,rw")

    # A process that no longer reaches its lock ends.
    command = [sys.executable, "-m", "jobs", "transcribe", *arguments, f"out={out}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        until(lambda: len(whole_files(out / "work")) > 3)
        subprocess.run(["umount", "-l", str(disk)], check=True)
        _, errors = run.communicate(timeout=200)
    assert run.returncode == 2
    assert re.match(rf"graft: error: (output )?{out} (is no longer this run's|cannot be written)", errors), errors
    assert errors.count("\n") == 1
