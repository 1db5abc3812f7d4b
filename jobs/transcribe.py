"""Transcribe recordings of any length, a few files or archives.

audio -> recordings (discovery) -> work items -> their text, on Ray Data (pipeline) -> recordings with text (assembly)

out/ holds recordings/*.parquet, files/NAME.txt and the like, errors.jsonl, skipped.jsonl, summary.json, and in work/
the results that later runs go on from.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.checkpoints.names import checkpoint_name
from graft.config import Recipe
from graft.data.settings import Columns
from graft.errors import AudioError, AudioTrackError, OutputError, RecipeError, require
from graft.imports import import_heavy
from graft.inference.aligners.loading import find_aligner
from graft.inference.subtitles import CueLimits, Format
from graft.keys import Checkpoint, DataKey, Location, MachineKey, ModelKey, OutputKey
from graft.storage.atomic import write_atomic
from graft.text.languages import language_code

from .common.cli import disk_fault, run_job
from .common.console import printable
from .common.inputs import check_inputs
from .common.outputs import claim_output, locked_output
from .transcription import Auto
from .transcription.plan_options import TranscriptionPlanOptions

if TYPE_CHECKING:
    import pyarrow as pa

    from .transcription.assembly import Totals
    from .transcription.machine import AskedWorkers
    from .transcription.pipeline import Opener, Workers
    from .transcription.printing import TranscriptPrinter
    from .transcription.reader import Reading

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
"""Keys that change how a run works and which files it writes, not what the transcripts say."""


class TranscribeRecipe(Recipe):
    """The audio to transcribe, the model, and how the run works."""

    model: ModelKey[Checkpoint] = "small"
    """Folder or hub id of a graft or of a Whisper checkpoint, the output folder of a stage, the name of a graft that
    comes with the package, or `whisper`, the bundled Whisper base."""
    model_digest: ModelKey[str | None] = None
    """SHA-256 over the model's files, which a run checks; null takes the model as it is. Results of different models
    are never mixed."""
    audio: DataKey[Location | list[Location]]
    """Files, folders (at any depth), globs, s3:// and other URIs, .txt lists of them with one in each line, optionally
    with a tab and its language, and parquet files with audio in them."""
    out: OutputKey[str | None] = None
    """Folder for the transcripts, which every machine of a cluster must see; null only prints them."""
    columns: DataKey[Columns] = Columns()
    """Names of the columns of parquet files."""
    audio_track: DataKey[int | str | None] = None
    """Which audio track is transcribed of files that have several: its number among them, from 1, or its language as
    the files write it, such as deu; null takes the one that a file marks as default, or its first."""
    channels: DataKey[Literal["mix", "split"]] = "mix"
    """mix transcribes the mean of all channels; split transcribes each by itself and orders the labelled segments by
    time, for calls with one speaker on each channel."""
    instruction: ModelKey[str | None] = None
    """Text style (raw, lower, formatted) that the model was trained for, or a phrasing that asks for one; null takes
    the model's own."""
    language: ModelKey[str | None] = None
    """Language of the recordings of which a list or columns.language names none, such as de (ISO 639-1), for a model
    whose prompt can name it; a Whisper that is told none finds it out, for each recording or part of item_s."""
    context: ModelKey[list[str] | None] = None
    """Words that may occur (names, terms), for a model that was trained for lists of words."""
    aligner: ModelKey[Checkpoint | None] = None
    """Model that finds the times of words: whisper (the bundled one), or folder or hub id of a Whisper or a CTC model;
    with null, words have no times."""
    speech: DataKey[SpeechSettings] = SpeechSettings()
    """How speech is found in the audio."""
    chunks: DataKey[ChunkSettings] = ChunkSettings()
    """How speech is cut into chunks for the model."""
    dtype: ModelKey[Literal["fp32", "bf16", "int8"] | None] = None
    """Precision of the weights; null takes the one that they are stored in. int8 is for CPUs with VNNI or AMX, where it
    is about twice as fast as fp32."""
    engine: ModelKey[Literal["transformers", "vllm"]] = "transformers"
    """Engine of a graft's language model; vllm schedules its own batches and needs the extra `vllm`."""
    quantization: ModelKey[str | None] = None
    """Method by which vLLM quantizes the language model, such as fp8; null does not quantize it."""
    item_s: DataKey[float] = Field(default=1800.0, ge=10)
    """Approximate seconds of audio in a work item. Longer recordings are shared out to several workers, and a killed
    run loses at most the items that it was transcribing."""
    formats: OutputKey[tuple[Format, ...]] = ("txt", "json")
    """Formats of the files that are written for each recording besides its parquet row. Without out, the text is
    printed, or a single recording in the one format that is given."""
    cues: OutputKey[CueLimits] = CueLimits()
    """How much text a subtitle shows at a time."""
    workers: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """Number of models that transcribe side by side; auto is one for each GPU, and without GPUs one for each machine,
    or for each 16 of its CPUs."""
    threads: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """CPU threads of each worker, and CPUs that it takes from the cluster; auto is 1 beside a GPU, and else its
    share of a machine's CPUs, of which one is left to a reader."""
    gpus_per_worker: MachineKey[Annotated[float, Field(ge=0)] | Auto] = "auto"
    """GPUs, or share of one, that each worker takes; 0 transcribes on CPUs, auto on GPUs where there are any."""
    readers: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """Most processes that decode audio and find speech, with one CPU each; auto is one for each CPU
    that the workers leave."""
    items_per_batch: MachineKey[int] = Field(default=16, ge=1)
    """Number of items that are read, transcribed and written together."""
    strict: OutputKey[bool] = False
    """Whether the exit code is 3 if a recording failed."""
    retry_errors: OutputKey[bool] = False
    """Whether recordings that failed in an earlier run are tried again."""
    price: MachineKey[float | None] = Field(default=None, ge=0)
    """Price of an hour of the whole cluster in your currency; the summary then has the cost of an hour of audio."""


