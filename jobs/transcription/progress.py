"""Print how a bulk run goes in one line: recordings, hours, speed, time left and errors, by the results on disk."""

import time
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.compute as pc

from ..common.console import ProgressLine, time_left
from .assembly import NewResults


class BulkProgress:
    """Print the progress of a run while the context lasts.

    `plan` is what is to be done, `done` the index of what was done before the run began.
    """

    def __init__(self, plan: pa.Table, done: pa.Table, home: Path, out: TextIO | None = None) -> None:
        self._results = NewResults(home, seen=done["file"].unique().to_pylist())
        self._item_count = len(plan)
        self._recording_count = pc.sum(pc.equal(plan["index"], 0)).as_py()
        self._expected_s = plan["expected_s"]
        self._items = self._errors = 0
        self._recordings = self._audio_s = 0.0
        self._add(done.filter(pc.is_in(done["id"], plan["id"])))
        self._start, self._audio_before_s = time.monotonic(), self._audio_s
        self._printed = ProgressLine(self._newest_line, out)

    def __enter__(self) -> "BulkProgress":
        self._printed.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._printed.__exit__()

    @property
    def rtfx(self) -> float:
        """Seconds of audio for each second of this run."""
        return (self._audio_s - self._audio_before_s) / max(time.monotonic() - self._start, 1e-9)

    def line(self) -> str:
        """Return the line as of the last count."""
        left = time_left(self._left_s()) if self.rtfx else "?"
        done = f"{int(self._recordings + 1e-6)}/{self._recording_count} recordings"
        return f"{done}  {self._audio_s / 3600:.2f} h  RTFx {self.rtfx:.1f}  left {left}  {self._errors} errors"

    def _left_s(self) -> float:
        """Estimate the seconds that are left; an item of unknown length counts as long as the mean of those done."""
        known = pc.sum(self._expected_s).as_py() or 0.0
        mean = self._audio_s / max(self._items, 1)
        expected_s = known + mean * self._expected_s.null_count
        return max(0.0, expected_s - self._audio_s) / self.rtfx if self._items < self._item_count else 0.0

    def _newest_line(self) -> str:
        self._count_new_files()
        return self.line()

    def _count_new_files(self) -> None:
        self._add(self._results.read())

    def _add(self, index: pa.Table) -> None:
        self._items += len(index)
        self._recordings += pc.sum(pc.divide(1.0, index["item_count"].cast(pa.float64()))).as_py() or 0.0
        self._audio_s += pc.sum(index["duration_s"]).as_py() or 0.0
        self._errors += pc.sum(index["failed"]).as_py() or 0
