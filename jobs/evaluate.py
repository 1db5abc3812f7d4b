"""Score a model on labelled clips by word and character error rates, beside plain Whisper.

Each run also checks itself: what the model writes to the audio of other clips and where nobody speaks, whether context
words help, and whether test clips stand twice or were trained on. On request it scores other systems and instructions,
and clips joined to recordings.
Writes report.json and, a line for each clip and system as soon as it is transcribed, predictions.jsonl, which graft
score reads too. A run that was cut off goes on.

test sets -> the bulk pipeline, once for each system and instruction -> predictions.jsonl -> scores -> report.json
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.config import Recipe
from graft.data.settings import Sources
from graft.errors import DataError, GraftError, OutputError, RecipeError
from graft.keys import Checkpoint, DataKey, MachineKey, ModelKey, OutputKey
from graft.storage.atomic import write_atomic
from graft.text.wer import score

from .common.cli import run_job
from .common.inputs import check_inputs
from .common.outputs import claim_output, holds_results, locked_output, output_files
from .evaluation.system_spec import Service, SystemSpec, is_checkpoint
from .transcription import Auto
from .transcription.plan_options import EvaluationPlanOptions

if TYPE_CHECKING:
    from .evaluation.checking import PlannedChecks
    from .evaluation.predict import System
    from .evaluation.predictions import Prediction
    from .evaluation.test_sets import Item
    from .transcription.machine import AskedWorkers
    from .transcription.pipeline import Workers

WINDOW_S = 30.0
"""Longest window of a clip in seconds where the speech detector is not used."""
REPORT_FILE = "report.json"
CLIPS_FILE = "clips.parquet"
"""Where the audio of each clip is."""
SYSTEMS_FILE = "systems.json"
"""Digests of the systems' weights."""
WORK_FOLDER, SETS_FOLDER = "work", "sets"
"""Folder of what is made while the job runs, the results of each system, and its part for sounds and recordings."""
EXECUTION_KEYS = frozenset({"readers", "workers", "threads_per_worker", "gpu"})
"""Keys that change how clips are transcribed, not what is written."""


class EvaluateRecipe(Recipe):
    """The model to score, and the clips to score it on."""

    model: ModelKey[Checkpoint]
    """Folder or hub id of a graft or of a Whisper checkpoint, the output folder of a stage, the name of a graft that
    comes with the package, or `whisper`, the bundled Whisper base."""
    data: DataKey[dict[str, Sources]]
    """Test sets by name: parquet files, a folder, a glob, or {files, columns}."""
    out: OutputKey[str]
    """Folder for the report and all answers; a run that was cut off goes on there. While the job runs, made sounds and
    joined recordings are there too: every machine of a cluster must see it."""
    baseline: ModelKey[Checkpoint | None] = "whisper"
    """Model that is scored beside it, as a rule plain Whisper; `whisper` is the bundled Whisper base, null scores
    none."""
    language: DataKey[str | None] = None
    """Language of the clips of which the data names none, such as de (ISO 639-1). It chooses the normaliser of the
    rates, and models whose prompt can name a language are told it."""
    limit: DataKey[int | None] = Field(default=None, ge=1)
    """Number of clips to score, the first ones of each set; null scores all."""
    checks: DataKey[int] = Field(default=50, ge=0)
    """Number of clips on which the evaluation itself is checked: with the audio of other clips, and with context words.
    There are also sounds without speech, duplicates, and the overlap with the training data. 0 makes no checks."""
    train_data: DataKey[Sources | None] = None
    """Data that the model was trained on, in which test clips are looked for; null takes those that the recipes in the
    model's folder name."""
    pictures: DataKey[int] = Field(default=0, ge=0)
    """Number of generated pictures about which a graft on Qwen2-VL and its base are asked, to see whether vision is
    kept; both are opened for that. 0 asks about none."""
    vision_base: ModelKey[Checkpoint | None] = None
    """Qwen2-VL that the graft was built on, `bundled` the one of the bundled pair; null takes the one that the recipes
    in the model's folder name."""
    token_clips: DataKey[int] = Field(default=0, ge=0)
    """Number of clips, those with the most wrong words, of which the report has a graft's answer token by token: what
    it writes next when it is told the reference so far, beside what it writes by itself."""
    instructions: ModelKey[list[str]] = Field(default=[])
    """Text styles or phrasings that the model was trained for; the answers to each are scored as those of a further
    model."""
    sounds: DataKey[bool] = False
    """Count what is written on silence, noise, tones and ringing, which are made by the seed."""
    recordings_s: DataKey[float | None] = Field(default=None, gt=30)
    """Score each set also as recordings of about so many seconds, in which its clips follow one another with short
    pauses."""
    systems: ModelKey[dict[str, str | Service]] = Field(default={})
    """Further systems to score beside it, by names of your own: grafts, outputs of a stage and Whispers as `model`
    takes them, faster-whisper:NAME for a folder or a size of faster-whisper, or an OpenAI-compatible service as
    {url, model}. All transcribe the same chunks."""
    windows: DataKey[bool] = False
    """By default clips are transcribed as graft transcribe does: a detector finds the speech in them and the rest is
    skipped. true transcribes all of each clip in windows of at most 30 s, without the detector."""
    speech: DataKey[SpeechSettings] = SpeechSettings()
    """How speech is found, as in graft transcribe; windows=true does not use it."""
    chunks: DataKey[ChunkSettings] = ChunkSettings()
    """How speech is cut into chunks, as in graft transcribe; windows=true does not use it."""
    batch_clips: MachineKey[int] = Field(default=16, ge=1)
    """Number of clips that a worker reads and transcribes together."""
    readers: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """Most processes that decode audio and find speech, with one CPU each; auto is one for each CPU
    that the workers leave."""
    workers: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """Number of models that transcribe side by side; auto is one for each GPU, and without GPUs one for each machine,
    or for each 16 of its CPUs."""
    threads_per_worker: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """CPU threads of each worker, and CPUs that it takes from the cluster; auto is 1 beside a GPU, and else its
    share of a machine's CPUs, of which one is left to a reader."""
    dtype: ModelKey[Literal["fp32", "bf16", "int8"] | None] = None
    """Precision of the weights; null takes the one that they are stored in, as graft transcribe does. int8 is for CPUs
    with VNNI or AMX."""
    gpu: MachineKey[bool | Auto] = "auto"
    """Whether each worker takes a GPU; auto takes GPUs where there are any."""
    seed: DataKey[int] = 0
    """Seed of the bootstrap intervals and of the sounds."""
    page: OutputKey[bool] = True
    """Write report.html, as graft report does."""
    expected: OutputKey[dict[str, dict[Literal["wer", "cer", "wer_raw", "cer_raw"], tuple[float, float]]]] = Field(
        default={}
    )
    """Published figures: set -> rate -> the least and the greatest value that agree with one. When a rate of the model
    is outside, the job ends with exit code 1."""


