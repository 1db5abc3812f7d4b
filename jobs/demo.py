"""Run the whole path on a few minutes of bundled speech: build, train, evaluate, transcribe and serve.

prepare -> build (pretrained) -> transcribe, evaluate -> stage 1 -> check -> stage 2 -> merge -> evaluate, transcribe, serve
Each step is the job of that name with a small recipe; everything lands in runs/demo, the numbers in runs/demo/summary.json.
"""

import json
import shutil
import sys
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
"""Sets that are scored -> their splits."""

T = TypeVar("T")


class DemoRecipe(Recipe):
    """How long to train, and where to put what comes out."""

    out: str = "runs/demo"
    """Folder for everything; what an earlier demo left there is removed."""
    pretrained: str = "small"
    """What to start from: a name that comes with graft, or a folder written by jobs.export, on the bundled pair."""
    stage1_epochs: int = Field(default=2, ge=1)
    stage2_epochs: int = Field(default=4, ge=1)
    workers: int = Field(default=2, ge=1)
    """Training workers, one thread each."""
    quantize: Literal["nf4", "none"] = "none"
    """Base of stage 2. NF4's rounding costs a language model of 135 M parameters some of its hearing; with nf4 the adapters are merged into
    what that leaves."""
    scored_clips: int = Field(default=40, ge=1)
    """Trained clips to score."""


class Demo:
    """Runs steps and keeps their seconds."""

    def __init__(self, recipe: DemoRecipe):
        self.recipe = recipe
        self.root = Path(recipe.out)
        self.seconds: dict[str, float] = {}

    def path(self, name: str) -> str:
        return str(self.root / name)

    def step(self, name: str, what: str, run: Callable[[], T]) -> T:
        print(f"\n== {name}: {what}", flush=True)
        start = time.perf_counter()
        result = run()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 1)
        return result