def run(recipe: TranscribeRecipe) -> int:
    """Transcribe the recipe's recordings into its folder, or print them; returns 3 if one failed and `strict` is on.

    Raises DataError when there are none, ModelError, OutputError.
    """
    from .transcription.reporting import first_failures, summary_lines

    if "model" not in recipe.model_fields_set:
        print(f"graft: model={recipe.model} is taken, a graft that comes with the package", file=sys.stderr)
    _check_track(_sources(recipe), recipe.audio_track)
    failures: list[str] = []
    if recipe.out is None:
        summary, lines = _print_transcripts(_sources(recipe), recipe), sys.stderr
    else:
        with locked_output(recipe.out):
            summary, lines = _write_transcripts(recipe, recipe.out), sys.stdout
            failures = first_failures(Path(recipe.out))
    print("\n".join(map(printable, summary_lines(summary, failures))), file=lines)
    return PARTLY_FAILED if summary["failed"] and recipe.strict else 0


def _write_transcripts(recipe: TranscribeRecipe, out: str) -> dict[str, Any]:
    """Transcribe the recipe's recordings into the folder `out`; returns the summary."""
    from .transcription.discovery import discover
    from .transcription.local import are_for_ray, is_too_long
    from .transcription.reporting import say_skipped
    from .transcription.work_items import durations, plan_items

    found = discover(_sources(recipe), recipe.columns, results=out)
    _check_model(recipe, found.recordings)
    folder = _claim_output(recipe, out)
    say_skipped(found.skipped, folder)
    if (reason := are_for_ray(found.recordings, recipe.workers, folder / "work")) is None:
        items = plan_items(found.recordings, item_s=recipe.item_s, probe=durations)
        if (reason := is_too_long(items)) is None:
            return transcribe(found.recordings, recipe, folder, items_here=items)
    print(f"graft: transcribing on Ray, because {reason}", flush=True)
    return transcribe(found.recordings, recipe, folder)


