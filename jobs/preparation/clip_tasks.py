"""Read the clips of all rows, a batch of files at a time, on Ray or in this process.

rows in the order of their files -> batches -> ClipChecker (clips.py) -> rows with durations, dropped lines

A batch whose process crashes is read again file by file, and the file that crashes it is dropped. What could not be
fetched is tried once more after all else.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..common.console import time_left
from ..transcription.tasks import TaskCrashError, Tasks
from .clips import ClipChecker, Unreached
from .manifests import DroppedLine, Row

BATCH_ROWS = 200
"""Rows of a batch, or more where they are parts of one file, which is read once."""
TABLE_ROWS = 4000
"""Rows of a batch that are neighbours in a tar, parquet or Arrow file: a row group of which a batch ends within is read
twice."""
CRASHES = "its decoder crashes or takes more memory than there is: convert it or leave it out"


class ReadingProgress:
    """Counts the rows that are read."""

    def __init__(self, row_count: int) -> None:
        self.row_count, self.rows, self.dropped, self.audio_s = row_count, 0, 0, 0.0
        self._start = time.monotonic()

    def add(self, results: Iterable[Row | DroppedLine]) -> None:
        """Count the results of rows."""
        for result in results:
            self.rows += 1
            if isinstance(result, Row):
                self.audio_s += result.duration_s
            else:
                self.dropped += 1

    def line(self) -> str:
        """Return the line that is printed."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        left = time_left(seconds / self.rows * (self.row_count - self.rows)) if self.rows else "?"
        done = f"{self.rows}/{self.row_count} clips read  {self.audio_s / 3600:.2f} h"
        return f"{done}  RTFx {self.audio_s / seconds:.0f}  left {left}  {self.dropped} dropped"


def read_all_clips(
    rows: list[Row], checker: ClipChecker, tasks: Tasks, workers: int, progress: ReadingProgress
) -> list[Row | DroppedLine]:
    """Read the clips of rows, of which the list is emptied; returns a result for each, in any order.

    `tasks` runs `check_batch`, `workers` batches at a time. Raises OutputError as the checker.
    """
    rows.sort(key=_place_order, reverse=True)  # batches are taken from the end
    results: list[Row | DroppedLine] = []
    unreached: list[Unreached] = []
    for batch in _read_batches(checker, rows, tasks, workers):
        found = [result for result in batch if not isinstance(result, Unreached)]
        unreached += (result for result in batch if isinstance(result, Unreached))
        progress.add(found)
        results += found
    again = sorted((one.row for one in unreached), key=_place_order, reverse=True)
    for batch in _read_batches(checker, again, tasks, workers):
        found = [result.dropped if isinstance(result, Unreached) else result for result in batch]
        progress.add(found)
        results += found
    return results


def check_batch(checker: ClipChecker, rows: list[Row]) -> list[Row | DroppedLine | Unreached]:
    """Read a batch."""
    return checker(rows)


def _place_order(row: Row) -> tuple[str, int, int, float]:
    return row.audio.uri, row.audio.start, row.audio.row or 0, row.offset_s


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Cut rows, which stand in the reverse order of their files, into batches; the list is emptied."""
    batch: list[Row] = []
    while rows:
        row = rows.pop()
        if len(batch) >= BATCH_ROWS and (row.audio.uri != batch[-1].audio.uri or _is_full(batch, row)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _is_full(batch: Sequence[Row], row: Row) -> bool:
    """Tell whether a batch ends before a row of the same file, which is another part of that file."""
    return len(batch) >= TABLE_ROWS and row.audio != batch[-1].audio


def _read_batches(
    checker: ClipChecker, rows: list[Row], tasks: Tasks, workers: int
) -> Iterator[list[Row | DroppedLine | Unreached]]:
    """Read rows in batches, `workers` at a time, and yield the results of each batch as it is done."""
    batches = _batches(rows)
    suspects: list[list[Row]] = []  # the files of batches that have crashed a process
    running: dict[Any, list[Row]] = {}
    try:
        while True:
            while len(running) < workers and (batch := suspects.pop() if suspects else next(batches, None)):
                running[tasks.start(checker, batch)] = batch
            if not running:
                return
            try:
                task, results = tasks.wait(running)
                del running[task]
            except TaskCrashError as crash:
                batch = running.pop(crash.task)
                files = [list(group) for _, group in itertools.groupby(batch, key=lambda row: row.audio.uri)]
                suspects += files if len(files) > 1 else []
                crashed = [] if len(files) > 1 else batch
                results = [row.dropped("unreadable audio", f"{row.audio}: {CRASHES}") for row in crashed]
            yield results
    finally:
        tasks.stop(running)
