"""Write texts for a corpus with Whisper: out/texts.parquet (ID, text, ...), which `texts` of a data source names.

rows -> the rows that need a transcript, in windows through the bulk pipeline -> a line of the command for each row
     -> out/texts.parquet, out/result.json

Each command decides which rows it transcribes and what it writes of them (jobs.format, jobs.label). A run that was cut
off goes on: clips whose results are in out/work are not transcribed again.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from graft.config import Recipe
from graft.data.settings import Sources
from graft.errors import DataError
from graft.keys import Checkpoint, DataKey, MachineKey, ModelKey, OutputKey
from graft.storage.atomic import atomic_file, write_atomic

from ..common.outputs import claim_output, holds_results, locked_output
from ..transcription import Auto, ClipTranscript

TEXTS_FILE, RESULT_FILE, WORK_FOLDER = "texts.parquet", "result.json", "work"
EXECUTION_KEYS = frozenset({"readers", "workers", "threads_per_worker", "gpu"})
"""Keys that change how texts are made, not what they say."""


class TextsRecipe(Recipe):
    """The clips that get texts, and the model that transcribes them."""

    data: DataKey[Sources]
    """Clips: parquet files, folders or globs, or {files, columns}."""
    language: DataKey[str | None] = None
    """Language of the clips of which the data names none, such as de (ISO 639-1); a Whisper that is told none finds it
    out for each clip."""
    out: OutputKey[str]
    """Folder for texts.parquet, which every machine of a cluster must see; a run that was cut off goes on there."""
    model: ModelKey[Checkpoint] = "whisper"
    """Model that transcribes: folder or hub id of a Whisper checkpoint or of a graft; `whisper` is the bundled Whisper
    base."""
    batch_clips: MachineKey[int] = Field(default=32, ge=1)
    """Number of clips that a worker reads and transcribes together."""
    part_clips: OutputKey[int] = Field(default=8192, ge=1)
    """Number of rows that are written to texts.parquet at a time."""
    readers: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """Most processes that decode audio, with one CPU each; auto is one for each CPU
    that the workers leave."""
    workers: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """Number of models that transcribe side by side; auto is one for each GPU, and without GPUs one for each machine,
    or for each 16 of its CPUs."""
    threads_per_worker: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """CPU threads of each worker, and CPUs that it takes from the cluster; auto is 1 beside a GPU, and else its
    share of a machine's CPUs, of which one is left to a reader."""
    dtype: ModelKey[Literal["fp32", "bf16", "int8"]] = "fp32"
    """Precision of the weights. int8 is for CPUs with VNNI or AMX, where it is about twice as fast as fp32."""
    gpu: MachineKey[bool | Auto] = "auto"
    """Whether each worker takes a GPU; auto takes GPUs where there are any."""


def write_texts(
    recipe: TextsRecipe,
    name: str,
    *,
    columns: Mapping[str, str],
    needs_transcript: Callable[[str], bool],
    line: Callable[[str, ClipTranscript | None, str | None], dict[str, Any]],
    report: Callable[[Path], tuple[dict[str, Any], str]],
) -> None:
    """Write the texts of recipe.data for the command `name`, and result.json, unless that is done already.

    columns           names and Arrow types of the columns of texts.parquet: ID, text and more
    needs_transcript  whether a row with this text is transcribed
    line              a row's text, its transcript if it needed one, and its language where that is known
                      -> its line of texts.parquet, without ID
    report            texts.parquet -> the content of result.json, and one line for people

    Raises DataError, also where none of the clips to transcribe can be read and these are most of all, ModelError,
    OutputError, MissingExtra.
    """
    if holds_results(recipe.out, recipe, ignore=EXECUTION_KEYS) and Path(recipe.out, RESULT_FILE).is_file():
        print(f"{name}: {recipe.out} is done already")
        return
    with locked_output(recipe.out):
        summary = _write_texts(recipe, columns, needs_transcript, line, report)
    print(f"{name}: {summary}; see {Path(recipe.out) / TEXTS_FILE}", flush=True)


def _write_texts(
    recipe: TextsRecipe,
    columns: Mapping[str, str],
    needs_transcript: Callable[[str], bool],
    line: Callable[[str, ClipTranscript | None, str | None], dict[str, Any]],
    report: Callable[[Path], tuple[dict[str, Any], str]],
) -> str:
    """Write what write_texts says; returns the report's line for people."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from graft.checkpoints.loading import check_model
    from graft.data.dataset import read_rows

    from ..transcription.machine import AskedWorkers, connect_workers
    from ..transcription.pipeline import Pipeline, languages_for_model, model_opener, transcribe_rows
    from ..transcription.reader import WINDOWS

    out = Path(recipe.out).absolute()
    check_model(recipe.model)
    counts = recipe.readers, recipe.workers, recipe.threads_per_worker, recipe.gpu, recipe.batch_clips
    asked = AskedWorkers(*counts, recipe.dtype)
    asked.check()
    rows = read_rows(recipe.data, language=recipe.language)
    if repeated := len(rows) - len(rows.ids.unique()):
        raise DataError(
            f"{repeated} rows have the ID of another one, by which texts are found again: "
            "give each its own, or columns.id=null"
        )
    is_needed = np.array([needs_transcript(rows.text(row)) for row in range(len(rows))])
    unlabelled = languages_for_model(rows.select(is_needed), recipe.model)
    claim_output(recipe.out, recipe, ignore=EXECUTION_KEYS)
    clips: Iterator[ClipTranscript] = iter(())
    failures: list[str] = []
    if is_needed.any():
        workers = connect_workers(asked)
        opener = model_opener(recipe.model, **workers.model_settings, dtype=recipe.dtype)
        clips = transcribe_rows(unlabelled, out / WORK_FOLDER, Pipeline(WINDOWS, opener, workers))
    with atomic_file(out / TEXTS_FILE) as temporary, pq.ParquetWriter(temporary, pa.schema(columns)) as writer:
        for start in range(0, len(rows), recipe.part_clips):
            lines = []
            for row in range(start, min(start + recipe.part_clips, len(rows))):
                clip = next(clips) if is_needed[row] else None
                if clip and clip.error:
                    failures.append(f"{rows.id(row)}: {clip.error}")
                    print(f"graft: {rows.id(row)}: {clip.error}", file=sys.stderr)
                lines.append({"ID": rows.id(row)} | line(rows.text(row), clip, rows.language_of(row)))
            writer.write_table(pa.Table.from_pylist(lines, schema=writer.schema))
        if len(failures) == is_needed.sum() > len(rows) / 2:
            shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)  # the next run tries again
            raise DataError(f"none of the {len(failures)} clips to transcribe can be read; the first: {failures[0]}")
    result, summary = report(out / TEXTS_FILE)
    write_atomic(out / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
    return summary