def run(recipe: DemoRecipe) -> dict[str, Any]:
    """Run the demo; returns what stands in summary.json."""
    from .evaluation import scoring

    demo = Demo(recipe)
    _start_afresh(recipe)
    connect()
    demo.step(
        "prepare", "64 clips to train on, 20 unseen ones, into parquet", lambda: prepare.main(_prepare_recipe(demo))
    )
    built = build.BuildRecipe(pretrained=recipe.pretrained, out=demo.path("graft"))
    demo.step(
        "build",
        "Whisper base's encoder on SmolLM2-135M, with the trained part that comes with graft",
        lambda: build.run(built),
    )
    shown = _manifest("unseen")[:3]
    files = [str(SPEECH / row["audio"]) for row in shown]
    demo.step(
        "transcribe",
        "three files that it never heard",
        lambda: transcribe.main(_transcribe_recipe(demo, "graft", files)),
    )
    _print_transcripts(demo, shown, "graft")
    before = demo.step("evaluate", "as it comes", lambda: scoring.run(_evaluate_recipe(demo, "graft")))
    first = demo.step("stage1", "the projector alone, DeepSpeed ZeRO-2", lambda: stage1.run(_stage1_recipe(demo)))
    checked = check.CheckRecipe(model=demo.path("stage1"), data=[demo.path("data/train")])
    demo.step("check", "does the model hear?", lambda: check.run(checked))
    second = demo.step("stage2", "LoRA and the projector", lambda: stage2.run(_stage2_recipe(demo)))
    demo.step("merge", "the adapters into the weights, and a comparison", lambda: merge.run(_merge_recipe(demo)))
    report = demo.step(
        "evaluate", "trained on, beside plain Whisper", lambda: scoring.run(_evaluate_recipe(demo, "merged"))
    )
    demo.step("transcribe", "the same three files", lambda: transcribe.main(_transcribe_recipe(demo, "merged", files)))
    demo.step("serve", "one of them over HTTP", lambda: _ask_server(demo, Path(files[0])))
    summary = _summary(demo, first, second, before, report)
    write_atomic(demo.root / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    _show(demo, summary, {"as it comes": before, "trained on": report}, shown)
    return summary


def _start_afresh(recipe: DemoRecipe) -> None:
    """Empty the folder of an earlier demo. Raises OutputError for any other folder, another job's results among them."""
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
    sources = [{"manifest": str(SPEECH / f"{name}.jsonl"), "split": name} for name in ("train", "unseen")]
    return prepare.PrepareRecipe.model_validate({"sources": sources, "out": demo.path("data")})


def _training(demo: Demo, stage: str) -> dict[str, Any]:
    """What both stages of the demo share: small batches, for many updates out of few clips."""
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
    return stage1.Stage1Recipe.model_validate(
        {**_training(demo, "stage1"), "epochs": demo.recipe.stage1_epochs, "learning_rate": 2e-4}
    )


def _stage2_recipe(demo: Demo) -> stage2.Stage2Recipe:
    adapters = {
        "projector": demo.path("stage1"),
        "quantize": demo.recipe.quantize,
        "lora": {"rank": 32, "alpha": 32, "dropout": 0.0},
    }
    return stage2.Stage2Recipe.model_validate(
        {**_training(demo, "stage2"), **adapters, "epochs": demo.recipe.stage2_epochs, "learning_rate": 3e-4}
    )


def _merge_recipe(demo: Demo) -> merge.MergeRecipe:
    onto = "nf4" if demo.recipe.quantize == "nf4" else "full"
    settings = {
        "model": demo.path("stage2"),
        "out": demo.path("merged"),
        "onto": onto,
        "data": demo.path("data/train"),
        "clips": 16,
    }
    return merge.MergeRecipe.model_validate(settings)


def _evaluate_recipe(demo: Demo, model: str) -> EvaluateRecipe:
    """Score the graft as it comes on unseen clips alone, the merged one on trained ones too, beside Whisper and with swapped audio."""
    is_trained_on = model == "merged"
    sets = ["trained", "unseen"] if is_trained_on else ["unseen"]
    return EvaluateRecipe(
        model=demo.path(model),
        data={name: demo.path(f"data/{SPLITS[name]}") for name in sets},
        out=demo.path(f"evaluation-{model}"),
        baseline="bundled" if is_trained_on else None,
        audio_check="trained" if is_trained_on else None,
        limit=demo.recipe.scored_clips,
        workers=demo.recipe.workers,
    )


def _transcribe_recipe(demo: Demo, model: str, files: list[str]) -> transcribe.TranscribeRecipe:
    return transcribe.TranscribeRecipe(model=demo.path(model), audio=files, out=demo.path(f"transcripts-{model}"))


def _ask_server(demo: Demo, file: Path) -> None:
    """Start the service on the demo's Ray, post a file to it, and stop it again."""
    from .common.local_service import post, serving

    with serving(demo.path("merged"), demo.root, app="demo") as url:
        print(f"POST {url}/v1/audio/transcriptions with {file.name}: {post(url, file, model='merged')}")


def _summary(
    demo: Demo, first: dict[str, Any], second: dict[str, Any], before: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
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


def _show(demo: Demo, summary: dict[str, Any], reports: dict[str, dict[str, Any]], shown: list[dict[str, Any]]) -> None:
    from .evaluation.scoring import table

    print("\n== what came of it")
    for stage in ("stage1", "stage2"):
        losses = summary[stage]
        print(f"{stage}: loss {losses['loss_first']:.3f} -> {losses['loss_last']:.3f} in {losses['seconds']:.0f} s")
    for name, report in reports.items():
        print(f"\n{name}:\n{table(report)}")
    print(WHY.format(clips=summary["clips"]["trained"]))
    print("\nseconds: " + "  ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items()))
    print(f"\nfiles in {demo.root}:")
    for name, what in FILES.items():
        print(f"  {name:<22} {what}")
    print("\nthree transcripts, as it comes and trained on:")
    _print_transcripts(demo, shown, "graft", "merged")
    print(f"\nyour own file: python -m jobs.transcribe model={demo.path('merged')} audio=YOUR_FILE", flush=True)


def _print_transcripts(demo: Demo, shown: list[dict[str, Any]], *models: str) -> None:
    for row in shown:
        print(f"  {Path(row['audio']).name}\n    said:  {row['text']}")
        for model in models:
            transcript = demo.root / f"transcripts-{model}" / "files" / f"{Path(row['audio']).stem}.json"
            print(f"    heard: {json.loads(transcript.read_text())['text']}", flush=True)


WHY = """
The graft comes with hours of training, which jobs/recipes/small-*.yaml repeat. The minutes of training on {clips} clips of one voice show
that each part learns; that voice is all they add. With the audio swapped the model writes what it hears, not what belongs to the text, so
its WER collapses as it must."""

FILES = {
    "summary.json": "these numbers",
    "data/": "the clips as parquet, and what was dropped",
    "graft/": "the graft as it comes",
    "stage1/, stage2/": "projector and adapters, metrics.jsonl, curves.png",
    "encoded/": "what the encoder made of the clips, so that it heard each once",
    "merged/": "the model that was trained on, with its trained parts in adapter/",
    "evaluation-*/": "report.json and predictions.jsonl of both",
    "transcripts-*/": "text and JSON of three files, from both",
}


def main(recipe: DemoRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(DemoRecipe, main, summary=__doc__))
