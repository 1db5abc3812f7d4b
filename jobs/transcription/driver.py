"""Transcribe an archive: plan its work items, run those that are not done, put recordings together and sum up."""

import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from graft.audio.chunking import windows
from graft.checkpoints.names import absolute_checkpoint, checkpoint_name
from graft.errors import OutputError, RecipeError, require
from graft.inference.aligners.loading import find_aligner
from graft.inference.transcriber import Transcriber, open_transcriber
from graft.storage.atomic import atomic_file, write_atomic

from ..common.cluster import connect
from ..common.outputs import claim_output
from .assembly import OutputSettings, Totals, join_recordings, read_index
from .discovery import find_recordings
from .pipeline import Workers, transcribe_items
from .progress import BulkProgress
from .reader import Reading
from .recipe import EXECUTION_KEYS, TranscribeRecipe
from .work_items import FILES_PER_TASK, at_attempts, durations, plan_items


def run(recipe: TranscribeRecipe) -> Totals:
    """Transcribe the recipe's recordings into its folder, or print them; returns totals.

    Raises DataError when there are none, ModelError, OutputError.
    """
    recordings = find_recordings([recipe.audio] if isinstance(recipe.audio, str) else recipe.audio, recipe.columns)
    _check_model(recipe)
    with _output(recipe) as out:
        totals, summary = transcribe(recordings, recipe, out)
        if recipe.out is None:
            _print_transcripts(out)
        for line in _told(summary):
            print(line)
    return totals


def transcribe(
    recordings: pa.Table, recipe: TranscribeRecipe, out: Path, opener: Callable[[], Transcriber] | None = None
) -> tuple[Totals, dict[str, Any]]:
    """Transcribe recordings (archive.RECORDINGS) into the folder `out`, but for what is done there; returns totals and the summary.

    Workers hear with what `opener` opens, by default the recipe's model.
    """
    start = time.monotonic()
    aligner = find_aligner(recipe.aligner) if recipe.aligner else (None, None)
    connect(cpus=recipe.readers + recipe.workers * recipe.threads + 2)
    home = out / "work"
    home.mkdir(exist_ok=True)
    done = read_index(home)
    plan = at_attempts(
        plan_items(recordings, item_s=recipe.item_s, probe=_probe), done, retry_errors=recipe.retry_errors
    )
    missing = plan.join(done.select(["item", "attempt"]), ["item", "attempt"], join_type="left anti").num_rows
    progress = BulkProgress(plan, done, home)
    if missing:
        with atomic_file(home / "plan.parquet") as temporary:
            pq.write_table(plan, temporary, row_group_size=50_000)
        with progress:
            transcribe_items(
                home / "plan.parquet",
                home,
                _reading(recipe),
                opener or _opener(recipe, aligner[0]),
                {"instruction": recipe.instruction, "context": recipe.context},
                _workers(recipe),
            )
    formats = recipe.formats if recipe.out else ()
    written = OutputSettings(str(out / "files"), formats, recipe.cues, checkpoint_name(recipe.model), aligner[1])
    totals = join_recordings(plan, read_index(home), home, out, written)
    summary = _summary(totals, progress.rtfx if missing else None, time.monotonic() - start, recipe.price)
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return totals, summary


def _check_model(recipe: TranscribeRecipe) -> None:
    """Refuse what is no graft or no aligner, and words that the model was not trained for, before a cluster starts."""
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
def _output(recipe: TranscribeRecipe) -> Iterator[Path]:
    """The folder of results: the recipe's own or, without one, a temporary folder."""
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
    """How long files are, asked in parallel."""
    import ray

    ask = ray.remote(num_cpus=0.5)(durations)
    parts = [ask.remote(uris[start : start + FILES_PER_TASK]) for start in range(0, len(uris), FILES_PER_TASK)]
    return [seconds for part in parts for seconds in ray.get(part)]


def _reading(recipe: TranscribeRecipe) -> Reading:
    return Reading(recipe.speech, recipe.chunks, recipe.channels, recipe.columns.audio)


def _opener(recipe: TranscribeRecipe, aligner: str | None) -> functools.partial[Transcriber]:
    return functools.partial(
        open_transcriber,
        absolute_checkpoint(recipe.model),
        chunker=windows,  # the readers cut the audio; workers get chunks
        threads=recipe.threads,
        device="cuda" if recipe.gpus_per_worker else "cpu",
        dtype=recipe.dtype,
        engine=recipe.engine,
        quantization=recipe.quantization,
        aligner=aligner,
    )


def _workers(recipe: TranscribeRecipe) -> Workers:
    return Workers(recipe.readers, recipe.workers, recipe.threads, recipe.gpus_per_worker, recipe.items_per_batch)


def _summary(totals: Totals, rtfx: float | None, seconds: float, price: float | None) -> dict[str, Any]:
    cost = price / rtfx if price is not None and rtfx else None
    return {
        "done": totals.done,
        "failed": sum(totals.failed.values()),
        "failed_by_reason": dict(totals.failed.most_common()),
        "flagged_segments": dict(totals.flagged.most_common()),
        "audio_hours": totals.audio_s / 3600,
        "rtfx": rtfx,
        "read_cpu_s_per_audio_s": totals.read_s / totals.audio_s if totals.audio_s else None,
        "cost_per_audio_hour": cost,
        "seconds": seconds,
    }


def _told(summary: dict[str, Any]) -> Iterator[str]:
    """The summary in a few lines."""
    rtfx, cost = summary["rtfx"], summary["cost_per_audio_hour"]
    speed = (
        ", nothing was left to do"
        if rtfx is None
        else f", {rtfx:.1f} times as fast as real time in this run"
        if rtfx
        else ""
    )
    price = f", {cost:.4f} an hour of audio" if cost is not None else ""
    yield f"{summary['done']} recordings done, {summary['failed']} failed; {summary['audio_hours']:.2f} h of audio{speed}{price}"
    yield from (f"  failed: {count} x {reason}" for reason, count in summary["failed_by_reason"].items())
    yield from (f"  flagged: {count} segments {flag}" for flag, count in summary["flagged_segments"].items())


def _print_transcripts(out: Path) -> None:
    for path in sorted((out / "recordings").glob("*.parquet")):
        for row in pq.read_table(path, columns=["uri", "text", "error"], partitioning=None).to_pylist():
            if row["error"]:
                print(f"graft: {row['uri']}: {row['error']}", file=sys.stderr)
            else:
                print(f"{row['uri']}: {row['text']}")
