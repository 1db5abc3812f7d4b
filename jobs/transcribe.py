"""Archives of recordings of any length -> transcripts, on a Ray cluster; what is killed goes on when it is started again.

    audio -> recordings (archive) -> work items (items) -> Ray Data (bulk) -> recordings with text (results) -> a summary

out/ holds recordings/*.parquet, files/NAME.txt and the like, errors.jsonl, summary.json, and in work/ what later runs go on from.
"""

import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from graft.audio.chunking import ChunkSettings, windows
from graft.audio.vad import SpeechSettings
from graft.checkpoints.names import checkpoint_name, from_anywhere
from graft.config import Recipe
from graft.data.columns import Columns
from graft.errors import OutputError, RecipeError, require
from graft.inference.aligners.loading import find_aligner
from graft.inference.subtitles import CueLimits, Format
from graft.inference.transcriber import Transcriber, open_transcriber
from graft.storage.atomic import atomic_file, write_atomic

from .common.cli import run_job
from .common.cluster import connect
from .common.outputs import claim_output
from .transcription.assembly import OutputSettings, Totals, join_recordings, read_index
from .transcription.discovery import find_recordings
from .transcription.pipeline import Workers, transcribe_items
from .transcription.progress import BulkProgress
from .transcription.reader import Reading
from .transcription.work_items import FILES_PER_TASK, at_attempts, durations, plan_items

PARTLY_FAILED = 3
EXECUTION_KEYS = frozenset(
    {
        "workers",
        "threads",
        "gpus_per_worker",
        "readers",
        "items_per_batch",
        "formats",
        "cues",
        "strict",
        "retry_errors",
        "price",
    }
    | {f"cues.{name}" for name in CueLimits.model_fields}
)
"""Keys that change how transcripts come, and in which files, not what they say."""


class TranscribeRecipe(Recipe):
    """What jobs.transcribe does."""

    model: str
    """A graft's folder, a stage's output folder or a hub id."""
    model_digest: str | None = None
    """SHA-256 over its files; null: what is there. Results of another are never mixed with these."""
    audio: str | list[str]
    """Files, folders (at any depth), globs, s3:// and other URIs; .txt lists of them, one a line; parquet files with audio in them."""
    out: str | None = None
    """Folder for the transcripts; without it they are only printed."""
    columns: Columns = Columns()
    """What the columns of parquet files are called."""
    channels: Literal["mix", "split"] = "mix"
    """split transcribes every channel by itself, labels its segments and orders them by time: for calls with a speaker a side."""
    instruction: str | None = None
    """A text style (raw, lower, formatted) that the model was trained for, or a phrasing that asks for one; by default its own."""
    context: list[str] | None = None
    """Words that may occur (names, terms), where the model was trained for lists of words."""
    aligner: str | None = None
    """What times words: whisper (the bundled one), a folder or hub id of a Whisper or a CTC model; null: words have no times."""
    speech: SpeechSettings = SpeechSettings()
    chunks: ChunkSettings = ChunkSettings()
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the weights; by default as they are stored."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """vllm: the language model in vLLM, with its own batches (`pip install 'graft[vllm]'`)."""
    quantization: str | None = None
    """How vLLM quantizes the language model, such as fp8; null: not at all."""
    item_s: float = Field(default=1800.0, ge=10)
    """Seconds of audio in a work item, about: longer recordings are shared out, and a killed run loses no more."""
    formats: tuple[Format, ...] = ("txt", "json")
    """Files to write of each recording besides its parquet row."""
    cues: CueLimits = CueLimits()
    """How much a subtitle shows at a time."""
    workers: int = Field(default=1, ge=1)
    """Models that transcribe side by side."""
    threads: int = Field(default=1, ge=1)
    """CPU threads, and CPUs taken from the cluster, of each worker."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """0 transcribes on CPU."""
    readers: int = Field(default=1, ge=1)
    """Most processes that decode and look for speech; each takes a CPU."""
    items_per_batch: int = Field(default=16, ge=1)
    """Items that are read, heard and written together."""
    strict: bool = False
    """Whether the exit code is 3 if any recording failed."""
    retry_errors: bool = False
    """Whether recordings that failed in an earlier run are tried again."""
    price: float | None = Field(default=None, ge=0)
    """Of an hour on the whole cluster: the summary then tells the cost of an hour of audio."""


def main(recipe: TranscribeRecipe) -> int:
    """Transcribe the recipe's recordings; 3 if one failed and `strict` is on.

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
    return PARTLY_FAILED if recipe.strict and totals.failed else 0


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
        from_anywhere(recipe.model),
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


if __name__ == "__main__":
    raise SystemExit(run_job(TranscribeRecipe, main, summary="Transcribe archives of audio."))
