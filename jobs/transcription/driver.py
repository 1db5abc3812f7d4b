"""Transcribe an archive: plan its work items, run those that are not done, join recordings and sum up."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from graft.checkpoints.names import checkpoint_name
from graft.errors import OutputError, RecipeError, require
from graft.inference.aligners.loading import find_aligner
from graft.storage.atomic import write_atomic

from ..common.cluster import connect
from ..common.outputs import claim_output
from .assembly import OutputSettings, Totals, join_recordings, read_index
from .discovery import find_recordings
from .models import Opener, model_opener
from .pipeline import Pipeline, Workers
from .reader import Reading
from .recipe import EXECUTION_KEYS, TranscribeRecipe
from .runs import run_plan
from .work_items import FILES_PER_TASK, at_attempts, durations, plan_items


def run(recipe: TranscribeRecipe) -> Totals:
    """Transcribe the recipe's recordings into its folder, or print them; returns totals.

    Raises DataError when there are none, ModelError, OutputError.
    """
    recordings = find_recordings([recipe.audio] if isinstance(recipe.audio, str) else recipe.audio, recipe.columns)
    _check_model(recipe)
    with _output_folder(recipe) as out:
        totals, summary = transcribe(recordings, recipe, out)
        if recipe.out is None:
            _print_transcripts(out)
        for line in _summary_lines(summary):
            print(line)
    return totals


def transcribe(
    recordings: pa.Table, recipe: TranscribeRecipe, out: Path, opener: Opener | None = None
) -> tuple[Totals, dict[str, Any]]:
    """Transcribe recordings (discovery.RECORDINGS) that are not done in `out`; returns totals and the summary.

    `opener` opens the model in each worker; by default it is the recipe's.
    """
    start = time.monotonic()
    aligner, aligner_name = find_aligner(recipe.aligner) if recipe.aligner else (None, None)
    workers = Workers(recipe.readers, recipe.workers, recipe.threads, recipe.gpus_per_worker, recipe.items_per_batch)
    connect(cpus=workers.cpus)
    home = out / "work"
    home.mkdir(exist_ok=True)
    done = read_index(home)
    items = plan_items(recordings, item_s=recipe.item_s, probe=_probe)
    plan = at_attempts(items, done, retry_errors=recipe.retry_errors)
    reading = Reading(recipe.speech, recipe.chunks, recipe.channels)
    options = {"instruction": recipe.instruction, "context": recipe.context}
    opener = opener or model_opener(
        "graft",
        recipe.model,
        threads=recipe.threads,
        gpu=recipe.gpus_per_worker > 0,
        dtype=recipe.dtype,
        engine=recipe.engine,
        quantization=recipe.quantization,
        aligner=aligner,
    )
    rtfx = run_plan(plan, done, home, Pipeline(reading, opener, workers, options))
    formats = recipe.formats if recipe.out else ()
    output = OutputSettings(str(out / "files"), formats, recipe.cues, checkpoint_name(recipe.model), aligner_name)
    totals = join_recordings(plan, read_index(home), home, out, output)
    summary = _summary(totals, rtfx, time.monotonic() - start, recipe.price)
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return totals, summary


def _check_model(recipe: TranscribeRecipe) -> None:
    """Check the model, the aligner, and what the model is asked for, before a cluster starts. Raises ModelError."""
    from graft.checkpoints.loading import check_graft, open_processor

    if recipe.quantization and recipe.engine != "vllm":
        raise RecipeError(f"quantization={recipe.quantization} goes with engine=vllm")
    if recipe.engine == "vllm":
        require("vllm", extra="vllm")
    check_graft(recipe.model)
    if recipe.instruction or recipe.context:
        open_processor(recipe.model).instruction(recipe.instruction, recipe.context)
    if recipe.aligner:
        find_aligner(recipe.aligner)


@contextlib.contextmanager
def _output_folder(recipe: TranscribeRecipe) -> Iterator[Path]:
    """Yield the folder of results: the recipe's own or, without one, a temporary folder."""
    if recipe.out is None:
        with tempfile.TemporaryDirectory(prefix="graft-transcripts-") as folder:
            yield Path(folder)
        return
    from graft.checkpoints.loading import model_digest

    digest = model_digest(recipe.model)
    if recipe.model_digest not in (None, digest):
        raise OutputError(
            f"model {recipe.model} is not the one that model_digest={recipe.model_digest} names: it is {digest}"
        )
    yield claim_output(recipe.out, recipe.model_copy(update={"model_digest": digest}), ignore=EXECUTION_KEYS).absolute()


def _probe(uris: Sequence[str]) -> list[float | None]:
    """Return the durations of files in seconds, asked in parallel; None where a file's is not known."""
    import ray

    ask = ray.remote(num_cpus=0.5)(durations)
    parts = [ask.remote(uris[start : start + FILES_PER_TASK]) for start in range(0, len(uris), FILES_PER_TASK)]
    return [seconds for part in parts for seconds in ray.get(part)]


def _summary(totals: Totals, rtfx: float | None, seconds: float, price: float | None) -> dict[str, Any]:
    return {
        "done": totals.done,
        "failed": sum(totals.failed.values()),
        "failed_by_reason": dict(totals.failed.most_common()),
        "flagged_segments": dict(totals.flagged.most_common()),
        "audio_hours": totals.audio_s / 3600,
        "rtfx": rtfx,
        "read_cpu_s_per_audio_s": totals.read_s / totals.audio_s if totals.audio_s else None,
        "cost_per_audio_hour": price / rtfx if price is not None and rtfx else None,
        "seconds": seconds,
    }


def _summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    rtfx, cost = summary["rtfx"], summary["cost_per_audio_hour"]
    speed = f", {rtfx:.1f} times as fast as real time in this run" if rtfx else ""
    if rtfx is None:
        speed = ", nothing was left to do"
    price = f", {cost:.4f} an hour of audio" if cost is not None else ""
    counts = f"{summary['done']} recordings done, {summary['failed']} failed"
    yield f"{counts}; {summary['audio_hours']:.2f} h of audio{speed}{price}"
    yield from (f"  failed: {count} x {reason}" for reason, count in summary["failed_by_reason"].items())
    yield from (f"  flagged: {count} segments {flag}" for flag, count in summary["flagged_segments"].items())


def _print_transcripts(out: Path) -> None:
    for path in sorted((out / "recordings").glob("*.parquet")):
        for row in pq.read_table(path, columns=["uri", "text", "error"], partitioning=None).to_pylist():
            if row["error"]:
                print(f"graft: {row['uri']}: {row['error']}", file=sys.stderr)
            else:
                print(f"{row['uri']}: {row['text']}")
