"""Items' results -> recordings' results: parquet rows, a file each in the formats that are asked for, errors.jsonl, and what to sum up.

home/items/*.parquet -> an index of what is done -> tasks that join some hundred recordings each -> recordings/*.parquet, files/
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.inference.subtitles import CueLimits, Format, format_transcript
from graft.inference.transcript import Segment, Transcript, Word, stitch
from graft.storage.atomic import atomic_file, atomic_folder, write_atomic

from .pipeline import SEGMENTS
from .reader import name_of

RECORDINGS_PER_TASK = 500
PENDING = ".pending.parquet"
"""What Ray calls the mark of a file that is being written."""

TRANSCRIPTS = pa.schema(
    [
        ("id", pa.string()),  # the recording's name
        ("uri", pa.string()),
        ("duration_s", pa.float64()),
        ("text", pa.string()),
        ("segments", SEGMENTS),
        (
            "confidence",
            pa.float64(),
        ),  # 0 to 1: of its segments' geometric means of token probabilities, by the lengths of their texts; null without text
        ("flags", pa.list_(pa.string())),  # of any of its segments
        ("error", pa.string()),  # null, or why it, or part of it, has no text
        ("model", pa.string()),
        ("aligner", pa.string()),  # where the times of words come from; null without an aligner
        ("read_s", pa.float64()),  # CPU seconds of decoding and finding speech
        ("heard_s", pa.float64()),  # seconds in the engine, beside others
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
    """What a run comes to."""

    done: int = 0
    audio_s: float = 0.0
    read_s: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    flagged: Counter[str] = field(default_factory=Counter)  # segments by flag

    def add(self, other: "Totals") -> None:
        """Count another part's."""
        self.done += other.done
        self.audio_s += other.audio_s
        self.read_s += other.read_s
        self.failed += other.failed
        self.flagged += other.flagged


def read_index(home: Path) -> pa.Table:
    """Of every result that is whole, without its text: whether it failed, and the file that holds it."""
    parts = [index_of(path) for path in whole_files(home)]
    return pa.concat_tables(parts) if parts else _INDEX.empty_table()


def whole_files(home: Path) -> list[Path]:
    """The files of results that are not being written, or were when a run was killed."""
    pending = tuple(path.name.removesuffix(PENDING) for path in (home / "done").glob(f"*{PENDING}"))
    return sorted(path for path in (home / "items").glob("*.parquet") if not path.name.startswith(pending or ("\0",)))


def index_of(path: Path) -> pa.Table:
    """A file's part of the index."""
    table = pq.read_table(path, columns=["item", "attempt", "item_count", "duration_s", "error"], partitioning=None)
    columns = [*table.columns[:4], table["error"].is_valid(), pa.repeat(path.name, len(table))]
    return pa.table(columns, schema=_INDEX)


_INDEX = pa.schema(
    [
        ("item", pa.string()),
        ("attempt", pa.int32()),
        ("item_count", pa.int32()),
        ("duration_s", pa.float64()),
        ("failed", pa.bool_()),
        ("file", pa.string()),
    ]
)


def join_recordings(plan: pa.Table, index: pa.Table, home: Path, out: Path, written: OutputSettings) -> Totals:
    """Join the results of a plan's items to recordings, in parallel, and write them: out/recordings, out/errors.jsonl, files."""
    import ray

    files = plan.select(["item", "attempt"]).append_column("order", pa.array(range(len(plan)), pa.int64()))
    files = files.join(index.select(["item", "attempt", "file"]), ["item", "attempt"]).sort_by("order")
    plan = plan.append_column("file", files["file"]).append_column("stem", _stems(plan["recording"]))
    totals, join = Totals(), ray.remote(num_cpus=1)(_join_part)
    with atomic_folder(out / "recordings", replace=True) as stage:
        tasks = [
            join.remote(part, str(home / "items"), str(stage / f"part-{number:05}.parquet"), written)
            for number, part in enumerate(_parts(plan))
        ]
        with atomic_file(out / "errors.jsonl") as temporary, temporary.open("w", encoding="utf-8") as errors:
            for task in tasks:
                part, faults = ray.get(task)
                totals.add(part)
                errors.writelines(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults)
    return totals


