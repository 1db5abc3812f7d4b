"""Run the whole path on a few minutes of bundled speech: build, train, evaluate, transcribe and serve.

prepare -> build (pretrained) -> transcribe, evaluate -> stage 1 -> check -> stage 2 -> merge -> evaluate, transcribe,
serve. Each step is the command of that name with a small recipe, on any machine within minutes. Everything is written
into runs/demo, the numbers into runs/demo/summary.json.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from graft.config import Recipe, read_recipe
from graft.errors import OutputError, RecipeError
from graft.storage.atomic import write_atomic

from . import build, check, merge, prepare, stage1, stage2, transcribe
from .common.cli import run_job
from .common.cluster import connect
from .common.outputs import RECIPE_FILE, claim_output
from .evaluation.recipe import EvaluateRecipe

SPEECH = Path(__file__).parent / "data" / "prompts"
SUMMARY_FILE = "summary.json"
SPLITS = {"trained": "train", "unseen": "unseen"}
"""Test sets, and the splits that they are."""

T = TypeVar("T")


class DemoRecipe(Recipe):
    """How long to train, and where the results go."""

    out: str = "runs/demo"
    """Folder for everything; the results of an earlier demo there are removed."""
    pretrained: str = "small"
    """Trained graft to start from, on the bundled bases: a name that comes with graft, or a folder written by
    jobs.export."""
    stage1_epochs: int = Field(default=2, ge=1)
    """Epochs of stage 1 over the 64 training clips."""
    stage2_epochs: int = Field(default=4, ge=1)
    """Epochs of stage 2 over the 64 training clips."""
    workers: int = Field(default=2, ge=1)
    """Training workers, with one thread each."""
    quantize: Literal["nf4", "none"] = "none"
    """Quantization of the language model in stage 2. nf4 costs a model of 135 M parameters accuracy; the adapters are
    then merged into the rounded weights."""
    scored_clips: int = Field(default=40, ge=1)
    """Number of training clips to score."""


class Demo:
    """Runs the steps and keeps their seconds."""

    def __init__(self, recipe: DemoRecipe):
        self.recipe = recipe
        self.root = Path(recipe.out)
        self.seconds: dict[str, float] = {}

    def path(self, name: str) -> str:
        """Return a path inside the demo's folder."""
        return str(self.root / name)

    def step(self, name: str, purpose: str, run: Callable[[], T]) -> T:
        """Run a step and add its seconds to those of its name."""
        print(f"\n== {name}: {purpose}", flush=True)
        start = time.perf_counter()
        result = run()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 1)
        return result


def run(recipe: DemoRecipe) -> None:
    """Run the demo and write summary.json. Raises OutputError for a folder that is not a demo's."""
    from .evaluation import scoring

    demo = Demo(recipe)
    _empty_folder(recipe)
    connect()
    clips = _manifest("unseen")[:3]
    files = [str(SPEECH / clip["audio"]) for clip in clips]
    demo.step(
        "prepare", "64 clips to train on and 20 unseen ones, as parquet", lambda: prepare.run(_prepare_recipe(demo))
    )
    built = build.BuildRecipe(pretrained=recipe.pretrained, out=demo.path("graft"))
    bases = "Whisper base's encoder on SmolLM2-135M, with the trained part that comes with graft"
    demo.step("build", bases, lambda: build.run(built))
    transcribed = _transcribe_recipe(demo, "graft", files)
    demo.step("transcribe", "three files that it was not trained on", lambda: transcribe.run(transcribed))
    _print_transcripts(demo, clips, "graft")
    before = demo.step("evaluate", "before training", lambda: scoring.run(_evaluate_recipe(demo, "graft")))
    first = demo.step("stage1", "the projector alone, DeepSpeed ZeRO-2", lambda: stage1.run(_stage1_recipe(demo)))
    checked = check.CheckRecipe(model=demo.path("stage1"), data=[demo.path("data/train")])
    demo.step("check", "does the model hear?", lambda: check.run(checked))
    second = demo.step("stage2", "LoRA and the projector", lambda: stage2.run(_stage2_recipe(demo)))
    demo.step("merge", "the adapters into the weights, and a comparison", lambda: merge.run(_merge_recipe(demo)))
    merged = _evaluate_recipe(demo, "merged")
    report = demo.step("evaluate", "after training, beside plain Whisper", lambda: scoring.run(merged))
    transcribed = _transcribe_recipe(demo, "merged", files)
    demo.step("transcribe", "the same three files", lambda: transcribe.run(transcribed))
    demo.step("serve", "one of them over HTTP", lambda: _ask_service(demo, Path(files[0])))
    summary = _summarize(demo, first, second, before, report)
    write_atomic(demo.root / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    tables = {"before training": scoring.table(before), "after training": scoring.table(report)}
    _print_results(demo, summary, tables, clips)


def _empty_folder(recipe: DemoRecipe) -> None:
    """Empty the folder of an earlier demo. Raises OutputError for a folder with anything else in it."""
    root = Path(recipe.out)
    if root.is_dir() and any(root.iterdir()):
        try:
            read_recipe(DemoRecipe, str(root / RECIPE_FILE))
        except RecipeError as error:
            raise OutputError(
                f"{root} holds something else than a demo's results: choose another out= or remove it"
            ) from error
        shutil.rmtree(root)
    claim_output(recipe.out, recipe)


def _manifest(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SPEECH / f"{name}.jsonl").read_text().splitlines()]


def _prepare_recipe(demo: Demo) -> prepare.PrepareRecipe:
    sources = [{"manifest": str(SPEECH / f"{split}.jsonl"), "split": split} for split in SPLITS.values()]
    return prepare.PrepareRecipe.model_validate({"sources": sources, "out": demo.path("data")})


