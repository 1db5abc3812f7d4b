"""Labels -> labels with case and punctuation, as Whisper hears them: writes texts.parquet (ID, text), which `texts` of a source names.

rows -> Whisper in a pool of actors -> aligned with the labels, words kept -> out/parts/*.parquet -> out/texts.parquet
A row keeps its label where it is formatted already, can't be heard, or agrees too little with what is heard.
A run that was cut off goes on.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from graft.config import Recipe
from graft.corpus import RowTable, Sources, read_rows
from graft.errors import DataError, require
from graft.formatting import take_format
from graft.prompts import is_formatted
from jobs.cli import run_job
from jobs.cluster import connect
from jobs.hearing import Listener, hear, whisper_folder
from jobs.outputs import claim_output, holds_results, write_atomic

TEXTS_FILE = "texts.parquet"
RESULT_FILE = "result.json"
PARTS = "parts"
HOW = frozenset({"workers", "threads_per_worker", "gpu"})
SCHEMA = pa.schema([("ID", pa.string()), ("text", pa.string()), ("words", pa.int32()), ("agreed", pa.int32()), ("state", pa.string())])
FORMATTED, KEPT, OWN, UNHEARD = "formatted", "kept", "own", "unheard"
"""States of a row: formatted here; its label kept for want of agreement, or being formatted or empty already; audio not readable."""


class FormatRecipe(Recipe):
    """What to format, by whose ear."""

    data: Sources
    """Labelled clips: parquet files, folders or globs, or {files, columns}."""
    out: str
    """Folder for texts.parquet; a run that was cut off goes on there."""
    model: str = "bundled"
    """The Whisper checkpoint that listens; `bundled` is Whisper base."""
    least_agreement: float = Field(default=0.7, ge=0, le=1)
    """A row with a smaller share of words heard as they are labelled keeps its label."""
    batch_clips: int = Field(default=32, ge=1)
    part_clips: int = Field(default=8192, ge=1)
    """Clips that are written at a time."""
    workers: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    dtype: Literal["fp32", "bf16"] = "fp32"
    gpu: bool = False


def run(recipe: FormatRecipe) -> dict[str, Any]:
    """Format recipe.data; returns what stands in result.json. Raises DataError, ModelError, OutputError, MissingExtra."""
    out = Path(recipe.out)
    if holds_results(recipe.out, recipe, ignore=HOW) and (out / RESULT_FILE).is_file():
        print(f"format: {out} is done already")
        return json.loads((out / RESULT_FILE).read_text())
    require("jiwer", extra="score")
    whisper = whisper_folder(recipe.model)
    rows = read_rows(recipe.data)
    _check_ids(rows)
    claim_output(recipe.out, recipe, ignore=HOW)
    (out / PARTS).mkdir(exist_ok=True)
    parts = [out / PARTS / f"part-{start:09}.parquet" for start in range(0, len(rows), recipe.part_clips)]
    _format_parts(rows, parts, Listener("whisper", whisper, recipe.dtype, recipe.gpu, recipe.threads_per_worker, recipe.workers), recipe)
    result = _join(parts, out / TEXTS_FILE)
    write_atomic(out / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    for part in parts:
        part.unlink()
    (out / PARTS).rmdir()
    print(_line(result, out), flush=True)
    return result


def _check_ids(rows: RowTable) -> None:
    if repeated := len(rows) - len(rows.ids.unique()):
        raise DataError(
            f"{repeated} rows have the ID of another one, by which texts are found again: give each its own, or columns.id=null"
        )


def _format_parts(rows: RowTable, parts: Sequence[Path], listener: Listener, recipe: FormatRecipe) -> None:
    """Write the parts that are not there yet, each as soon as the last of its batches is heard."""
    batches, part_of_batch = [], []
    waiting: Counter[int] = Counter()
    for number, path in enumerate(parts):
        if path.is_file():
            continue
        span = range(number * recipe.part_clips, min((number + 1) * recipe.part_clips, len(rows)))
        to_hear = np.array([row for row in span if (text := rows.text(row)).strip() and not is_formatted(text)], dtype=np.int64)
        # In file order: a row group is read once.
        mine = [to_hear[start : start + recipe.batch_clips] for start in range(0, len(to_hear), recipe.batch_clips)]
        batches += mine
        part_of_batch += [number] * len(mine)
        waiting[number] = len(mine)
        if not mine:
            _write_part(path, [_kept(rows, row) for row in span])
    if not batches:
        return
    connect()
    heard: defaultdict[int, dict[int, tuple[str, str]]] = defaultdict(dict)
    for batch in hear(listener, rows, batches):
        number = part_of_batch[batch.number]
        heard[number] |= zip(batches[batch.number].tolist(), batch.texts, strict=True)
        waiting[number] -= 1
        if not waiting[number]:
            span = range(number * recipe.part_clips, min((number + 1) * recipe.part_clips, len(rows)))
            _write_part(parts[number], [_written(rows, row, heard[number], recipe.least_agreement) for row in span])
            print(f"format: {number + 1} of {len(parts)} parts", flush=True)
            del heard[number]


def _written(rows: RowTable, row: int, heard: Mapping[int, tuple[str, str]], least: float) -> dict[str, Any]:
    if row not in heard:
        return _kept(rows, row)
    transcript, error = heard[row]
    if error:
        print(f"graft: {rows.id(row)}: {error}", file=sys.stderr)
        return _kept(rows, row, UNHEARD)
    formatted = take_format(rows.text(row), transcript)
    counts = {"words": formatted.words, "agreed": formatted.agreed}
    if formatted.agreement < least:
        return {**_kept(rows, row, KEPT), **counts}
    return {"ID": rows.id(row), "text": formatted.text, **counts, "state": FORMATTED}


def _kept(rows: RowTable, row: int, state: str = OWN) -> dict[str, Any]:
    return {"ID": rows.id(row), "text": rows.text(row), "words": 0, "agreed": 0, "state": state}


def _write_part(path: Path, lines: list[dict[str, Any]]) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())


def _join(parts: Sequence[Path], path: Path) -> dict[str, Any]:
    """Put the parts together in order, and count what became of the rows."""
    states: Counter[str] = Counter()
    words = agreed = 0
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, SCHEMA) as writer:
        for part in parts:
            table = pq.read_table(part)
            writer.write_table(table)
            states.update(table["state"].to_pylist())
            words += table["words"].to_numpy().sum()
            agreed += table["agreed"].to_numpy().sum()
    temporary.replace(path)
    return {
        "clips": states.total(),
        **{state: states[state] for state in (FORMATTED, KEPT, OWN, UNHEARD)},
        "agreement": agreed / max(1, words),
    }


def _line(result: Mapping[str, Any], out: Path) -> str:
    return (
        f"format: {result['agreement']:.1%} of the words heard agree; of {result['clips']} clips {result[FORMATTED]} are formatted, "
        f"{result[KEPT]} agree too little and keep their label, {result[OWN]} needed nothing, {result[UNHEARD]} could not be read; "
        f"see {out / TEXTS_FILE}"
    )


def main(recipe: FormatRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(FormatRecipe, main, summary="Give labels the case and punctuation that Whisper hears."))
