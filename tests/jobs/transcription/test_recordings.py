"""Test that recordings are written as their results come: each once, whole, in order, and known to the next run."""

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.errors import OutputError
from graft.inference.subtitles import CueLimits
from jobs.common.cli import user_message
from jobs.transcription import recordings
from jobs.transcription.assembly import PLAN_FILE, read_index
from jobs.transcription.recordings import OutputSettings, RecordingWriter
from tests.support.work_items import planned, write_results

pytestmark = pytest.mark.usefixtures("ray_started")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for results often, and put few recordings into a part."""
    monkeypatch.setattr(recordings, "LOOK_S", 0.02)
    monkeypatch.setattr(recordings, "RESTS_PER_LOOK", 1)
    monkeypatch.setattr(recordings, "ITEMS_PER_PART", 3)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("items", "done"):
        (tmp_path / "work" / name).mkdir(parents=True)
    return tmp_path / "work"


def begin(home: Path, plan: pa.Table) -> RecordingWriter:
    output = OutputSettings(str(home.parent / "files"), ("txt",), CueLimits(), "tiny")
    writer = RecordingWriter(plan, read_index(home), home, home.parent, output)
    pq.write_table(plan, home / PLAN_FILE)
    return writer


def files(home: Path) -> list[str]:
    return sorted(path.name for path in (home.parent / "files").glob("*"))


def rows(home: Path) -> dict[str, str | None]:
    """Return the text of each recording that has a row, in their order; None where it failed."""
    parts = sorted((home.parent / "recordings").glob("*.parquet"))
    found = [row for part in parts for row in pq.read_table(part, partitioning=None).to_pylist()]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: None if row["error"] else row["text"] for row in found}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    is_met = False
    while not is_met:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError):  # the rows of the run before are replaced just then
            is_met = condition()


PLAN = planned(("a", [10.0]), ("b", [10.0, 10.0]), ("c", [10.0]), ("d", [10.0]), ("e", [10.0]))


def test_a_recording_is_written_when_all_of_its_items_are_done(home: Path) -> None:
    with begin(home, PLAN) as writer:
        write_results(home, "2", ("d-0", 1, 10.0, None), ("b-1", 2, 10.0, None))
        until(lambda: files(home) == ["d.txt"])
        write_results(home, "1", ("a-0", 1, 10.0, None), ("e-0", 1, 10.0, "no audio"))
        until(lambda: rows(home) == {"a": "a-0", "d": "d-0", "e": None})
        # An item that stands there twice counts once.
        write_results(home, "0", ("b-0", 2, 10.0, None), ("b-1", 2, 10.0, None), ("a-0", 1, 10.0, None))
        until(lambda: len(rows(home)) == 4)
        assert files(home) == ["a.txt", "b.txt", "d.txt"]
        write_results(home, "3", ("c-0", 1, 10.0, "cut"))
    assert list(rows(home).items()) == [("a", "a-0"), ("b", "b-0 b-1"), ("c", None), ("d", "d-0"), ("e", None)]
    assert (writer.totals.done, writer.totals.failed.total(), writer.totals.audio_s) == (3, 2, 60.0)
    faults = (home.parent / "errors.jsonl").read_text().splitlines()
    assert [json.loads(fault)["recording"] for fault in faults] == ["c", "e"]


def test_what_a_run_that_ended_early_has_written_stays_and_the_next_run_goes_on(home: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), begin(home, PLAN):
        write_results(home, "1", ("a-0", 1, 10.0, None), ("b-0", 2, 10.0, None), ("d-0", 1, 10.0, None))
        until(lambda: rows(home) == {"a": "a-0", "d": "d-0"})
        raise KeyboardInterrupt
    assert files(home) == ["a.txt", "d.txt"]
    assert rows(home) == {"a": "a-0", "d": "d-0"}
    (home.parent / "files" / "c.txt").write_text("typed by hand")
    # d is gone; c fails; f has come and is in another place of the plan.
    plan = planned(("0", [10.0]), ("a", [10.0]), ("b", [10.0, 10.0]), ("c", [10.0]))
    with begin(home, plan) as writer:
        until(lambda: rows(home) == {"a": "a-0"})
        write_results(home, "2", ("b-1", 2, 10.0, None), ("c-0", 1, 10.0, "cut"), ("0-0", 1, 10.0, None))
    assert list(rows(home).items()) == [("0", "0-0"), ("a", "a-0"), ("b", "b-0 b-1"), ("c", None)]
    assert files(home) == ["0.txt", "a.txt", "b.txt", "c.txt"]
    assert writer.totals.done == 3
    with begin(home, plan) as writer:
        pass
    assert writer.totals.done == 3
    assert len(rows(home)) == 4


def test_rows_that_a_machine_does_not_see_yet_are_made_anew(home: Path) -> None:
    """A shared file system may show the older content of a file for a while."""
    with begin(home, PLAN) as writer:
        write_results(home, "1", ("a-0", 1, 10.0, None))
        until(lambda: "a" in rows(home))
        (home.parent / "recordings" / "part-00000.parquet").unlink()
        write_results(home, "2", ("b-0", 2, 10.0, None), ("b-1", 2, 10.0, None))
    assert rows(home) == {"a": "a-0", "b": "b-0 b-1"}
    assert writer.totals.done == 2


def test_what_fails_is_raised_at_the_end(home: Path) -> None:
    (home.parent / "files").write_text("no folder")
    with pytest.raises(OutputError) as raised, begin(home, PLAN):
        write_results(home, "1", ("a-0", 1, 10.0, None))
    assert re.search(r"/files/a.txt cannot be written: File exists: mend that", user_message(raised.value) or "")
