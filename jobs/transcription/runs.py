"""Run a plan of work items, or the rows of a corpus, through the bulk pipeline.

rows -> recordings -> plan of items -> pipeline.transcribe_items -> results, found again by id -> a transcript a row
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.data.dataset import RowTable
from graft.storage.atomic import atomic_file

from .assembly import join_errors, join_items, plan_parts, read_index, recordings_in, whole_files, with_files
from .discovery import recordings_of_rows
from .pipeline import Pipeline, transcribe_items
from .progress import BulkProgress
from .work_items import durations, plan_items

ITEM_S = 1800.0
"""Seconds of audio in a work item, about, unless a recipe says otherwise."""


@dataclass(frozen=True)
class ClipTranscript:
    """The transcript of a clip, or the error that says why it has none."""

    text: str = ""
    error: str | None = None
    duration_s: float = 0.0
    mean_logprob: float | None = None
    """Mean natural log-probability of the text's tokens; None where there are none."""


def run_plan(plan: pa.Table, done: pa.Table, home: Path, pipeline: Pipeline) -> float | None:
    """Transcribe the items of a plan that are not `done`, the index of `home`, and print how it goes.

    Returns the seconds of audio for each second of this run, None where nothing was left to do. Raises as
    transcribe_items.
    """
    if pc.all(pc.is_in(plan["id"], done["id"])).as_py():
        return None
    with atomic_file(home / "plan.parquet") as temporary:
        pq.write_table(plan, temporary, row_group_size=50_000)
    with BulkProgress(plan, done, home) as progress:
        transcribe_items(home / "plan.parquet", home, pipeline)
    return progress.rtfx


def transcribe_rows(rows: RowTable, home: Path, pipeline: Pipeline) -> Iterator[ClipTranscript]:
    """Transcribe the rows of a corpus and yield a transcript for each, in their order; no row may stand there twice.

    `home` is a folder that every node sees. A run that was cut off goes on there. Raises as transcribe_items.
    """
    home.mkdir(exist_ok=True)
    places = zip(rows.file.tolist(), rows.row_group.tolist(), rows.row.tolist(), strict=True)
    versions = pa.array([f"{rows.files[file].uri}:{group}:{row}" for file, group, row in places])
    plan = plan_items(recordings_of_rows(rows, versions), item_s=ITEM_S, probe=durations)
    run_plan(plan, read_index(home), home, pipeline)
    for part in plan_parts(with_files(plan, read_index(home))):
        for items in recordings_in(part, home / "items"):
            transcript = join_items(items)
            # Characters stand for tokens, whose number is not kept; one more stands for the end of a segment's answer.
            known = [one for one in transcript.segments if one.mean_logprob is not None]
            weights = [len(one.text) + 1 for one in known]
            mean = float(np.average([one.mean_logprob for one in known], weights=weights)) if known else None
            yield ClipTranscript(transcript.text, join_errors(items), transcript.duration_s, mean)


def measured_rtfx(home: Path) -> float:
    """Return seconds of audio per second, from when a model got the first item to when the last one was done."""
    columns = ["duration_s", "started_at", "heard_s"]
    results = pa.concat_tables(pq.read_table(path, columns=columns, partitioning=None) for path in whole_files(home))
    ended_at = pc.max(pc.add(results["started_at"], results["heard_s"])).as_py()
    seconds = ended_at - pc.min(results["started_at"]).as_py()
    return float(pc.sum(results["duration_s"]).as_py() / max(seconds, 1e-9))