def plan(recipe: TranscribeRecipe, options: TranscriptionPlanOptions) -> None:
    """Print the hours, the cost and the memory that a run is estimated to take."""
    from .build import planned_model
    from .transcription.discovery import find_recordings
    from .transcription.estimate import PlannedRun, assumed_audio, measure_recordings, planned_workers, print_plan

    check_inputs(recipe)
    audio = assumed_audio(options, "audio")
    if recipe.audio is not None:
        audio = measure_recordings(find_recordings(_sources(recipe), recipe.columns), options)
    planned = PlannedRun(
        [planned_model(recipe.model, recipe.dtype)],
        audio,
        planned_workers(_asked_workers(recipe), options),
        longest_s=recipe.chunks.max_s,
        is_detected=recipe.speech.detector == "silero",
        price=recipe.price,
    )
    print_plan(planned, options)


def transcribe(
    recordings: "pa.Table",
    recipe: TranscribeRecipe,
    out: Path,
    opener: "Opener | None" = None,
    *,
    items_here: "pa.Table | None" = None,
) -> dict[str, Any]:
    """Transcribe recordings (discovery.RECORDINGS) that are not done in `out`; returns the summary.

    `opener` opens the model in each worker; by default it is the recipe's. Where `items_here`, the recordings' work
    items, are given, they are transcribed in this process, else on Ray.
    """
    from .transcription.assembly import open_results
    from .transcription.local import transcribe_items_here
    from .transcription.machine import connect_workers, describe_one, this_machine
    from .transcription.pipeline import Pipeline, run_plan, transcribe_items
    from .transcription.recordings import OutputSettings, RecordingWriter
    from .transcription.tasks import RayTasks, TasksHere
    from .transcription.work_items import at_attempts, plan_items

    start = time.monotonic()
    aligner, aligner_name = find_aligner(recipe.aligner) if recipe.aligner else (None, None)
    is_here = items_here is not None
    if items_here is None:
        workers = connect_workers(_asked_workers(recipe), trains=False)
        items = plan_items(recordings, item_s=recipe.item_s, probe=_probe)
    else:
        workers, items = _asked_workers(recipe).choose(this_machine()), items_here
        print(f"graft: transcribing in this process, {describe_one(workers)}", flush=True)
    home = out / "work"
    home.mkdir(exist_ok=True)
    done = open_results(home)
    plan = at_attempts(items, done, retry_errors=recipe.retry_errors)
    pipeline = Pipeline(_reading(recipe), opener or _opener(recipe, aligner, workers), workers, _options(recipe))
    formats = recipe.formats if recipe.out else ()
    output = OutputSettings(str(out / "files"), formats, recipe.cues, checkpoint_name(recipe.model), aligner_name)
    with _saying_what_is_kept(plan, out) if recipe.out else contextlib.nullcontext():
        with RecordingWriter(plan, done, home, out, output, TasksHere if is_here else RayTasks) as written:
            rtfx = run_plan(plan, done, home, pipeline, transcribe_items_here if is_here else transcribe_items)
        summary = _summary(recipe, written.totals, rtfx, time.monotonic() - start)
        write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


@contextlib.contextmanager
def _saying_what_is_kept(plan: "pa.Table", out: Path) -> Iterator[None]:
    """Say how many items of a plan are kept in `out` where the run is interrupted, or its disk is full.

    Raises OutputError for the disk.
    """
    import pyarrow.compute as pc

    from .transcription.assembly import read_index

    def kept() -> str:
        count = pc.sum(pc.is_in(plan["id"], read_index(out / "work")["id"])).as_py() or 0
        return f"{count} of {len(plan)} work items are kept in {out}"

    try:
        yield
    except KeyboardInterrupt:
        print(f"graft: {kept()}: the same command goes on from there", file=sys.stderr)
        raise
    except Exception as error:
        fault = disk_fault(error, out)
        if fault is None:
            raise
        what = kept() if (out / "work").is_dir() else "what is done is kept there"
        raise OutputError(f"{fault}: {what}; mend that, then the same command goes on from there") from error


def _reading(recipe: TranscribeRecipe) -> "Reading":
    from .transcription.reader import Reading

    return Reading(recipe.speech, recipe.chunks, recipe.channels, recipe.audio_track)


def _options(recipe: TranscribeRecipe) -> dict[str, Any]:
    told = {"language": language_code(recipe.language)} if recipe.language else {}
    return {"instruction": recipe.instruction, "context": recipe.context, **told}


