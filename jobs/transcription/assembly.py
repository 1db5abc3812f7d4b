"""Join the results of work items to recordings: their transcripts, their rows and totals.

home/items/*.parquet -> an index of what is done -> the items of each recording, some hundred recordings at a time
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.audio.defects import AudioDefect
from graft.inference.segments import Segment, Word
from graft.inference.transcript import Transcript, stitch
from graft.storage.atomic import atomic_file

from .reader import DEFECTS, name_of

PLAN_FILE = "plan.parquet"
ITEMS_PER_PART = 500
"""Items of the recordings that are joined together, in one task: ten days of audio at most."""
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
        ("language", pa.string()),  # code (ISO 639-1) that was named or found; null where it is not known
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
        errors = [reason_of(item) for item in items if item["error"]]
        self.failed.update(_kind(error) for error in errors[:1])
        self.done += not errors


def open_results(home: Path) -> pa.Table:
    """Return the index of what earlier runs have left, and make it whole for the next one, when no other run writes.

    Files may be cut off where a run was killed, and where two runs overlapped, neither may know of results that are
    there. Ray Data skips what has a mark in home/done: results without a mark get one, and a mark without results goes.
    """
    marks = {path.stem: path for path in (home / "done").glob("*.parquet") if not path.name.endswith(PENDING)}
    parts = [_INDEX.empty_table()]
    for path in whole_files(home):
        try:
            index = index_of(path)
        except (OSError, pa.ArrowInvalid) as error:
            if getattr(error, "errno", None):
                raise  # the file system is at fault, not the file
            continue  # it stays: a worker of a run that was just killed may be writing it
        parts.append(index)
        name = path.stem.rpartition("-")[0]
        mark = marks.pop(name, None)
        if not (mark and mark.stat().st_size) and len(index):
            with atomic_file(home / "done" / f"{name}.parquet") as temporary:
                pq.write_table(index.select(["id"]), temporary)
    for mark in marks.values():
        mark.unlink(missing_ok=True)
    return _first_results(pa.concat_tables(parts))


def read_index(home: Path) -> pa.Table:
    """List the first whole result of every item without its text: whether it failed, and the file that holds it."""
    return _first_results(NewResults(home).read())


def _first_results(index: pa.Table) -> pa.Table:
    """Keep the first result of each item: two runs that overlapped, and one that was cut off, may leave several."""
    if pc.count_distinct(index["id"]).as_py() == len(index):
        return index
    rows = index.append_column("row", pa.array(np.arange(len(index)))).group_by("id").aggregate([("row", "min")])
    return index.take(np.sort(rows["row_min"].to_numpy()))


class NewResults:
    """Lists results of `home` that are new since the last look; those in the files `seen` are known already."""

    def __init__(self, home: Path, seen: Iterable[str] = ()) -> None:
        self._home, self._seen = home, set(seen)

    def read(self) -> pa.Table:
        """Return the index of what is new."""
        parts = [_INDEX.empty_table()]
        for path in whole_files(self._home):
            if path.name not in self._seen:
                try:
                    parts.append(index_of(path))
                except (OSError, pa.ArrowInvalid):
                    continue  # it is being written, and the next look finds it, or a full disk has cut it off
                self._seen.add(path.name)
        return pa.concat_tables(parts)


class ItemResults:
    """Keeps which items of a plan have results, and in which files; the first result of an item counts."""

    def __init__(self, plan: pa.Table) -> None:
        self._ids = plan["id"]
        self.starts = np.flatnonzero(plan["index"].to_numpy() == 0)  # of each recording, in the plan
        self.ends = np.append(self.starts[1:], len(plan))
        self.has_failed = np.zeros(len(plan), bool)  # each item
        self._files: list[str] = []
        self._file_of = np.full(len(plan), -1, np.int32)  # place of each item's file in that list; -1 without a result

    def add(self, index: pa.Table) -> None:
        """Take notice of the results in an index."""
        places = pc.index_in(index["id"], self._ids)
        index, places = index.filter(places.is_valid()), places.drop_null().to_numpy()
        files = index["file"].combine_chunks().dictionary_encode()
        codes = len(self._files) + files.indices.to_numpy()
        self._files += files.dictionary.to_pylist()
        is_first = self._file_of[places] < 0
        # Of several assignments to one place the last one holds.
        order = np.flatnonzero(is_first)[::-1]
        self._file_of[places[order]] = codes[order]
        self.has_failed[places[order]] = index["failed"].to_numpy()[order]

    def done(self) -> np.ndarray:
        """Tell of each recording whether all of its items have results."""
        return np.logical_and.reduceat(self._file_of >= 0, self.starts)

    def items_of(self, recordings: np.ndarray) -> np.ndarray:
        """Return the places in the plan of all items of recordings, which are given by their numbers."""
        return np.concatenate([np.arange(self.starts[one], self.ends[one]) for one in recordings])

    def files_of(self, places: np.ndarray) -> pa.Array:
        """Return the files of items that have results."""
        return pa.array([self._files[code] for code in self._file_of[places]], pa.string())


def whole_files(home: Path) -> list[Path]:
    """List the files of results, without those that are still written or were when a run was killed."""
    pending = tuple(path.name.removesuffix(PENDING) for path in (home / "done").glob(f"*{PENDING}"))
    return sorted(path for path in (home / "items").glob("*.parquet") if not path.name.startswith(pending or ("\0",)))


def index_of(path: Path) -> pa.Table:
    """Read one file's part of the index."""
    table = pq.read_table(path, columns=[*_INDEX.names[:-2], "error"], partitioning=None)
    columns = [*table.columns[:-1], table["error"].is_valid(), pa.repeat(path.name, len(table))]
    return pa.table(columns, schema=_INDEX)