def _transcribe_recipe(demo: Demo, model: str, files: list[str]) -> transcribe.TranscribeRecipe:
    return transcribe.TranscribeRecipe(model=demo.path(model), audio=files, out=demo.path(f"transcripts-{model}"))


def _evaluate_recipe(demo: Demo, model: str) -> EvaluateRecipe:
    """Score unseen clips; of the merged graft also trained ones, ones with swapped audio, and Whisper beside it."""
    is_trained = model == "merged"
    sets = list(SPLITS) if is_trained else ["unseen"]
    return EvaluateRecipe(
        model=demo.path(model),
        data={name: demo.path(f"data/{SPLITS[name]}") for name in sets},
        out=demo.path(f"evaluation-{model}"),
        baseline="bundled" if is_trained else None,
        audio_check="trained" if is_trained else None,
        limit=demo.recipe.scored_clips,
        dtype="fp32",
        workers=demo.recipe.workers,
    )


def _training_keys(demo: Demo, stage: str) -> dict[str, Any]:
    """Return the keys that both stages share: small batches, for many updates from few clips."""
    from graft.checkpoints.loading import computes_bf16

    return {
        "model": demo.path("graft"),
        "data": [demo.path("data/train")],
        "out": demo.path(stage),
        "token_budget": 400,
        "warmup_steps": 5,
        "log_every": 6,
        "workers": demo.recipe.workers,
        "data_workers": 1,
        "encoder_cache": demo.path("encoded"),
        "dtype": "bf16" if computes_bf16("cpu") else "fp32",
    }


def _stage1_recipe(demo: Demo) -> stage1.Stage1Recipe:
    keys = {"epochs": demo.recipe.stage1_epochs, "learning_rate": 2e-4}
    return stage1.Stage1Recipe.model_validate(_training_keys(demo, "stage1") | keys)


def _stage2_recipe(demo: Demo) -> stage2.Stage2Recipe:
    keys = {
        "projector": demo.path("stage1"),
        "quantize": demo.recipe.quantize,
        "lora": {"rank": 32, "alpha": 32, "dropout": 0.0},
        "epochs": demo.recipe.stage2_epochs,
        "learning_rate": 3e-4,
    }
    return stage2.Stage2Recipe.model_validate(_training_keys(demo, "stage2") | keys)


def _merge_recipe(demo: Demo) -> merge.MergeRecipe:
    return merge.MergeRecipe(
        model=demo.path("stage2"),
        out=demo.path("merged"),
        onto="nf4" if demo.recipe.quantize == "nf4" else "full",
        data=demo.path("data/train"),
        clips=16,
    )


def _ask_service(demo: Demo, file: Path) -> None:
    """Start the service on the demo's Ray, post a file to it, and stop it again."""
    from .common.local_service import post, serving

    with serving(demo.path("merged"), demo.root, app="demo") as url:
        print(f"POST {url}/v1/audio/transcriptions with {file.name}: {post(url, file, model='merged')}")


def _summarize(
    demo: Demo, first: dict[str, Any], second: dict[str, Any], before: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
    """Collect the numbers of summary.json from the results of the stages and evaluations."""
    sets = report["sets"]
    return {
        "stage1": {key: first[key] for key in ("loss_first", "loss_last", "seconds")},
        "stage2": {key: second[key] for key in ("loss_first", "loss_last", "seconds")},
        "wer": {
            "trained": sets["trained"]["graft"]["wer"],
            "unseen": sets["unseen"]["graft"]["wer"],
            "unseen_as_it_comes": before["sets"]["unseen"]["graft"]["wer"],
            "swapped": sets["swapped"]["graft"]["wer"],
            "whisper_trained": sets["trained"]["whisper"]["wer"],
            "whisper_unseen": sets["unseen"]["whisper"]["wer"],
        },
        "clips": {
            "trained": len(_manifest("train")),
            "unseen": sets["unseen"]["graft"]["clips"],
            "scored": sets["trained"]["graft"]["clips"],
        },
        "seconds": {**demo.seconds, "total": round(sum(demo.seconds.values()), 1)},
        "rtfx": report["rtfx"]["graft"],
    }


def _print_results(demo: Demo, summary: dict[str, Any], tables: dict[str, str], clips: list[dict[str, Any]]) -> None:
    print("\n== results")
    for stage in ("stage1", "stage2"):
        losses = summary[stage]
        print(f"{stage}: loss {losses['loss_first']:.3f} -> {losses['loss_last']:.3f} in {losses['seconds']:.0f} s")
    for name, table in tables.items():
        print(f"\n{name}:\n{table}")
    print(EXPLANATION.format(clips=summary["clips"]["trained"]))
    print("\nseconds: " + "  ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items()))
    print(f"\nfiles in {demo.root}:{FILES}\nthree transcripts, before and after training:")
    _print_transcripts(demo, clips, "graft", "merged")
    print(
        f"\nyour own file: python -m {__package__}.transcribe model={demo.path('merged')} audio=YOUR_FILE", flush=True
    )


def _print_transcripts(demo: Demo, clips: list[dict[str, Any]], *models: str) -> None:
    for clip in clips:
        print(f"  {Path(clip['audio']).name}\n    said:  {clip['text']}")
        for model in models:
            transcript = demo.root / f"transcripts-{model}" / "files" / f"{Path(clip['audio']).stem}.json"
            print(f"    heard: {json.loads(transcript.read_text())['text']}", flush=True)


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
  transcripts-*/         text and JSON of three files, from both models
"""


if __name__ == "__main__":
    raise SystemExit(run_job(DemoRecipe, run, summary=__doc__))
