"""Test that every command has its output folder to itself, and that runs which overlap or are killed cost nothing."""

import importlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from graft.config import read_recipe
from graft.errors import OutputError
from jobs.common.outputs import locked_output, staged_output
from jobs.schema import recipe_class
from tests.support import media, tiny_models
from tests.support.paths import ROOT

COMMANDS = {
    "prepare": ["sources=[none.jsonl]"],
    "build": [],
    "label": ["data=none"],
    "format": ["data=none"],
    "stage1": ["model=none", "data=none"],
    "stage2": ["model=none", "data=none", "projector=none"],
    "transcribe": ["model=none", "audio=none"],
    "ablate": ["data=none", "evaluate={a: none}"],
    "demo": [],
}
"""Commands that come to their output before their input, with arguments. The others use `staged_output`, too."""


@pytest.mark.seconds
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_in_use_is_refused_by_every_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(recipe_class(command), None, [*COMMANDS[command], "out=out"])
    other = staged_output("out", recipe) if command in ("prepare", "build") else locked_output("out")
    with other, pytest.raises(OutputError, match=r"^output out is in use by another run \(pid .* which is alive: let "):
        importlib.import_module(f"jobs.{command}").run(recipe)
    assert not list(tmp_path.glob("**/.*lock*"))


@pytest.mark.slow
@pytest.mark.processes
def test_overlapping_runs_transcribe_every_recording_once_and_a_killed_one_is_followed_at_once(tmp_path):
    graft = tiny_models.save_tiny_graft(tmp_path / "graft")
    (tmp_path / "calls").mkdir()
    for number, path in enumerate(sorted(media.PROMPTS)[:40]):
        (tmp_path / "calls" / f"{number:02}.flac").write_bytes(path.read_bytes())
    out = tmp_path / "out"
    settings = ["items_per_batch=1", "formats=[txt]", f"audio={tmp_path / 'calls'}", f"out={out}", f"model={graft}"]
    command = [sys.executable, "-m", "jobs.transcribe", *settings]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    first = start()
    deadline = time.monotonic() + 120
    while not list(out.glob("work/done/*[0-9].parquet")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    said, fault = start().communicate(timeout=60)
    assert time.monotonic() - began < 20  # no Ray
    assert fault.startswith(f"graft: error: output {out} is in use by another run (pid {first.pid} on ")
    assert (said, fault.count("\n")) == ("", 1)
    first.kill()
    first.wait()
    last = start()
    said, fault = last.communicate(timeout=120)
    assert (last.returncode, fault) == (0, "")
    assert "\n40 recordings done, 0 failed; " in said
    every_recording_is_there_once(out)
    # What runs that overlapped before there was a lock, that were killed, and of earlier versions have left:
    first, second, third, *_ = sorted(out.glob("work/items/*.parquet"))
    shutil.copy(first, first.with_name(f"9_{first.name}"))
    second.write_bytes(second.read_bytes()[:1000])
    pq.write_table(pq.read_table(third, partitioning=None).drop_columns(["defects", "started_at"]), third)
    again = start()
    said, fault = again.communicate(timeout=120)
    assert (again.returncode, fault) == (0, "")
    assert "\n40 recordings done, 0 failed; " in said
    every_recording_is_there_once(out)


def every_recording_is_there_once(out: Path) -> None:
    names = [name for path in out.glob("recordings/*.parquet") for name in pq.read_table(path)["id"].to_pylist()]
    assert sorted(names) == [f"{number:02}.flac" for number in range(40)]
    assert sorted(path.name for path in (out / "files").iterdir()) == [f"{name}.txt" for name in sorted(names)]
    assert not list(out.glob(".lock*"))
