"""Run the whole path on a few minutes of bundled speech: build, train, evaluate, transcribe and serve.

prepare -> build (pretrained) -> transcribe, evaluate -> stage 1 -> check -> stage 2 -> merge -> evaluate, transcribe,
serve. Each step is the command of that name with a small recipe, on any machine within minutes. Everything is written
into runs/demo, the numbers into runs/demo/summary.json.
"""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from graft.config import Recipe, read_recipe
from graft.errors import OutputError, RecipeError
from graft.keys import Checkpoint, MachineKey, ModelKey, OutputKey, ScheduleKey
from graft.storage.atomic import write_atomic

from . import build, check, evaluate, merge, prepare, stage1, stage2, transcribe
from .common.cli import run_job
from .common.cluster import connect
from .common.outputs import RECIPE_FILE, claim_output, locked_output, output_files
from .common.speed import about, slowness
from .preparation.recipe import Manifest

SPEECH = Path(__file__).parent / "data" / "prompts"
SUMMARY_FILE = "summary.json"
SPLITS = {"trained": "train", "unseen": "unseen"}
PAGE_FILE = "report.html"
CHECKED_CLIPS = 20
"""Clips on which the evaluation itself is checked."""
"""Test sets, and the splits that they are."""


class DemoRecipe(Recipe):
    """How long to train, and where the results go."""

    out: OutputKey[str] = "runs/demo"
    """Folder for everything; the results of an earlier demo there are removed."""
    pretrained: ModelKey[Checkpoint] = "small"
    """Trained graft to start from, on the bundled bases: a name that comes with graft, or a folder written by
    graft export."""
    stage1_epochs: ScheduleKey[int] = Field(default=1, ge=1)
    """Epochs of stage 1 over the 64 training clips."""
    stage2_epochs: ScheduleKey[int] = Field(default=2, ge=1)
    """Epochs of stage 2 over the 64 training clips."""
    workers: MachineKey[int] = Field(default=2, ge=1)
    """Training workers, with one thread each."""
    quantize: ModelKey[Literal["nf4", "none"]] = "none"
    """Quantization of the language model in stage 2. nf4 costs a model of 135 M parameters accuracy; the adapters are
    then merged into the rounded weights."""
    scored_clips: OutputKey[int] = Field(default=24, ge=1)
    """Number of training clips to score."""


def run(recipe: DemoRecipe) -> None:
    """Run the demo and write summary.json. Raises OutputError for a folder that is not a demo's."""
    with locked_output(recipe.out):
        _run(recipe)


