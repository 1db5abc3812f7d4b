"""Texts for a corpus, from Whisper: out/texts.parquet (ID, text, ...), which `texts` of a data source names.

rows -> Whisper in a pool of actors -> a verb's line for each row -> out/parts/*.parquet -> out/texts.parquet, out/result.json
What a verb makes of a row is its own (jobs.format, jobs.label). A run that was cut off goes on: parts that are there are not heard again.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from graft.config import Recipe
from graft.data.settings import Sources
from graft.errors import DataError
from graft.storage.atomic import atomic_file, write_atomic

from ..common.cluster import connect
from ..common.outputs import claim_output, holds_results

if TYPE_CHECKING:
    from graft.data.dataset import RowTable

    from ..evaluation.asr_pool import AsrModelSpec, ClipTranscript

TEXTS_FILE = "texts.parquet"
RESULT_FILE = "result.json"
PARTS = "parts"
HOW = frozenset({"workers", "threads_per_worker", "gpu"})


class TextsRecipe(Recipe):
    """Whose texts to write, by whose ear."""

    data: Sources
    """Clips: parquet files, folders or globs, or {files, columns}."""
    out: str
    """Folder for texts.parquet; a run that was cut off goes on there."""
    model: str = "bundled"
    """The Whisper checkpoint that listens; `bundled` is Whisper base."""
    batch_clips: int = Field(default=32, ge=1)
    part_clips: int = Field(default=8192, ge=1)
    """Clips that are written at a time."""
    workers: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    dtype: Literal["fp32", "bf16"] = "fp32"
    gpu: bool = False


@dataclass(frozen=True)
class Verb:
    """What a job makes of rows."""

    name: str
    columns: Mapping[str, str]
    """Names and Arrow types of its lines' columns: ID, text and more."""
    wants: Callable[[str], bool]
    """Whether a row of this text is to be heard."""
    line: Callable[["RowTable", int, "ClipTranscript | None"], dict[str, Any]]
    """A row, and what was heard in it if it was wanted -> its line."""
    counts: Callable[[Path], dict[str, Any]]
    """texts.parquet -> what stands in result.json."""
    summary: Callable[[dict[str, Any]], str]
    """result.json in one line."""


def write_texts(recipe: TextsRecipe, verb: Verb) -> dict[str, Any]:
    """Write the texts of recipe.data; returns what stands in result.json. Raises DataError, ModelError, OutputError, MissingExtra."""
    from graft.data.dataset import read_rows

    from ..evaluation.asr_pool import AsrModelSpec, whisper_folder

    out = Path(recipe.out)
    if holds_results(recipe.out, recipe, ignore=HOW) and (out / RESULT_FILE).is_file():
        print(f"{verb.name}: {out} is done already")
        return json.loads((out / RESULT_FILE).read_text())
    whisper = whisper_folder(recipe.model)
    rows = read_rows(recipe.data)
    _check_ids(rows)
    claim_output(recipe.out, recipe, ignore=HOW)
    parts = [out / PARTS / f"part-{start:09}.parquet" for start in range(0, len(rows), recipe.part_clips)]
    listener = AsrModelSpec("whisper", whisper, recipe.dtype, recipe.gpu, recipe.threads_per_worker, recipe.workers)
    _write_parts(rows, parts, listener, recipe, verb)
    _join(parts, out / TEXTS_FILE, verb.columns)
    result = verb.counts(out / TEXTS_FILE)
    write_atomic(out / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    for part in parts:
        part.unlink()
    (out / PARTS).rmdir()
    print(f"{verb.name}: {verb.summary(result)}; see {out / TEXTS_FILE}", flush=True)
    return result


def report_untranscribed(rows: "RowTable", row: int, clip: "ClipTranscript") -> None:
    """Print why a clip can't be read."""
    print(f"graft: {rows.id(row)}: {clip.error}", file=sys.stderr)


def _check_ids(rows: "RowTable") -> None:
    if repeated := len(rows) - len(rows.ids.unique()):
        raise DataError(
            f"{repeated} rows have the ID of another one, by which texts are found again: give each its own, or columns.id=null"
        )


def _write_parts(
    rows: "RowTable", parts: Sequence[Path], listener: "AsrModelSpec", recipe: TextsRecipe, verb: Verb
) -> None:
    """Write the parts that are not there yet, each as soon as the last of its batches is heard."""
    spans = [
        range(start, min(start + recipe.part_clips, len(rows))) for start in range(0, len(rows), recipe.part_clips)
    ]
    batches, part_of_batch = [], []
    waiting: Counter[int] = Counter()
    for number, path in enumerate(parts):
        if path.is_file():
            continue
        to_hear = np.array([row for row in spans[number] if verb.wants(rows.text(row))], dtype=np.int64)
        # In file order: a row group is read once.
        mine = [to_hear[start : start + recipe.batch_clips] for start in range(0, len(to_hear), recipe.batch_clips)]
        batches += mine
        part_of_batch += [number] * len(mine)
        waiting[number] = len(mine)
        if not mine:
            _write_part(path, [verb.line(rows, row, None) for row in spans[number]], verb.columns)
    if not batches:
        return
    from ..evaluation.asr_pool import transcribe_rows

    connect()
    heard: defaultdict[int, dict[int, ClipTranscript]] = defaultdict(dict)
    for batch in transcribe_rows(listener, rows, batches):
        number = part_of_batch[batch.number]
        heard[number] |= zip(batches[batch.number].tolist(), batch.clips, strict=True)
        waiting[number] -= 1
        if not waiting[number]:
            clips = heard.pop(number)
            _write_part(parts[number], [verb.line(rows, row, clips.get(row)) for row in spans[number]], verb.columns)
            print(f"{verb.name}: {number + 1} of {len(parts)} parts", flush=True)


def _write_part(path: Path, lines: list[dict[str, Any]], columns: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(lines, schema=pa.schema(columns)), temporary)


def _join(parts: Sequence[Path], path: Path, columns: Mapping[str, str]) -> None:
    """Put the parts together in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, pa.schema(columns)) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