def _opener(recipe: TranscribeRecipe, aligner: str | None, workers: "Workers") -> "Opener":
    from .transcription.pipeline import model_opener

    return model_opener(
        recipe.model,
        **workers.model_settings,
        dtype=recipe.dtype,
        engine=recipe.engine,
        quantization=recipe.quantization,
        aligner=aligner,
    )


def _summary(recipe: TranscribeRecipe, totals: "Totals", rtfx: float | None, seconds: float) -> dict[str, Any]:
    return {
        "done": totals.done,
        "failed": totals.failed.total(),
        "failed_by_reason": dict(totals.failed.most_common()),
        "flagged_segments": dict(totals.flagged.most_common()),
        "flagged_recordings": dict(totals.defective.most_common()),
        "audio_hours": totals.audio_s / 3600,
        "rtfx": rtfx,
        "read_cpu_s_per_audio_s": totals.read_s / totals.audio_s if totals.audio_s else None,
        "cost_per_audio_hour": recipe.price / rtfx if recipe.price is not None and rtfx else None,
        "seconds": seconds,
    }


def _sources(recipe: TranscribeRecipe) -> list[str]:
    return [recipe.audio] if isinstance(recipe.audio, str) else recipe.audio


def _asked_workers(recipe: TranscribeRecipe) -> "AskedWorkers":
    from .transcription.machine import AskedWorkers

    counts = recipe.readers, recipe.workers, recipe.threads, recipe.gpus_per_worker, recipe.items_per_batch
    return AskedWorkers(*counts, recipe.dtype)


def _check_track(sources: Sequence[str], track: int | str | None) -> None:
    """Raise AudioTrackError where a single file that is named lacks the audio track; the run reports other faults."""
    from graft.audio.spans import probe

    if track is not None and len(sources) == 1 and os.path.isfile(sources[0]):
        try:
            probe(sources[0], track=track)
        except AudioTrackError:
            raise
        except AudioError:
            pass


def _check_model(recipe: TranscribeRecipe, recordings: "pa.Table | None" = None) -> None:
    """Check the model, the aligner, and what the model is asked for, before a cluster starts. Raises ModelError.

    The languages of `recordings` (discovery.RECORDINGS) are checked, too.
    """
    if recipe.quantization and recipe.engine != "vllm":
        raise RecipeError(f"quantization={recipe.quantization} goes with engine=vllm")
    import_heavy("graft.checkpoints.loading")
    from graft.checkpoints.loading import check_model, open_speech_processor

    check_model(recipe.model, engine=recipe.engine)
    _asked_workers(recipe).check(engine=recipe.engine)
    if recipe.engine == "vllm":
        require("vllm", extra="vllm")
    if recipe.instruction or recipe.context or recipe.language:
        open_speech_processor(recipe.model).instruction(recipe.instruction, recipe.context, recipe.language)
    if recordings is not None and recordings["language"].null_count < len(recordings):
        from .transcription.pipeline import check_languages

        check_languages(
            {one["values"]: one["counts"] for one in recordings["language"].value_counts().to_pylist()}, recipe.model
        )
    if recipe.aligner:
        find_aligner(recipe.aligner)


def _claim_output(recipe: TranscribeRecipe, out: str) -> Path:
    """Make the folder of results this recipe's with this model, or raise OutputError."""
    from graft.checkpoints.loading import model_digest

    digest = model_digest(recipe.model)
    if recipe.model_digest not in (None, digest):
        raise OutputError(
            f"model {recipe.model} is not the one that model_digest={recipe.model_digest} names: it is {digest}"
        )
    return claim_output(out, recipe.model_copy(update={"model_digest": digest}), ignore=EXECUTION_KEYS).absolute()


def _probe(uris: Sequence[str]) -> list[float | None]:
    """Return the durations of files in seconds, asked in parallel; None where a file's is not known."""
    import ray

    from .transcription.work_items import FILES_PER_TASK, durations

    ask = ray.remote(num_cpus=0.5)(durations)
    parts = [ask.remote(uris[start : start + FILES_PER_TASK]) for start in range(0, len(uris), FILES_PER_TASK)]
    return [seconds for part in parts for seconds in ray.get(part)]