def run(recipe: EvaluateRecipe) -> int:
    """Score a model; returns 1 if a rate is not as expected. Raises as evaluate."""
    return 0 if all(verdict["agrees"] for verdict in evaluate(recipe)["expected"]) else 1


def evaluate(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Score recipe.model, unless that is done already; returns the content of report.json.

    What an earlier run with the same recipe has transcribed is kept. Raises DataError for rows without text and for
    names of sets, RecipeError, MissingExtra, OutputError, and ModelError, also for an instruction that the model was
    not trained for.
    """
    from .evaluation.report_page.writing import write_page_of
    from .evaluation.score_table import report_table
    from .evaluation.systems import keep_digests

    with locked_output(recipe.out):
        is_own = holds_results(recipe.out, recipe, ignore=EXECUTION_KEYS)
        if is_own and (report_file := Path(recipe.out, REPORT_FILE)).is_file():
            print(f"evaluate: {recipe.out} is done already", flush=True)
            report: dict[str, Any] = json.loads(report_file.read_text())
            print(report_table(report), flush=True)
            return report
        if not is_own and output_files(recipe.out):
            raise OutputError(f"output {recipe.out} exists: choose another out= or remove it")
        _check_sets(recipe)
        score(["a"], ["a"])  # a missing extra is reported now, not after hours
        specs = _check_models(recipe)
        sets = _labelled(recipe)
        out = claim_output(recipe.out, recipe, ignore=EXECUTION_KEYS)
        keep_digests(specs, out / SYSTEMS_FILE)
        report = _evaluate_into(out, recipe, specs, sets)
        if recipe.page:
            write_page_of(out)
    print(report_table(report), flush=True)
    return report


def _evaluate_into(
    out: Path, recipe: EvaluateRecipe, specs: Mapping[str, SystemSpec], sets: "Sequence[Sequence[Item]]"
) -> dict[str, Any]:
    """Transcribe the sets with all systems, score and check them, and write all of it into a folder."""
    from graft.checkpoints.loading import open_speech_processor

    from .evaluation.checking import judge, plan_checks, training_rows
    from .evaluation.data_statistics import describe_sets
    from .evaluation.predict import PREDICTIONS_FILE, of_data, predict, write_clip_index
    from .evaluation.token_tables import ask_for_tokens
    from .evaluation.vision_check import ask_about_pictures
    from .transcription.machine import connect_workers

    work = (out / WORK_FOLDER).absolute()
    shutil.rmtree(work / SETS_FOLDER, ignore_errors=True)
    (work / SETS_FOLDER).mkdir(parents=True)
    items = _with_made(sets, recipe, work / SETS_FOLDER)
    write_clip_index(items, out / CLIPS_FILE, work=work)
    own, *_ = specs
    planned = plan_checks(
        items,
        open_speech_processor(recipe.model),
        work / SETS_FOLDER,
        clips=recipe.checks,
        seed=recipe.seed,
        makes_sounds=not recipe.sounds,
    )
    workers = connect_workers(_asked_workers(recipe))
    predictions, answers = predict(_systems(specs, items, planned, workers, recipe), out, work)
    report = _report(predictions, own, recipe)
    if recipe.checks:
        training = training_rows(recipe.train_data, recipe.model)
        judged = of_data(items, work), predictions, answers, report
        report["honesty"] = judge(planned, *judged, system=own, training=training, instructions=recipe.instructions)
    report["data"] = describe_sets(predictions)
    if recipe.token_clips:
        clips = of_data(items, work)
        report["tokens"] = ask_for_tokens(
            recipe.model, predictions, clips, system=own, count=recipe.token_clips, workers=workers
        )
    if recipe.pictures:
        report["vision"] = ask_about_pictures(
            recipe.model, recipe.vision_base, pictures=recipe.pictures, seed=recipe.seed, workers=workers
        )
    write_atomic(out / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    shutil.rmtree(work)
    print(f"evaluate: every answer is in {out / PREDICTIONS_FILE}", flush=True)
    return report


def plan(recipe: EvaluateRecipe, options: EvaluationPlanOptions) -> None:
    """Print the hours, the cost and the memory that scoring is estimated to take."""
    from graft.data.dataset import read_rows

    from .build import planned_model
    from .transcription.estimate import PlannedRun, assumed_audio, measure_clips, planned_workers, print_plan

    check_inputs(recipe)
    audio = assumed_audio(options, "data")
    if recipe.data and not options.hours:
        sets = [read_rows(sources).duration_s[: recipe.limit] for sources in recipe.data.values()]
        audio = measure_clips(sets * (2 if recipe.recordings_s else 1))  # recordings are heard besides their clips
    models = [planned_model(recipe.model, recipe.dtype, passes=1 + len(recipe.instructions))]
    if recipe.baseline:
        models.append(planned_model(recipe.baseline, recipe.dtype))
    longest_s = WINDOW_S if recipe.windows else recipe.chunks.max_s
    is_detected = recipe.speech.detector == "silero" and not recipe.windows
    workers = planned_workers(_asked_workers(recipe), options)
    print_plan(PlannedRun(models, audio, workers, longest_s, is_detected, options.price), options)


def _check_sets(recipe: EvaluateRecipe) -> None:
    from graft.data.nonspeech import SOUNDS

    from .evaluation.check_sets import CONTEXT, SWAPPED
    from .evaluation.test_sets import joined_name

    for name in recipe.expected:
        if name not in recipe.data:
            raise DataError(f"expected={name} is no set of data ({', '.join(recipe.data)}): give one of them")
    recordings = map(joined_name, recipe.data if recipe.recordings_s else [])
    for name in (SWAPPED, CONTEXT, *recordings, *(SOUNDS if recipe.sounds else [])):
        if name in recipe.data:
            raise DataError(f"data.{name}: that name is taken by a set which is made here: give the set another one")


def _check_models(recipe: EvaluateRecipe) -> dict[str, SystemSpec]:
    """Check the systems before a cluster starts for them; returns them by their names in the report.

    The recipe's model comes first. A model's name is its kind, graft or whisper; a baseline of the same kind is called
    baseline, and one that is the model itself is left out. The others have their own names. Raises ModelError, and
    RecipeError for a name that is taken.
    """
    from graft.checkpoints.loading import base_checkpoint, check_model, open_speech_processor

    from .evaluation.systems import check_system
    from .evaluation.vision_check import check_vision_base

    own = check_model(recipe.model)
    _asked_workers(recipe).check()
    if recipe.instructions:
        processor = open_speech_processor(recipe.model)
        for instruction in recipe.instructions:
            processor.instruction(instruction, None)
    specs: dict[str, SystemSpec] = {own: recipe.model}
    if recipe.baseline:
        other = check_model(recipe.baseline)
        is_same = other == own == "whisper" and base_checkpoint(recipe.baseline) == base_checkpoint(recipe.model)
        specs |= {} if is_same else {other if other != own else "baseline": recipe.baseline}
    for name, spec in recipe.systems.items():
        if name in specs or name in [f"{own} {instruction}" for instruction in recipe.instructions]:
            raise RecipeError(f"systems.{name}: that name is taken by the model or the baseline: give it another one")
        try:
            check_system(spec)
        except GraftError as error:
            raise type(error)(f"systems.{name}: {error}") from error
        specs[name] = spec
    if recipe.pictures and recipe.vision_base:
        check_vision_base(recipe.vision_base)
    return specs


def _labelled(recipe: EvaluateRecipe) -> "list[list[Item]]":
    """List the clips of each set of the data. Raises DataError as labelled."""
    from .evaluation.test_sets import labelled

    return [
        labelled(name, sources, limit=recipe.limit, language=recipe.language) for name, sources in recipe.data.items()
    ]


def _with_made(sets: "Sequence[Sequence[Item]]", recipe: EvaluateRecipe, folder: Path) -> "list[Item]":
    """Add recordings and sounds where they are asked for, which are written into the folder; all in order."""
    from .evaluation.test_sets import joined, sounds

    items: list[Item] = []
    for own in sets:
        items += own
        if recipe.recordings_s:
            for part in dict.fromkeys(item.set_name for item in own):  # one for each language
                items += joined([item for item in own if item.set_name == part], recipe.recordings_s, folder)
    return items + (sounds(recipe.seed, folder) if recipe.sounds else [])


def _systems(
    specs: Mapping[str, SystemSpec],
    items: "Sequence[Item]",
    planned: "PlannedChecks",
    workers: "Workers",
    recipe: EvaluateRecipe,
) -> "list[System]":
    """Return what transcribes: the model, also with instructions and context words, and the other systems."""
    from .evaluation.honesty import told_name
    from .evaluation.predict import System
    from .evaluation.systems import system_opener
    from .transcription.pipeline import Pipeline
    from .transcription.reader import WINDOWS, Reading

    reading = WINDOWS if recipe.windows else Reading(recipe.speech, recipe.chunks)
    systems = []
    for name, spec in specs.items():
        opener = system_opener(spec, **workers.model_settings, dtype=recipe.dtype)
        own_workers = workers if isinstance(spec, str) else replace(workers, transcribers=1, gpus_per_transcriber=0)
        systems.append(
            System(name, Pipeline(reading, opener, own_workers), items, spec if is_checkpoint(spec) else None)
        )
    own, *others = systems
    told = [
        replace(
            own, name=f"{own.name} {instruction}", pipeline=replace(own.pipeline, options={"instruction": instruction})
        )
        for instruction in recipe.instructions
    ]
    if planned.context:
        pipeline = replace(own.pipeline, options={"context": list(planned.context.words)})
        told.append(replace(own, name=told_name(own.name), pipeline=pipeline, items=planned.context.items))
    return [replace(own, items=[*items, *planned.items]), *told, *others]


def _asked_workers(recipe: EvaluateRecipe) -> "AskedWorkers":
    from .transcription.machine import AskedWorkers

    counts = recipe.readers, recipe.workers, recipe.threads_per_worker, recipe.gpu, recipe.batch_clips
    return AskedWorkers(*counts, recipe.dtype)


def _report(predictions: "Sequence[Prediction]", own: str, recipe: EvaluateRecipe) -> dict[str, Any]:
    """Score the predictions; `own` is the name of the model."""
    from .evaluation.predict import speeds
    from .evaluation.samples import ScoringSettings
    from .evaluation.scoring import score_predictions

    scores = score_predictions(predictions, ScoringSettings(seed=recipe.seed))
    verdicts = []  # the model's rates beside the expected ones
    for name, rates in recipe.expected.items():
        for rate, (low, high) in rates.items():
            found = scores["sets"].get(name, {"systems": {}})["systems"].get(own, {}).get(rate)
            agrees = found is not None and low <= found <= high
            verdicts.append({"set": name, "rate": rate, "found": found, "low": low, "high": high, "agrees": agrees})
    pipeline = "windows" if recipe.windows else "speech"
    return {"model": recipe.model, "pipeline": pipeline, **scores, "expected": verdicts, "rtfx": speeds(predictions)}


EXAMPLES = (
    "model=runs/merged data.dev=runs/data/dev out=runs/evaluation",
    "model=small data.dev=runs/data/dev baseline=null instructions=lower,formatted sounds=true out=runs/evaluation",
    "model=fast-7b gpu=true workers=8 --plan --hours 100",
)
"""Arguments that --help shows."""
main = partial(
    run_job, EvaluateRecipe, run, summary=__doc__, examples=EXAMPLES, plan=plan, plan_options=EvaluationPlanOptions
)

if __name__ == "__main__":
    raise SystemExit(main())
