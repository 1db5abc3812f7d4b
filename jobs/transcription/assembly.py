"""Join the results of work items to recordings: parquet rows, files in the chosen formats, errors.jsonl and totals.

home/items/*.parquet -> an index of what is done -> tasks that join some hundred recordings each
                     -> recordings/*.parquet, files/
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.audio.defects import AudioDefect
from graft.inference.segments import Segment, Word
from graft.inference.subtitles import CueLimits, Format
from graft.inference.transcript import Transcript, stitch
from graft.storage.atomic import atomic_file, atomic_folder

from .reader import DEFECTS, name_of
from .transcript_files import file_stems, following_recordings, planned_files, write_transcript_file

RECORDINGS_PER_TASK = 500
PENDING = ".pending.parquet"
"""Suffix of the file with which Ray marks a file of results that it is still writing."""

WORDS = pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("text", pa.string())]))
SEGMENTS = pa.list_(
    pa.struct(
        [
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("text", pa.string()),
            ("mean_logprob", pa.float64()),
            ("flags", pa.list_(pa.string())),
            ("words", WORDS),
            ("channel", pa.int32()),
        ]
    )
)
TRANSCRIPTS = pa.schema(
    [
        ("id", pa.string()),  # the recording's name
        ("uri", pa.string()),
        ("duration_s", pa.float64()),
        ("text", pa.string()),
        ("segments", SEGMENTS),
        # 0 to 1: geometric mean of token probabilities, weighted by the lengths of segments' texts; null without text
        ("confidence", pa.float64()),
        ("flags", pa.list_(pa.string())),  # of any of its segments, and of its audio
        ("defects", DEFECTS),  # what is wrong with its audio, and when
        ("error", pa.string()),  # null, or why it, or part of it, has no text
        ("model", pa.string()),
        ("aligner", pa.string()),  # where the times of words come from; null without an aligner
        ("read_s", pa.float64()),  # CPU seconds of decoding and finding speech
        ("heard_s", pa.float64()),  # seconds in the engine, beside others
    ]
)
_INDEX = pa.schema(
    [
        ("id", pa.string()),
        ("item", pa.string()),
        ("attempt", pa.int32()),
        ("item_count", pa.int32()),
        ("duration_s", pa.float64()),
        ("failed", pa.bool_()),
        ("file", pa.string()),
    ]
)


@dataclass(frozen=True)
class OutputSettings:
    """How a recording's row and files are written."""

    folder: str
    formats: tuple[Format, ...]
    cues: CueLimits
    model: str
    aligner: str | None = None


@dataclass
class Totals:
    """Counts over the recordings of a run."""

    done: int = 0
    audio_s: float = 0.0
    read_s: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)  # recordings by reason
    flagged: Counter[str] = field(default_factory=Counter)  # segments by flag
    defective: Counter[str] = field(default_factory=Counter)  # recordings by flag of their audio

    def add(self, other: "Totals") -> None:
        """Add the counts of another part of the run."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def add_recording(self, items: Sequence[dict[str, Any]]) -> None:
        """Add a recording, given its items with their results."""
        self.audio_s += sum(item["duration_s"] for item in items)
        self.read_s += sum(item["read_s"] for item in items)
        self.flagged.update(flag for item in items for segment in item["segments"] for flag in segment["flags"])
        self.defective.update({defect["flag"] for item in items for defect in item["defects"]})
        errors = [_reason(item) for item in items if item["error"]]
        self.failed.update(_kind(error) for error in errors[:1])
        self.done += not errors


def read_index(home: Path) -> pa.Table:
    """List every whole result without its text: whether it failed, and the file that holds it."""
    parts = [index_of(path) for path in whole_files(home)]
    return pa.concat_tables(parts) if parts else _INDEX.empty_table()


def whole_files(home: Path) -> list[Path]:
    """List the files of results, without those that are still written or were when a run was killed."""
    pending = tuple(path.name.removesuffix(PENDING) for path in (home / "done").glob(f"*{PENDING}"))
    return sorted(path for path in (home / "items").glob("*.parquet") if not path.name.startswith(pending or ("\0",)))


def index_of(path: Path) -> pa.Table:
    """Read one file's part of the index."""
    table = pq.read_table(path, columns=[*_INDEX.names[:-2], "error"], partitioning=None)
    columns = [*table.columns[:-1], table["error"].is_valid(), pa.repeat(path.name, len(table))]
    return pa.table(columns, schema=_INDEX)