def with_files(plan: pa.Table, index: pa.Table) -> pa.Table:
    """Add a column `file` to a plan: the file in home/items that holds the item's result."""
    return plan.append_column("file", index["file"].take(pc.index_in(plan["id"], index["id"])))


def done_recordings(plan: pa.Table, index: pa.Table) -> pa.Table:
    """List the `stem` and `recording_id` of the recordings of a plan of which all items are done, and none failed."""
    ids = pc.replace_substring_regex(plan["item"], r"-\d+$", "")
    failed = ids.filter(index["failed"].take(pc.index_in(plan["id"], index["id"])).fill_null(True))
    recordings = plan.select(["stem"]).append_column("recording_id", ids).filter(pc.equal(plan["index"], 0))
    return recordings.filter(pc.invert(pc.is_in(recordings["recording_id"], failed)))


def plan_parts(plan: pa.Table) -> Iterator[pa.Table]:
    """Cut a plan into parts of about ITEMS_PER_PART items, of whole recordings."""
    starts = np.flatnonzero(plan["index"].to_numpy() == 0)
    firsts = starts[np.unique(starts // ITEMS_PER_PART, return_index=True)[1]]
    for first, end in itertools.pairwise([*firsts.tolist(), len(plan)]):
        yield plan.slice(first, end - first).combine_chunks()


def recordings_in(plan: pa.Table, items: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the items of each recording of a plan with files: what the plan says of an item, and its result.

    Only those of one recording are Python objects at a time, which take many times the memory of Arrow's.
    """
    results = pa.concat_tables(
        (
            _results_in(items / file, plan.filter(pc.equal(plan["file"], file))["id"])
            for file in plan["file"].unique().to_pylist()
        ),
        promote_options="default",
    )
    results = results.take(pc.index_in(plan["id"], results["id"]))
    singly = (results.slice(place, 1).to_pylist()[0] for place in range(len(results)))
    rows = zip(plan.to_pylist(), singly, strict=True)
    for _, recording in itertools.groupby(rows, key=lambda row: row[0]["item"].rpartition("-")[0]):
        yield [item | result for item, result in recording]


def _results_in(path: Path, ids: pa.ChunkedArray) -> pa.Table:
    """Read the results with some ids from a file; an earlier version's know of no defects."""
    results = pq.read_table(path, partitioning=None)
    results = results.filter(pc.is_in(results["id"], ids))
    if "defects" not in results.column_names:
        results = results.append_column("defects", pa.array([[]] * len(results), DEFECTS))
    return results


def join_items(items: Sequence[dict[str, Any]], *, model: str = "", aligner: str | None = None) -> Transcript:
    """Join the items of one recording."""
    segments = [
        Segment(**values | {"flags": tuple(values["flags"]), "words": tuple(Word(**word) for word in values["words"])})
        for item in items
        for values in item["segments"]
    ]
    defects = [AudioDefect(**defect) for item in items for defect in item["defects"]]
    duration_s = sum(item["duration_s"] for item in items)
    spoken: Counter[str] = Counter()  # seconds by language: each item of a long recording has its own
    for item in items:
        spoken[item["language"] or ""] += item["duration_s"]
    ((language, _),) = spoken.most_common(1)
    return stitch(
        segments, duration_s=duration_s, model=model, aligner=aligner, defects=defects, language=language or None
    )


def join_errors(items: Sequence[dict[str, Any]]) -> str | None:
    """Join the reasons why items of one recording failed; None where none did."""
    return "; ".join(reason_of(item) for item in items if item["error"]) or None


def transcript_row(items: Sequence[dict[str, Any]], transcript: Transcript) -> dict[str, Any]:
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


def reason_of(item: dict[str, Any]) -> str:
    """Say why an item failed, without the name of its recording."""
    return str(item["error"]).removeprefix(f"{name_of(item)}: ")


def _kind(reason: str) -> str:
    """Strip a reason of its numbers and its remedy, so that equal ones are counted together."""
    return re.sub(r"\d[\d.,]*", "N", re.split(r"[:(]", reason)[0]).strip()
