"""Write each recording as soon as all of its items are transcribed: its files in the chosen formats and its row.

new results in home/items -> recordings all of whose items are done -> tasks that write files/ and recordings/*.parquet
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.inference.subtitles import CueLimits, Format
from graft.storage.atomic import atomic_file, atomic_folder

from ..common.console import json_text
from .assembly import (
    ITEMS_PER_PART,
    PLAN_FILE,
    TRANSCRIPTS,
    ItemResults,
    NewResults,
    Totals,
    done_recordings,
    join_errors,
    join_items,
    reason_of,
    recordings_in,
    transcript_row,
)
from .tasks import RayTasks, Tasks
from .transcript_files import file_stems, listed_files, remember_files, remove_other_files, write_transcript_file
from .work_items import ITEMS

TASKS_MEANWHILE = 2
"""Tasks that write recordings at a time while items are transcribed; at the end every CPU takes part."""
LOOK_S, RESTS_PER_LOOK = 2.0, 20
"""Seconds between two looks for new results, and how many times as long as a look the pause after it is at least: the
results of a million recordings take a while to list."""
ROWS_PER_GROUP = 64


@dataclass(frozen=True)
class OutputSettings:
    """How a recording's row and files are written."""

    folder: str
    formats: tuple[Format, ...]
    cues: CueLimits
    model: str
    aligner: str | None = None