def join_recordings(plan: pa.Table, index: pa.Table, home: Path, out: Path, output: OutputSettings) -> Totals:
    """Join a plan's results to recordings, in parallel, and write out/recordings, out/errors.jsonl and files."""
    import ray

    plan = with_files(plan, index).append_column("stem", file_stems(plan["recording"]))
    totals, join = Totals(), ray.remote(num_cpus=1)(_join_part)
    done = done_recordings(plan, index)
    planned = planned_files(done, output.formats)
    with (
        following_recordings(home, Path(output.folder), planned, done["recording_id"]),
        atomic_folder(out / "recordings", replace=True) as stage,
    ):
        tasks = [
            join.remote(part, str(home / "items"), str(stage / f"part-{number:05}.parquet"), output)
            for number, part in enumerate(plan_parts(plan))
        ]
        with atomic_file(out / "errors.jsonl") as temporary, temporary.open("w", encoding="utf-8") as errors:
            for task in tasks:
                part_totals, failures = ray.get(task)
                totals.add(part_totals)
                errors.writelines(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
    return totals


def with_files(plan: pa.Table, index: pa.Table) -> pa.Table:
    """Add a column `file` to a plan: the file in home/items that holds the item's result."""
    return plan.append_column("file", index["file"].take(pc.index_in(plan["id"], index["id"])))


def done_recordings(plan: pa.Table, index: pa.Table) -> pa.Table:
    """List the `stem` and `recording_id` of the recordings of a plan of which no item failed."""
    ids = pc.replace_substring_regex(plan["item"], r"-\d+$", "")
    failed = ids.filter(index["failed"].take(pc.index_in(plan["id"], index["id"])))
    recordings = plan.select(["stem"]).append_column("recording_id", ids).filter(pc.equal(plan["index"], 0))
    return recordings.filter(pc.invert(pc.is_in(recordings["recording_id"], failed)))


def plan_parts(plan: pa.Table) -> Iterator[pa.Table]:
    """Cut a plan into parts of RECORDINGS_PER_TASK whole recordings."""
    starts = pc.indices_nonzero(pc.equal(plan["index"], 0)).to_pylist()
    for first in range(0, len(starts), RECORDINGS_PER_TASK):
        end = starts[first + RECORDINGS_PER_TASK] if first + RECORDINGS_PER_TASK < len(starts) else len(plan)
        yield plan.slice(starts[first], end - starts[first]).combine_chunks()


def recordings_in(plan: pa.Table, items: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the items of each recording of a plan with files: what the plan says of an item, and its result."""
    wanted = set(plan["id"].to_pylist())
    tables = (pq.read_table(items / file, partitioning=None) for file in plan["file"].unique().to_pylist())
    results = {row["id"]: row for table in tables for row in table.to_pylist() if row["id"] in wanted}
    rows = (row | results[row["id"]] for row in plan.to_pylist())
    for _, recording in itertools.groupby(rows, key=lambda row: row["item"].rpartition("-")[0]):
        yield list(recording)


def join_items(items: Sequence[dict[str, Any]], *, model: str = "", aligner: str | None = None) -> Transcript:
    """Join the items of one recording."""
    segments = [
        Segment(**values | {"flags": tuple(values["flags"]), "words": tuple(Word(**word) for word in values["words"])})
        for item in items
        for values in item["segments"]
    ]
    defects = [AudioDefect(**defect) for item in items for defect in item["defects"]]
    duration_s = sum(item["duration_s"] for item in items)
    return stitch(segments, duration_s=duration_s, model=model, aligner=aligner, defects=defects)


def join_errors(items: Sequence[dict[str, Any]]) -> str | None:
    """Join the reasons why items of one recording failed; None where none did."""
    return "; ".join(_reason(item) for item in items if item["error"]) or None


def _join_part(plan: pa.Table, items: str, path: str, output: OutputSettings) -> tuple[Totals, list[dict[str, Any]]]:
    totals, failures = Totals(), []
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, TRANSCRIPTS) as writer:
        for recording in recordings_in(plan, Path(items)):
            transcript = join_items(recording, model=output.model, aligner=output.aligner)
            writer.write_table(pa.Table.from_pylist([_transcript_row(recording, transcript)], TRANSCRIPTS))
            totals.add_recording(recording)
            if failed := [item for item in recording if item["error"]]:
                keys = ("recording", "uri", "start_s", "end_s")
                failures += [{key: item[key] for key in keys} | {"error": _reason(item)} for item in failed]
                continue
            for kind in output.formats:
                text = transcript.to_string(kind, output.cues)
                write_transcript_file(Path(output.folder), recording[0]["stem"], kind, text)
    return totals, failures


def _transcript_row(items: Sequence[dict[str, Any]], transcript: Transcript) -> dict[str, Any]:
    """Make a recording's row of TRANSCRIPTS."""
    # Segments are weighted by the lengths of their texts: how many tokens each had is not kept.
    known = [one for one in transcript.segments if one.text and one.mean_logprob is not None]
    weights = [len(one.text) for one in known]
    return transcript.to_dict() | {
        "id": items[0]["recording"],
        "uri": items[0]["uri"],
        "confidence": math.exp(np.average([one.mean_logprob for one in known], weights=weights)) if known else None,
        "flags": sorted(
            {flag for segment in transcript.segments for flag in segment.flags}
            | {defect.flag for defect in transcript.defects}
        ),
        "error": join_errors(items),
        "read_s": sum(item["read_s"] for item in items),
        "heard_s": sum(item["heard_s"] for item in items),
    }


def _reason(item: dict[str, Any]) -> str:
    return str(item["error"]).removeprefix(f"{name_of(item)}: ")


def _kind(reason: str) -> str:
    """Strip a reason of its numbers and its remedy, so that equal ones are counted together."""
    return re.sub(r"\d[\d.,]*", "N", re.split(r"[:(]", reason)[0]).strip()