def _stems(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """What files about recordings are called: their names without suffix, but where two would be called alike."""
    unique = names.unique()
    stems = pc.replace_substring_regex(unique, r"\.[^./]+$", "")
    counts = stems.value_counts()
    alike = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    told = pc.if_else(pc.is_in(stems, pc.struct_field(alike, "values")), unique, stems)
    return told.take(pc.index_in(names, unique))


def _parts(plan: pa.Table) -> Iterator[pa.Table]:
    """A plan in parts of whole recordings."""
    starts = pc.indices_nonzero(pc.equal(plan["index"], 0)).to_pylist()
    for first in range(0, len(starts), RECORDINGS_PER_TASK):
        end = starts[first + RECORDINGS_PER_TASK] if first + RECORDINGS_PER_TASK < len(starts) else len(plan)
        yield plan.slice(starts[first], end - starts[first]).combine_chunks()


def _join_part(plan: pa.Table, items: str, path: str, written: OutputSettings) -> tuple[Totals, list[dict[str, Any]]]:
    results = _results(plan, items)
    by_recording: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in plan.to_pylist():
        by_recording[row["recording"]].append(row | results[row["id"]])
    totals, faults = Totals(), []
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, TRANSCRIPTS) as writer:
        for name, parts in by_recording.items():
            row, transcript = _joined(name, parts, written)
            writer.write_table(pa.Table.from_pylist([row], TRANSCRIPTS))
            _count(totals, row, parts)
            faults += [_fault(part) for part in parts if part["error"]]
            if not row["error"]:
                _write_files(transcript, parts[0]["stem"], written)
    return totals, faults


def _results(plan: pa.Table, items: str) -> dict[str, dict[str, Any]]:
    wanted = set(plan["id"].to_pylist())
    tables = (pq.read_table(Path(items) / file, partitioning=None) for file in plan["file"].unique().to_pylist())
    return {row["id"]: row for table in tables for row in table.to_pylist() if row["id"] in wanted}


def _joined(name: str, parts: Sequence[dict[str, Any]], written: OutputSettings) -> tuple[dict[str, Any], Transcript]:
    segments = [_segment(values) for part in parts for values in part["segments"]]
    duration_s = sum(part["duration_s"] for part in parts)
    transcript = stitch(segments, duration_s=duration_s, model=written.model, aligner=written.aligner)
    errors = [_reason(part) for part in parts if part["error"]]
    row = {
        "id": name,
        "uri": parts[0]["uri"],
        "duration_s": duration_s,
        "text": transcript.text,
        "segments": transcript.to_dict()["segments"],
        "confidence": _confidence(transcript.segments),
        "flags": sorted({flag for segment in segments for flag in segment.flags}),
        "error": "; ".join(errors) or None,
        "model": written.model,
        "aligner": written.aligner,
        "read_s": sum(part["read_s"] for part in parts),
        "heard_s": sum(part["heard_s"] for part in parts),
    }
    return row, transcript


def _segment(values: dict[str, Any]) -> Segment:
    return Segment(
        **values | {"flags": tuple(values["flags"]), "words": tuple(Word(**word) for word in values["words"])}
    )


def _confidence(segments: Sequence[Segment]) -> float | None:
    """By the length of their texts: how many tokens each had is not kept."""
    told = [
        (segment.mean_logprob, len(segment.text))
        for segment in segments
        if segment.text and segment.mean_logprob is not None
    ]
    return math.exp(sum(mean * weight for mean, weight in told) / sum(weight for _, weight in told)) if told else None


def _count(totals: Totals, row: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
    totals.audio_s += row["duration_s"]
    totals.read_s += row["read_s"]
    totals.flagged.update(flag for segment in row["segments"] for flag in segment["flags"])
    if row["error"]:
        totals.failed[_kind(next(_reason(part) for part in parts if part["error"]))] += 1
    else:
        totals.done += 1


def _fault(part: dict[str, Any]) -> dict[str, Any]:
    """A line of errors.jsonl."""
    return {
        "recording": part["recording"],
        "uri": part["uri"],
        "start_s": part["start_s"],
        "end_s": part["end_s"],
        "error": _reason(part),
    }


def _reason(part: dict[str, Any]) -> str:
    return str(part["error"]).removeprefix(f"{name_of(part)}: ")


def _kind(reason: str) -> str:
    """A reason without its numbers and remedy, to count alike ones together."""
    return re.sub(r"\d[\d.,]*", "N", re.split(r"[:(]", reason)[0]).strip()


def _write_files(transcript: Transcript, stem: str, written: OutputSettings) -> None:
    for kind in written.formats:
        path = Path(written.folder) / f"{stem}.{kind}"
        write_atomic(path, format_transcript(transcript, kind, written.cues))