def _print_transcripts(sources: Sequence[str], recipe: TranscribeRecipe) -> dict[str, Any]:
    """Transcribe recordings and print them; returns the summary. Few local files are transcribed in this process."""
    from .transcription.discovery import discover
    from .transcription.local import is_too_long, local_plan, needs_ray
    from .transcription.reporting import say_skipped

    if (reason := needs_ray(sources, recipe.workers)) is None:
        plan = local_plan(sources, item_s=recipe.item_s)
        if (reason := is_too_long(plan)) is None:
            return _print_from_here(plan, len(sources), recipe)
    recordings, skipped = discover(sources, recipe.columns)
    printer = _printer(recipe, len(recordings))
    _check_model(recipe, recordings)
    say_skipped(skipped, None)
    print(f"graft: transcribing on Ray, because {reason}", file=sys.stderr, flush=True)
    return _print_from_ray(recordings, recipe, printer)


def _printer(recipe: TranscribeRecipe, recording_count: int) -> "TranscriptPrinter":
    """Return what prints recordings. Raises RecipeError for formats that only files can have."""
    from .transcription.printing import TranscriptPrinter, printed_format

    form = printed_format(recipe.formats if "formats" in recipe.model_fields_set else ("txt",), recording_count)
    is_split = recipe.channels == "split"
    return TranscriptPrinter(form, recipe.cues, recording_count=recording_count, splits_channels=is_split)


def _print_from_here(plan: "pa.Table", recording_count: int, recipe: TranscribeRecipe) -> dict[str, Any]:
    from .transcription.assembly import Totals, join_errors, join_items
    from .transcription.local import LocalTranscriber, recordings_of
    from .transcription.machine import describe_one, this_machine
    from .transcription.reader import name_of

    printer = _printer(recipe, recording_count)
    _check_model(recipe)
    start, totals = time.monotonic(), Totals()
    workers = _asked_workers(recipe).choose(this_machine())
    print(f"graft: transcribing in this process, {describe_one(workers)}", file=sys.stderr, flush=True)
    opener = _opener(recipe, recipe.aligner, workers)
    names: dict[str, Any] = {
        "model": checkpoint_name(recipe.model),
        "aligner": find_aligner(recipe.aligner)[1] if recipe.aligner else None,
    }
    with contextlib.closing(LocalTranscriber(_reading(recipe), opener, _options(recipe), printer.show)) as transcriber:
        ready = time.monotonic()
        for items in recordings_of(plan):
            printer.begin(name_of(items[0]))
            results = transcriber.transcribe(items)
            printer.end(join_items(results, **names), join_errors(results))
            totals.add_recording(results)
    end = time.monotonic()
    return _summary(recipe, totals, totals.audio_s / (end - ready), end - start)


def _print_from_ray(recordings: "pa.Table", recipe: TranscribeRecipe, printer: "TranscriptPrinter") -> dict[str, Any]:
    import pyarrow.parquet as pq

    from .transcription.assembly import join_items

    with tempfile.TemporaryDirectory(prefix="graft-transcripts-") as out:
        with contextlib.redirect_stdout(sys.stderr):
            summary = transcribe(recordings, recipe, Path(out))
        for path in sorted(Path(out, "recordings").glob("*.parquet")):
            for row in pq.read_table(path, partitioning=None).to_pylist():
                printer.begin(row["id"] if row["uri"].endswith(".parquet") else row["uri"])
                printer.end(join_items([row], model=row["model"], aligner=row["aligner"]), row["error"])
    return summary


EXAMPLES = (
    "talk.mp3",
    "model=runs/merged audio=calls,s3://bucket/talks out=runs/transcripts formats=txt,srt",
    "model=fast-7b gpus_per_worker=1 workers=8 readers=8 price=28 --plan --hours 5000",
)
"""Arguments that --help shows."""
main = partial(
    run_job,
    TranscribeRecipe,
    run,
    summary=__doc__,
    words="audio",
    examples=EXAMPLES,
    plan=plan,
    plan_options=TranscriptionPlanOptions,
)

if __name__ == "__main__":
    raise SystemExit(main())
