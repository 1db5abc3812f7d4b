"""Test the progress line of a bulk run: it counts whole results, each once, and estimates the time that is left."""

import io
import re
from pathlib import Path

import pytest

from jobs.transcription.assembly import PENDING, read_index
from jobs.transcription.progress import BulkProgress
from tests.support.work_items import planned, write_results


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("items", "done"):
        (tmp_path / name).mkdir()
    return tmp_path


def line(progress: BulkProgress) -> str:
    progress._count_new_files()
    return progress.line()


def test_what_was_done_before_counts_as_done_but_not_as_fast(home: Path) -> None:
    write_results(home, "before", ("a-0", 1, 3600.0, None))
    progress = BulkProgress(planned(("a", [3600.0]), ("b", [1800.0, 1800.0])), read_index(home), home, io.StringIO())
    assert line(progress) == "1/2 recordings  1.00 h  RTFx 0.0  left ?  0 errors"


def test_days_are_left(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = BulkProgress(planned(("a", [3600.0]), ("b", [3600.0 * 30])), read_index(home), home, io.StringIO())
    write_results(home, "one", ("a-0", 1, 3600.0, None))
    progress._count_new_files()
    monkeypatch.setattr(BulkProgress, "rtfx", 1.0)
    assert progress.line() == "1/2 recordings  1.00 h  RTFx 1.0  left 30:00:00  0 errors"


def test_half_a_recording_is_none_yet_and_errors_are_counted(home: Path) -> None:
    items = planned(("a", [1800.0, 1800.0]), ("b", [7200.0]), ("c", [None]))
    progress = BulkProgress(items, read_index(home), home, io.StringIO())
    write_results(home, "one", ("a-0", 2, 1800.0, None))
    assert re.fullmatch(r"0/3 recordings  0\.50 h  RTFx \d+\.\d  left \d\d:\d\d:\d\d  0 errors", line(progress))
    assert progress.rtfx > 0
    # c is taken to be as long as the mean of the items so far, half an hour.
    assert progress._left_s() == pytest.approx((1800 + 7200 + 1800) / progress.rtfx, rel=0.2)
    write_results(home, "two", ("a-1", 2, 1800.0, "broken"), ("b-0", 1, 7200.0, None))
    assert re.match(r"2/3 recordings  3\.00 h .*  1 errors", line(progress))
    assert line(progress).startswith("2/3")  # each file once
    write_results(home, "three", ("c-0", 1, 10.0, None))
    assert "3/3 recordings  3.00 h" in line(progress)
    assert "left 00:00:00" in progress.line()


def test_a_file_that_is_still_written_does_not_count(home: Path) -> None:
    progress = BulkProgress(planned(("a", [10.0])), read_index(home), home, io.StringIO())
    write_results(home, "now_1", ("a-0", 1, 10.0, None))
    (home / "done" / f"now{PENDING}").touch()
    assert line(progress).startswith("0/1 recordings  0.00 h")
    (home / "done" / f"now{PENDING}").unlink()
    assert line(progress).startswith("1/1 recordings  0.00 h")


def test_the_last_line_is_of_the_end(home: Path) -> None:
    out = io.StringIO()
    with BulkProgress(planned(("a", [3600.0])), read_index(home), home, out):
        write_results(home, "one", ("a-0", 1, 3600.0, None))
    assert out.getvalue().endswith("\n")
    assert out.getvalue().splitlines()[-1].startswith("1/1 recordings  1.00 h  RTFx ")
