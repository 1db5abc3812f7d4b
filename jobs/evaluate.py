"""Score a model on labelled clips by word and character error rates, beside plain Whisper.

The clips can also be scored with their audio swapped, which a model that listens fails.
On request it also scores other instructions, clips joined to recordings, and sounds without speech, for which it counts
the characters that are written.
Writes report.json and, a line for each clip and model, predictions.jsonl, which graft score reads too.

test sets -> the bulk pipeline, once for each model and instruction -> predictions.jsonl -> scores -> report.json
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.config import Recipe
from graft.data.settings import Sources
from graft.errors import DataError, RecipeError
from graft.keys import Checkpoint, DataKey, MachineKey, ModelKey, OutputKey
from graft.text.wer import score

from .common.cli import run_job
from .common.inputs import check_inputs
from .common.outputs import holds_results, staged_output
from .transcription import Auto, ClipTranscript
from .transcription.plan_options import EvaluationPlanOptions

if TYPE_CHECKING:
    from .evaluation.predictions import Prediction
    from .evaluation.test_sets import Item
    from .transcription.machine import AskedWorkers

WINDOW_S = 30.0
"""Longest window of a clip in seconds where the speech detector is not used."""
REPORT_FILE = "report.json"
PREDICTIONS_FILE = "predictions.jsonl"
WORK_FOLDER = "work"
"""Folder of what is made while the job runs: corpora of sounds and recordings, and the results of each model."""
PIPELINES = {
    "speech": "speech (detected and cut into chunks, as graft transcribe does)",
    "windows": "windows (all of each clip, without the speech detector)",
}

Transcripts = Mapping["Item", ClipTranscript]


class EvaluateRecipe(Recipe):
    """The model to score, and the clips to score it on."""

    model: ModelKey[Checkpoint]
    """Folder or hub id of a graft or of a Whisper checkpoint, the output folder of a stage, the name of a graft that
    comes with the package, or `whisper`, the bundled Whisper base."""
    data: DataKey[dict[str, Sources]]
    """Test sets by name: parquet files, a folder, a glob, or {files, columns}."""
    out: OutputKey[str]
    """Folder for the report. While the job runs, its results, made sounds and joined recordings are there too: every
    machine of a cluster must see it."""
    baseline: ModelKey[Checkpoint | None] = "whisper"
    """Model that is scored beside it, as a rule plain Whisper; `whisper` is the bundled Whisper base, null scores
    none."""
    language: DataKey[str | None] = None
    """Language of the clips of which the data names none, such as de (ISO 639-1). It chooses the normaliser of the
    rates, and models whose prompt can name a language are told it."""
    limit: DataKey[int | None] = Field(default=None, ge=1)
    """Number of clips to score, the first ones of each set; null scores all."""
    audio_check: DataKey[str | None] = None
    """Name of a set that is also scored with every clip's audio swapped for another's, which a model that listens
    fails."""
    instructions: ModelKey[list[str]] = Field(default=[])
    """Text styles or phrasings that the model was trained for; the answers to each are scored as those of a further
    model."""
    sounds: DataKey[bool] = False
    """Count what is written on silence, noise, tones and ringing, which are made by the seed."""
    recordings_s: DataKey[float | None] = Field(default=None, gt=30)
    """Score each set also as recordings of about so many seconds, in which its clips follow one another with short
    pauses."""
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

    Raises DataError for rows without text and for names of sets, RecipeError, MissingExtra, OutputError, and
    ModelError, also for an instruction that the model was not trained for.
    """
    from .evaluation.predictions import write_predictions

    if holds_results(recipe.out, recipe):
        print(f"evaluate: {recipe.out} is done already", flush=True)
        report = json.loads(Path(recipe.out, REPORT_FILE).read_text())
        print(table(report), flush=True)
        return report
    _check_sets(recipe)
    score(["a"], ["a"])  # a missing extra is reported now, not after hours
    checkpoints = _check_models(recipe)
    with staged_output(recipe.out, recipe) as out:
        work = (out / WORK_FOLDER).absolute()
        work.mkdir()
        items = _items(recipe, work)
        models, rtfx = _transcribe_models(items, checkpoints, recipe, work)
        predictions = list(_predictions(models, items))
        with (out / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
            write_predictions(predictions, file)
        report = _report(predictions, rtfx, recipe)
        (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        shutil.rmtree(work)
    print(table(report), flush=True)
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

    from .evaluation.test_sets import SWAPPED, joined_name

    for key, name in [("audio_check", recipe.audio_check), *(("expected", name) for name in recipe.expected)]:
        if name and name not in recipe.data:
            raise DataError(f"{key}={name} is no set of data ({', '.join(recipe.data)}): give one of them")
    if recipe.audio_check and recipe.recordings_s:
        raise RecipeError(
            f"recordings_s would join the clips of audio_check={recipe.audio_check} too: leave one out, or run twice"
        )
    recordings = map(joined_name, recipe.data if recipe.recordings_s else [])
    for name in (SWAPPED, *recordings, *(SOUNDS if recipe.sounds else [])):
        if name in recipe.data:
            raise DataError(f"data.{name}: that name is taken by a set which is made here: give the set another one")


def _check_models(recipe: EvaluateRecipe) -> dict[str, str]:
    """Check the models before a cluster starts for them; returns them by their names in the report.

    The recipe's model comes first. A model's name is its kind, graft or whisper; a baseline of the same kind is called
    baseline, and one that is the model itself is left out. Raises ModelError.
    """
    from graft.checkpoints.loading import base_checkpoint, check_model, open_speech_processor

    own = check_model(recipe.model)
    _asked_workers(recipe).check()
    if recipe.instructions:
        processor = open_speech_processor(recipe.model)
        for instruction in recipe.instructions:
            processor.instruction(instruction, None)
    if not recipe.baseline:
        return {own: recipe.model}
    other = check_model(recipe.baseline)
    if other == own == "whisper" and base_checkpoint(recipe.baseline) == base_checkpoint(recipe.model):
        return {own: recipe.model}
    return {own: recipe.model, other if other != own else "baseline": recipe.baseline}


def _items(recipe: EvaluateRecipe, folder: Path) -> "list[Item]":
    """List all that is scored, set by set; what has to be made for it is written into the folder."""
    from .evaluation.test_sets import joined, labelled, sounds, swapped

    items = []
    for name, sources in recipe.data.items():
        own = labelled(name, sources, limit=recipe.limit, language=recipe.language)
        items += own
        if name == recipe.audio_check:
            items += swapped(own)
        if recipe.recordings_s:
            for part in dict.fromkeys(item.set_name for item in own):  # one for each language
                items += joined([item for item in own if item.set_name == part], recipe.recordings_s, folder)
    return items + (sounds(recipe.seed, folder) if recipe.sounds else [])


def _transcribe_models(
    items: "Sequence[Item]", checkpoints: Mapping[str, str], recipe: EvaluateRecipe, work: Path
) -> tuple[dict[str, Transcripts], dict[str, float]]:
    """Transcribe the items with the model, again with each instruction, and with the baseline.

    Returns the transcripts of each, the model's first, and how many seconds of audio it transcribed per second.
    """
    from .evaluation.test_sets import SWAPPED, as_rows
    from .transcription.machine import connect_workers
    from .transcription.pipeline import Pipeline, languages_for_model, measured_rtfx, model_opener, transcribe_rows
    from .transcription.reader import WINDOWS, Reading

    workers = connect_workers(_asked_workers(recipe))
    settings = workers.model_settings | {"dtype": recipe.dtype}
    reading = WINDOWS if recipe.windows else Reading(recipe.speech, recipe.chunks)
    openers = {kind: model_opener(checkpoint, **settings) for kind, checkpoint in checkpoints.items()}
    own, *baselines = openers
    pipelines = {own: Pipeline(reading, openers[own], workers)}
    for instruction in recipe.instructions:
        pipelines[f"{own} {instruction}"] = Pipeline(reading, openers[own], workers, {"instruction": instruction})
    for kind in baselines:
        pipelines[kind] = Pipeline(reading, openers[kind], workers)
    models: dict[str, Transcripts] = {}
    rtfx = {}
    # Items of swapped audio share the clips of others, which come first and have the language of the audio.
    by_clip: dict[Any, Item] = {}
    for item in items:
        by_clip.setdefault(item.clip, item)
    rows = as_rows([*by_clip.values()])
    of_checkpoint = {name: languages_for_model(rows, name) for name in checkpoints.values()}
    told = {kind: of_checkpoint[checkpoints.get(kind, checkpoints[own])] for kind in pipelines}
    for number, (kind, pipeline) in enumerate(pipelines.items()):
        print(f"evaluate: {kind}", flush=True)
        home = work / f"model-{number}"
        clips = dict(zip(by_clip, transcribe_rows(told[kind], home, pipeline), strict=True))
        # The audio check is of the model alone.
        scored = [item for item in items if kind == own or item.set_name != SWAPPED]
        models[kind], rtfx[kind] = {item: clips[item.clip] for item in scored}, measured_rtfx(home)
    return models, rtfx


def _asked_workers(recipe: EvaluateRecipe) -> "AskedWorkers":
    from .transcription.machine import AskedWorkers

    counts = recipe.readers, recipe.workers, recipe.threads_per_worker, recipe.gpu, recipe.batch_clips
    return AskedWorkers(*counts, recipe.dtype)


def _predictions(models: Mapping[str, Transcripts], items: "Sequence[Item]") -> "Iterator[Prediction]":
    """Yield what each model wrote for each clip; a clip that could not be read has an error."""
    from .evaluation.predictions import Prediction

    for item in items:
        for kind, clips in models.items():
            if clip := clips.get(item):
                more = {"audio_id": item.audio_id} if item.audio_id != item.id else {}
                yield Prediction(
                    item.id,
                    item.set_name,
                    kind,
                    item.text,
                    None if clip.error else clip.text,
                    item.duration_s,
                    item.language,
                    item.known.get("speaker"),
                    item.known.get("sex"),
                    item.known.get("source"),
                    error=clip.error,
                    more=more | ({} if clip.mean_logprob is None else {"mean_logprob": clip.mean_logprob}),
                )


def _report(predictions: "Sequence[Prediction]", rtfx: Mapping[str, float], recipe: EvaluateRecipe) -> dict[str, Any]:
    from .evaluation.samples import ScoringSettings
    from .evaluation.scoring import score_predictions

    scores = score_predictions(predictions, ScoringSettings(seed=recipe.seed))
    own = next(iter(rtfx))
    verdicts = []  # the model's rates beside the expected ones
    for name, rates in recipe.expected.items():
        for rate, (low, high) in rates.items():
            found = scores["sets"].get(name, {"systems": {}})["systems"].get(own, {}).get(rate)
            agrees = found is not None and low <= found <= high
            verdicts.append({"set": name, "rate": rate, "found": found, "low": low, "high": high, "agrees": agrees})
    pipeline = "windows" if recipe.windows else "speech"
    return {"model": recipe.model, "pipeline": pipeline, **scores, "expected": verdicts, "rtfx": dict(rtfx)}


def table(report: Mapping[str, Any]) -> str:
    """Lay a report out for people: its scores, the verdicts on expected rates, the pipeline and the speed."""
    from .evaluation.score_table import score_table

    lines = [score_table(report)]
    for v in report["expected"]:
        verdict = "agrees with" if v["agrees"] else "does not agree with"
        found = "of no clip" if v["found"] is None else f"{v['found']:.2%}"
        lines.append(f"{v['set']}: {v['rate']} {found} {verdict} the expected {v['low']:.2%} to {v['high']:.2%}")
    lines.append(f"pipeline: {PIPELINES[report['pipeline']]}")
    speeds = ", ".join(f"{kind} {rtfx:.1f}" for kind, rtfx in report["rtfx"].items())
    return "\n".join([*lines, f"seconds of audio per second: {speeds}"])


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