class RecordingWriter:
    """Writes the files and the row of each recording as soon as all of its items have results, while a block lasts.

    The end of the block waits for what is left, writes errors.jsonl, and removes the files of recordings that are gone,
    have changed or failed; then `totals` are complete. What fails is raised there. A block that ends early leaves what
    is written. `done` is the index of what was done before the run.

    recordings/ holds a parquet file for each part of the plan, which is written anew when recordings of the part are
    done: each row stands there once, and in the order of the plan. The rows of an earlier run stay until those of all
    that it has done are written. `tasks` says where the tasks run.
    """

    def __init__(
        self,
        plan: pa.Table,
        done: pa.Table,
        home: Path,
        out: Path,
        output: OutputSettings,
        tasks: Callable[[Callable[..., Any]], Tasks] = RayTasks,
    ) -> None:
        self._home, self._out, self._output = home, out, output
        self._tasks = tasks(_join_part)
        self._earlier_files = remember_files(home, _done_in_last_plan(home, done), output.formats)
        self._plan = plan.append_column("stem", file_stems(plan["recording"], self._earlier_files))
        self._found = ItemResults(plan)
        self._found.add(done)
        self._starts, self._ends = self._found.starts, self._found.ends  # of each recording, in the plan
        self._is_written = np.zeros(len(self._starts), bool)  # each recording
        self._failures: list[tuple[int, str]] = []  # place of the item in the plan, line of errors.jsonl
        self.totals = Totals()
        self._results = NewResults(home, seen=done["file"].unique().to_pylist())
        self._fault: BaseException | None = None
        self._is_ending, self._is_stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="graft-recordings", daemon=True)

    def __enter__(self) -> "RecordingWriter":
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._is_stopped = error is not None
        self._is_ending.set()
        try:
            self._thread.join()
        except BaseException:
            self._is_stopped = True
            raise
        if error is None and self._fault:
            raise self._fault

    def _run(self) -> None:
        try:
            rows = self._out / "recordings"
            with atomic_folder(rows, replace=True) as stage:
                self._write_recordings(stage)  # those that were done before
            pause_s = LOOK_S
            while not self._is_ending.wait(pause_s):
                start = time.monotonic()
                self._found.add(self._results.read())
                pause_s = max(LOOK_S, RESTS_PER_LOOK * (time.monotonic() - start))
                self._write_recordings(rows)
            self._found.add(self._results.read())
            self._write_recordings(rows)
            self._finish()
        except BaseException as error:
            self._fault = error

    def _write_recordings(self, rows: Path) -> None:
        """Write the recordings that are done and not written yet; their rows go into the folder `rows`."""
        running: dict[Any, np.ndarray] = {}  # tasks, and the recordings that they write
        for recordings in self._by_part(np.flatnonzero(self._found.done() & ~self._is_written)):
            part, names = self._part_of(recordings)
            path = rows / f"part-{self._starts[recordings[0]] // ITEMS_PER_PART:05}.parquet"
            running[self._tasks.start(part, names, self._home / "items", path, self._output)] = recordings
            while len(running) >= self._most_tasks():
                self._collect(running)
            if self._is_stopped:
                break
        while running:
            self._collect(running)
        if self._is_stopped:
            raise InterruptedError("the run has ended early")

    def _most_tasks(self) -> int:
        return 2 * self._tasks.cpus if self._is_ending.is_set() else TASKS_MEANWHILE

    def _collect(self, running: dict[Any, np.ndarray]) -> None:
        """Wait for one of the running tasks."""
        task, (totals, failures) = self._tasks.wait(running)
        self._is_written[running.pop(task)] = True
        self.totals.add(totals)
        self._failures += failures

    def _by_part(self, recordings: np.ndarray) -> list[np.ndarray]:
        """Group recordings, given by their numbers, by the parts of the plan in which they begin."""
        _, firsts = np.unique(self._starts[recordings] // ITEMS_PER_PART, return_index=True)
        return np.split(recordings, firsts[1:]) if len(recordings) else []

    def _part_of(self, recordings: np.ndarray) -> tuple[pa.Table, pa.Array]:
        """Return a part's items that are done, with their `file` and `place`, and whether their row `is_written`.

        The names of all recordings of the part are returned, too. `recordings` are those to write now.
        """
        number = self._starts[recordings[0]] // ITEMS_PER_PART
        first, end = np.searchsorted(self._starts // ITEMS_PER_PART, [number, number + 1])
        offset = self._starts[first]
        plan = self._plan.slice(offset, self._ends[end - 1] - offset).combine_chunks()
        written = first + np.flatnonzero(self._is_written[first:end])
        chosen = np.sort(np.concatenate([written, recordings]))
        places = self._found.items_of(chosen)
        columns = {
            "file": self._found.files_of(places),
            "place": pa.array(places),
            "is_written": pa.array(np.repeat(self._is_written[chosen], (self._ends - self._starts)[chosen])),
        }
        items = plan.take(places - offset)
        for name, column in columns.items():
            items = items.append_column(name, column)
        return items, plan["recording"].take(self._starts[first:end] - offset).combine_chunks()

    def _finish(self) -> None:
        """Write errors.jsonl, and remove the files of other recordings."""
        done = done_recordings(self._plan, pa.table({"id": self._plan["id"], "failed": self._found.has_failed}))
        remove_other_files(self._home, Path(self._output.folder), self._earlier_files, done, self._output.formats)
        with atomic_file(self._out / "errors.jsonl") as temporary, temporary.open("w", encoding="utf-8") as errors:
            errors.writelines(line for _, line in sorted(self._failures))


def _done_in_last_plan(home: Path, done: pa.Table) -> pa.Table:
    """List the recordings that are done of the plan of the last run, which may have been killed."""
    path = home / PLAN_FILE
    plan = pq.read_table(path, partitioning=None) if path.is_file() else ITEMS.empty_table()
    stems = file_stems(plan["recording"], listed_files(home))
    return done_recordings(plan.append_column("stem", stems), done)


def _join_part(
    plan: pa.Table, names: pa.Array, items: Path, path: Path, output: OutputSettings
) -> tuple[Totals, list[tuple[int, str]]]:
    """Write the files and rows of recordings of one part, which has the `names`; its rows are in the file `path`.

    Rows that are written stay, and are made anew where this machine does not see them yet in a shared file system.
    Returns totals and failures of the others, the latter as places in the plan and lines of errors.jsonl.
    """
    before = pq.read_table(path, schema=TRANSCRIPTS, partitioning=None) if path.is_file() else TRANSCRIPTS.empty_table()
    before = before.filter(pc.is_in(before["id"], plan.filter(plan["is_written"])["recording"]))
    totals, failures, rows = Totals(), [], [before]
    for recording in recordings_in(plan.filter(pc.invert(pc.is_in(plan["recording"], before["id"]))), items):
        transcript = join_items(recording, model=output.model, aligner=output.aligner)
        rows.append(pa.Table.from_pylist([transcript_row(recording, transcript)], TRANSCRIPTS))
        if recording[0]["is_written"]:
            continue
        totals.add_recording(recording)
        failures += [(item["place"], _failure_line(item)) for item in recording if item["error"]]
        for kind in output.formats if not join_errors(recording) else ():
            text = transcript.to_string(kind, output.cues)
            write_transcript_file(Path(output.folder), recording[0]["stem"], kind, text)
    joined = pa.concat_tables(rows)
    with atomic_file(path) as temporary:
        in_order = joined.take(pc.sort_indices(pc.index_in(joined["id"], names)))
        pq.write_table(in_order, temporary, row_group_size=ROWS_PER_GROUP)
    return totals, failures


def _failure_line(item: dict[str, Any]) -> str:
    """Make the line of errors.jsonl of an item that failed."""
    failure = {key: item[key] for key in ("recording", "uri", "start_s", "end_s")} | {"error": reason_of(item)}
    return f"{json_text(failure)}\n"