def _run(recipe: DemoRecipe) -> None:
    from .evaluation.score_table import report_table

    _empty_folder(recipe)
    recipes = step_recipes(recipe)
    estimates = estimated_seconds(recipe, fp32=slowness("fp32"), training=slowness(_training_dtype()))
    print(f"{len(STEPS)} steps take {about(sum(estimates.values()))} on this machine", flush=True)
    connect()
    results, seconds = _run_steps(STEPS, recipes, estimates)
    summary = _summarize(results, seconds)
    write_atomic(Path(recipe.out, SUMMARY_FILE), json.dumps(summary, indent=2) + "\n")
    print("\n== results")
    for stage in ("stage1", "stage2"):
        losses = summary[stage]
        print(f"{stage}: loss {losses['loss_first']:.3f} -> {losses['loss_last']:.3f} in {losses['seconds']:.0f} s")
    print(f"\nbefore training:\n{report_table(results['evaluate graft'])}")
    print(f"\nafter training:\n{report_table(results['evaluate merged'])}")
    print(EXPLANATION.format(clips=summary["clips"]["trained"]))
    print("\nseconds: " + "  ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items()))
    print(f"\nfiles in {recipe.out}:{FILES}\nthree transcripts, before and after training:")
    _print_transcripts(f"{recipe.out}/transcripts-graft", f"{recipe.out}/transcripts-merged")
    page = f"{recipe.out}/evaluation-merged/{PAGE_FILE}"
    if Path(page).is_file():  # not without the extra that it takes
        print(f"\nopen in a browser: {page}", flush=True)
    print(f"\nyour own file: graft transcribe YOUR_FILE model={recipe.out}/merged", flush=True)


def step_recipes(recipe: DemoRecipe) -> dict[str, Recipe]:
    """Make the recipe of each of STEPS; both stages take small batches, for many updates from few clips."""
    out = recipe.out
    sets = {name: f"{out}/data/{split}" for name, split in SPLITS.items()}
    training = {
        "model": f"{out}/graft",
        "data": [sets["trained"]],
        "token_budget": 400,
        "warmup_steps": 3,
        "log_every": 4,
        "workers": recipe.workers,
        "data_workers": 1,
        "encoder_cache": f"{out}/encoded",
        "dtype": _training_dtype(),
    }
    first = {"out": f"{out}/stage1", "epochs": recipe.stage1_epochs, "learning_rate": 2e-4}
    second = {
        "out": f"{out}/stage2",
        "projector": f"{out}/stage1",
        "quantize": recipe.quantize,
        "lora": {"rank": 32, "alpha": 32, "dropout": 0.0},
        "epochs": recipe.stage2_epochs,
        "learning_rate": 3e-4,
    }
    files = [str(SPEECH / clip["audio"]) for clip in _transcribed_clips()]
    scoring = {"limit": recipe.scored_clips, "dtype": "fp32", "workers": recipe.workers}
    before = {"data": {"unseen": sets["unseen"]}, "baseline": None, "checks": 0, "page": False}
    return {
        "prepare": prepare.PrepareRecipe(
            sources=[Manifest(manifest=f"{SPEECH}/{split}.jsonl", split=split) for split in SPLITS.values()],
            out=f"{out}/data",
        ),
        "build": build.BuildRecipe(pretrained=recipe.pretrained, out=f"{out}/graft"),
        "transcribe graft": transcribe.TranscribeRecipe(
            model=f"{out}/graft", audio=files, out=f"{out}/transcripts-graft"
        ),
        "evaluate graft": evaluate.EvaluateRecipe.model_validate(
            {"model": f"{out}/graft", "out": f"{out}/evaluation-graft"} | before | scoring
        ),
        "stage1": stage1.Stage1Recipe.model_validate(training | first),
        "check": check.CheckRecipe(model=f"{out}/stage1", data=[sets["trained"]]),
        "stage2": stage2.Stage2Recipe.model_validate(training | second),
        "merge": merge.MergeRecipe(
            model=f"{out}/stage2",
            out=f"{out}/merged",
            onto="nf4" if recipe.quantize == "nf4" else "full",
            data=sets["trained"],
            clips=8,
        ),
        "evaluate merged": evaluate.EvaluateRecipe.model_validate(
            {
                "model": f"{out}/merged",
                "out": f"{out}/evaluation-merged",
                "data": sets,
                "checks": CHECKED_CLIPS,
                "token_clips": 2,
                "pictures": 3,
            }
            | scoring
        ),
        "transcribe merged": transcribe.TranscribeRecipe(
            model=f"{out}/merged", audio=files, out=f"{out}/transcripts-merged"
        ),
        "serve": recipe,
    }


def _training_dtype() -> Literal["fp32", "bf16"]:
    from graft.checkpoints.loading import multiplies_bf16

    return "bf16" if multiplies_bf16("cpu") else "fp32"


def estimated_seconds(recipe: DemoRecipe, *, fp32: float, training: float) -> dict[str, float]:
    """Estimate how long each of STEPS takes, from its seconds on the reference machine of common/speed.py.

    `fp32` and `training` are this machine's slowness in fp32 and in the precision of training. Starting processes and
    opening models count apart, because they depend on it little.
    """
    scored = recipe.scored_clips
    return {
        "prepare": 1,
        "build": 6,
        "transcribe graft": 8 + 4 * fp32,
        "evaluate graft": 12 + 13 * fp32,
        "stage1": 20 + 31 * training * recipe.stage1_epochs,
        "check": 2 + fp32,
        "stage2": 20 + 31 * training * recipe.stage2_epochs,
        "merge": 10 + 21 * training,
        "evaluate merged": 55 + (2 * (20 + scored) + CHECKED_CLIPS + 20) * fp32,
        "transcribe merged": 8 + 4 * fp32,
        "serve": 22,
    }


def _run_steps(
    steps: Sequence[tuple[str, Callable[[Any], Any], str]],
    recipes: Mapping[str, Recipe],
    estimates: Mapping[str, float],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run steps by their recipes; returns the results by step, and the seconds by command."""
    results: dict[str, Any] = {}
    seconds: dict[str, float] = defaultdict(float)
    for number, (name, command, purpose) in enumerate(steps, 1):
        title = name.partition(" ")[0]
        print(f"\n== step {number} of {len(steps)}: {title}, {about(estimates[name])}: {purpose}", flush=True)
        start = time.perf_counter()
        results[name] = command(recipes[name])
        seconds[title] += time.perf_counter() - start
    return results, seconds


def _empty_folder(recipe: DemoRecipe) -> None:
    """Empty the folder of an earlier demo. Raises OutputError for a folder with anything else in it."""
    root = Path(recipe.out)
    if files := output_files(recipe.out):
        try:
            read_recipe(DemoRecipe, str(root / RECIPE_FILE))
        except RecipeError as error:
            raise OutputError(
                f"{root} holds something else than a demo's results: choose another out= or remove it"
            ) from error
        for path in files:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    claim_output(recipe.out, recipe)


def _manifest(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SPEECH / f"{name}.jsonl").read_text().splitlines()]


def _transcribed_clips() -> list[dict[str, Any]]:
    """Read the clips of the manifest that are transcribed before and after training."""
    return _manifest("unseen")[:3]


def _transcribe(recipe: transcribe.TranscribeRecipe) -> None:
    transcribe.run(recipe)
    _print_transcripts(str(recipe.out))


def _print_transcripts(*folders: str) -> None:
    for clip in _transcribed_clips():
        print(f"  {Path(clip['audio']).name}\n    said:  {clip['text']}")
        for folder in folders:
            transcript = Path(folder, "files", f"{Path(clip['audio']).name}.json")
            print(f"    heard: {json.loads(transcript.read_text())['text']}", flush=True)


def _ask_service(recipe: DemoRecipe) -> None:
    """Start the service on the demo's Ray, post a file to it, and stop it again."""
    from .common.local_service import post, serving

    file = SPEECH / _transcribed_clips()[0]["audio"]
    with serving(f"{recipe.out}/merged", Path(recipe.out), app="demo") as url:
        print(f"POST {url}/v1/audio/transcriptions with {file.name}: {post(url, file, model='merged')}")


def _summarize(results: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Collect the numbers of summary.json from the results of the stages and evaluations."""
    before, report = results["evaluate graft"], results["evaluate merged"]
    sets = {name: one["systems"] for name, one in report["sets"].items()}
    checks = {one["name"]: one["numbers"] for one in report["honesty"]["checks"]}
    losses = ("loss_first", "loss_last", "seconds")
    rounded = {name: round(elapsed_s, 1) for name, elapsed_s in seconds.items()}
    return {
        "stage1": {key: results["stage1"][key] for key in losses},
        "stage2": {key: results["stage2"][key] for key in losses},
        "wer": {
            "trained": sets["trained"]["graft"]["wer"],
            "unseen": sets["unseen"]["graft"]["wer"],
            "unseen_as_it_comes": before["sets"]["unseen"]["systems"]["graft"]["wer"],
            "swapped": checks["swapped_audio"]["wer_swapped"],
            "whisper_trained": sets["trained"]["whisper"]["wer"],
            "whisper_unseen": sets["unseen"]["whisper"]["wer"],
        },
        "clips": {
            "trained": len(_manifest("train")),
            "unseen": sets["unseen"]["graft"]["clips"],
            "scored": sets["trained"]["graft"]["clips"],
        },
        "seconds": {**rounded, "total": round(sum(rounded.values()), 1)},
        "rtfx": report["rtfx"]["graft"],
    }


STEPS: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("prepare", prepare.run, "64 clips to train on and 20 unseen ones, as parquet"),
    ("build", build.run, "Whisper base's encoder on SmolLM2-135M, with the trained part that comes with graft"),
    ("transcribe graft", _transcribe, "three files that it was not trained on"),
    ("evaluate graft", evaluate.evaluate, "before training"),
    ("stage1", stage1.run, "the projector alone, DeepSpeed ZeRO-2"),
    ("check", check.run, "does the model hear?"),
    ("stage2", stage2.run, "LoRA and the projector"),
    ("merge", merge.run, "the adapters into the weights, and a comparison"),
    ("evaluate merged", evaluate.evaluate, "after training, beside plain Whisper"),
    ("transcribe merged", _transcribe, "the same three files"),
    ("serve", _ask_service, "one of them over HTTP"),
)
"""The steps in their order: the name, the command of its first word, and what it shows."""

EXPLANATION = """
The graft comes with hours of training, which jobs/recipes/small-*.yaml repeat. The minutes of training on {clips} clips
of one voice show that each part learns; they add that voice and nothing else. With swapped audio the model writes what
it hears, which is not the text, so its word error rate must be high."""

FILES = """
  summary.json           these numbers
  data/                  the clips as parquet, and the dropped lines
  graft/                 the graft before training
  stage1/, stage2/       projector and adapters, metrics.jsonl, curves.png
  encoded/               the encoder's outputs, so that it ran once for each clip
  merged/                the trained model, with its trained parts in adapter/
  evaluation-*/          report.json and predictions.jsonl of both models
  evaluation-merged/report.html   scores, checks, clips with their audio: open it in a browser
  transcripts-*/         text and JSON of three files, from both models
"""


EXAMPLES = (
    "",
    "stage1_epochs=4 stage2_epochs=8 quantize=nf4 out=runs/longer",
)
"""Arguments that --help shows."""
main = partial(run_job, DemoRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
