"""Train variants of a recipe and compare their word error rates.

Each variant is a small change of the base recipe. For each variant and seed: build -> stage 1 -> stage 2, with the
error rates after each stage (after CTC pre-alignment those of its letters), all in out/VARIANT-SEED/; then
ablation.json and ablation.md are written anew. Steps that an earlier trial ran with the same settings are not repeated,
and a run that was cut off continues. All variants take equally many steps over the same clips when max_batch_clips
bounds a batch, and token_budget never does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from graft.config import R, Recipe, make_recipe
from graft.data.settings import Sources
from graft.errors import RecipeError
from graft.keys import DataKey, OutputKey, ScheduleKey
from graft.storage.atomic import write_atomic
from graft.text.wer import score

from . import build, stage1, stage2
from .common.cli import run_job
from .common.outputs import claim_output, holds_results, locked_output
from .evaluate import REPORT_FILE, EvaluateRecipe, evaluate
from .training.recipe import EXECUTION_KEYS

RESULT_FILE, TABLE_FILE = "ablation.json", "ablation.md"
BASE = "base"
COUNTS = {
    "loss": "loss_last",
    "validation loss": "validation_loss",
    "steps": "steps",
    "audio s": "audio_s",
    "seconds": "seconds",
}
"""Columns for each stage, and the keys of its results that they show."""
UNEQUAL_STEPS = """
Not all variants took equally many steps: raise token_budget or lower max_batch_clips, unless steps are compared.
"""
Settings = dict[Literal["build", "stage1", "stage2"], dict[str, Any]]
"""Keys of the recipes of three commands; a variant gives only those that it changes."""


class AblateRecipe(Recipe):
    """The variants to compare, and the data to train and score them on."""

    data: DataKey[Sources]
    """Training data, as in graft stage1."""
    out: OutputKey[str]
    """Folder for everything; a run that was cut off continues there, also with more variants and seeds."""
    validation: DataKey[Sources | None] = None
    """Clips on which the loss is measured in training; the best weights are then the result of a stage."""
    evaluate: DataKey[dict[str, Sources]] = Field(default={})
    """Test sets to score: names of your own and their data, as in graft evaluate; by default the validation clips."""
    scoring: OutputKey[dict[str, Any]] = Field(default={})
    """Further keys of graft evaluate, such as limit and batch_clips."""
    base: ScheduleKey[Settings] = Field(default={})
    """The recipe that the variants change. The encoder_cache of a stage is OUT/encoded unless it is given here."""
    variants: ScheduleKey[dict[str, Settings]] = Field(default={})
    """Variants: a name, which is also that of its folder, and the keys that it changes; groups such as lora are changed
    key by key."""
    last_stage: ScheduleKey[Literal[1, 2]] = 2
    """Last stage to train; 1 compares the joins alone, which takes minutes with objective=ctc."""
    seeds: ScheduleKey[list[int] | dict[str, list[int]]] = Field(default=[0])
    """Random seeds of every variant, or by variant, `base` among them; variants that are not named take seed 0."""


@dataclass(frozen=True)
class Trial:
    """A variant with a seed: the recipes of its commands, of which an earlier trial may have run some."""

    variant: str
    seed: int
    build: build.BuildRecipe
    stage1: stage1.Stage1Recipe
    stage2: stage2.Stage2Recipe
    scoring: EvaluateRecipe
    """The recipe of graft evaluate, without its model and folder."""


def run(recipe: AblateRecipe) -> None:
    """Train and score all variants. Raises RecipeError before the first of them, and the errors of the commands."""
    planned = trials(recipe)
    with locked_output(recipe.out):
        _run_trials(planned, recipe)


def _run_trials(planned: Sequence[Trial], recipe: AblateRecipe) -> None:
    from graft.data.dataset import read_rows

    from .training.samples import trainable

    rows, _ = trainable(read_rows(recipe.data))
    # A later run may add variants, seeds and a stage.
    out = claim_output(recipe.out, recipe.model_copy(update={"variants": {}, "seeds": [0], "last_stage": 2}))
    results: list[dict[str, Any]] = []
    unchanged = _make_trial(recipe, BASE, {}, 0, {})
    for trial in planned:
        changes = recipe.variants.get(trial.variant, {})
        base = {command: getattr(unchanged, command).model_dump() for command in changes}
        change = ", ".join(_describe_changes(changes, base)) or "-"
        print(f"\n== {trial.variant}-{trial.seed}, {len(results) + 1} of {len(planned)}: {change}", flush=True)
        scores = _run_trial(trial, rows.duration_s, recipe.last_stage)
        results.append({"variant": trial.variant, "seed": trial.seed, "change": change} | scores)
        write_atomic(out / RESULT_FILE, json.dumps(results, indent=2) + "\n")
        write_atomic(out / TABLE_FILE, table(results))
    print(f"\n{table(results)}", end="", flush=True)


def trials(recipe: AblateRecipe) -> list[Trial]:
    """List all trials, the base first. Raises RecipeError for a wrong setting of any variant."""
    variants: dict[str, Settings] = {BASE: {}, **recipe.variants}
    if BASE in recipe.variants:
        raise RecipeError(f"variants.{BASE}: that name is the unchanged recipe's: give the variant another one")
    if not recipe.evaluate and recipe.validation is None:
        raise RecipeError("there is nothing to score: give evaluate.NAME=DATA, or validation=DATA")
    seeds = recipe.seeds if isinstance(recipe.seeds, dict) else dict.fromkeys(variants, recipe.seeds)
    if unknown := seeds.keys() - variants:
        raise RecipeError(f"seeds.{min(unknown)}: there is no such variant: give {', '.join(variants)}")
    folders: dict[str, Path] = {}
    return [
        _make_trial(recipe, name, changes, seed, folders)
        for name, changes in variants.items()
        for seed in seeds.get(name, [0])
    ]


def _make_trial(recipe: AblateRecipe, name: str, changes: Settings, seed: int, folders: dict[str, Path]) -> Trial:
    """Make a trial's recipes; `folders` are those of the first trials with the same build, or build and stage 1."""
    folder, given = Path(recipe.out, f"{name}-{seed}"), recipe.model_dump(mode="json")
    settings = _merged({"build": {}, "stage1": {}, "stage2": {}} | given["base"], changes)
    built = folders.setdefault(json.dumps([seed, settings["build"]]), folder)
    trained = folders.setdefault(json.dumps([seed, settings["build"], settings["stage1"]]), folder)
    validation = {"data": given["validation"]} if recipe.validation else None
    shared = {"encoder_cache": str(Path(recipe.out, "encoded")), "validation": validation}
    keys1, keys2 = (_merged(shared, settings[stage]) for stage in ("stage1", "stage2"))
    graft, first, second = str(built / "graft"), str(trained / "stage1"), str(folder / "stage2")
    training = {"model": graft, "data": given["data"], "seed": seed}
    return Trial(
        name,
        seed,
        _recipe(build.BuildRecipe, f"{name}.build", settings["build"], out=graft, seed=seed),
        _recipe(stage1.Stage1Recipe, f"{name}.stage1", keys1, out=first, **training),
        _recipe(stage2.Stage2Recipe, f"{name}.stage2", keys2, out=second, projector=first, **training),
        _recipe(
            EvaluateRecipe,
            "scoring",
            {"baseline": None, "checks": 0, "page": False, **recipe.scoring},
            model="",
            out="",
            data=given["evaluate"] or {"validation": given["validation"]},
        ),
    )


def _merged(base: Mapping[Any, Any], changes: Mapping[Any, Any]) -> dict[str, Any]:
    """Merge changes into the base; groups are merged key by key."""
    groups = [key for key, value in changes.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return {**base, **changes, **{key: _merged(base[key], changes[key]) for key in groups}}


def _recipe(recipe_class: type[R], where: str, settings: Mapping[str, Any], **given: Any) -> R:
    """Make a command's recipe. Raises RecipeError that begins with `where` its settings are."""
    if taken := settings.keys() & given.keys():
        raise RecipeError(f"{where}.{min(taken)} is for `graft ablate` to give: leave it out")
    return make_recipe(recipe_class, {**settings, **given}, name=f"{where}: recipe")


def _describe_changes(changes: Mapping[Any, Any], base: Mapping[Any, Any] | None) -> Iterator[str]:
    """Yield each change as `key new instead of old`; groups yield the changes of their keys."""
    for key, value in changes.items():
        old = (base or {}).get(key)
        yield from _describe_changes(value, old) if isinstance(value, dict) else [f"{key} {value} instead of {old}"]


def _run_trial(trial: Trial, durations_s: np.ndarray, last_stage: int) -> dict[str, Any]:
    """Build, train and score, or read what an earlier run left; returns the results by stage."""
    from graft.checkpoints.loading import open_processor

    from .training.samples import audio_counts

    if not holds_results(trial.build.out, build.with_trained_settings(trial.build)):
        build.run(trial.build)
    counts = audio_counts(open_processor(trial.build.out), durations_s)
    results: dict[str, Any] = {
        "audio_tokens_per_s": float(counts.sum() / durations_s.sum()),
        "stage1": stage1.run(trial.stage1),
    }
    scored1, scored2 = (
        trial.scoring.model_copy(update={"model": stage.out, "out": f"{stage.out}-scored"})
        for stage in (trial.stage1, trial.stage2)
    )
    if trial.stage1.objective == "ctc":
        results["stage1"]["spelled"] = score_ctc(scored1, results["stage1"]["letters"])
    else:
        results["stage1"]["scores"] = _score(scored1)
    if last_stage == 2:
        results["stage2"] = stage2.run(trial.stage2) | {"scores": _score(scored2)}
    return results


def _score(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Return the graft's scores by test set, from an earlier run's report if it is there."""
    is_scored = holds_results(recipe.out, recipe, ignore=EXECUTION_KEYS)
    report = json.loads(Path(recipe.out, REPORT_FILE).read_text()) if is_scored else evaluate(recipe)
    sets = {name: one["systems"]["graft"] for name, one in report["sets"].items()}
    # A set of several languages is one for each, "NAME LANGUAGE".
    return {name: rates for name, rates in sets.items() if {name, name.rpartition(" ")[0]} & recipe.data.keys()}


def score_ctc(recipe: EvaluateRecipe, letters: str) -> dict[str, dict[str, float]]:
    """Score a stage 1 of CTC pre-alignment: the letters that CTC decodes against those of the reference text.

    Returns graft.text.wer.Score's rates by test set, from an earlier run's report if it is there. Clips that cannot be
    read are left out. Raises DataError for rows without text, ModelError, and OutputError.
    """
    with locked_output(recipe.out):
        path = claim_output(recipe.out, recipe, ignore=EXECUTION_KEYS) / REPORT_FILE
        if not path.exists():
            write_atomic(path, json.dumps(_ctc_scores(recipe, letters), indent=2) + "\n")
        return json.loads(path.read_text())


def _ctc_scores(recipe: EvaluateRecipe, letters: str) -> dict[str, dict[str, float]]:
    import torch

    from graft.checkpoints.loading import open_graft
    from graft.data.dataset import RowReader
    from graft.model.ctc import CtcPrealignment

    from .evaluation.test_sets import as_rows, labelled
    from .training.samples import MAX_DURATION_S
    from .training.validation import readable

    model, processor = open_graft(recipe.model, device="cpu", dtype=torch.float32)
    prealignment = CtcPrealignment(model, processor.tokenizer, letters).eval()
    scores = {}
    for name, sources in recipe.data.items():
        texts, transcripts = [], []
        rows = as_rows(labelled(name, sources, limit=recipe.limit, language=recipe.language))
        for _, text, clip in readable(rows, RowReader(rows.files), max_s=MAX_DURATION_S):
            inputs = processor(audio=clip)
            texts.append(prealignment.normalize(text))
            transcripts.append(prealignment.greedy_decode(inputs["input_features"], inputs["audio_frame_counts"])[0])
        scores[name] = score(texts, transcripts, language=recipe.language).to_dict()
    return scores


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lay results out by WER on the first set, the lowest first; `a / b` are stage 1 and, if it was run, stage 2."""
    stages = [stage for stage in ("stage1", "stage2") if stage in results[0]]
    sets = list(_scores(results[0]["stage1"]))
    columns = [(name, stage) for name in sets for stage in reversed(stages)]
    titles = [f"WER {name}, stage {stage[-1]}" for name, stage in columns]
    header = ["variant", "change", *titles, *COUNTS, "audio tokens/s"]
    rows = [header, ["---"] * len(header)]
    for result in sorted(results, key=lambda result: _scores(result[stages[-1]])[sets[0]]["wer"]):
        rates = [_rates_text(result[stage], name) for name, stage in columns]
        counts = [" / ".join(_number_text(result[stage][key]) for stage in stages) for key in COUNTS.values()]
        name, tokens_per_s = f"{result['variant']}-{result['seed']}", f"{result['audio_tokens_per_s']:.1f}"
        rows.append([name, result["change"], *rates, *counts, tokens_per_s])
    steps = {tuple(result[stage]["steps"] for stage in stages) for result in results}
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + (UNEQUAL_STEPS if len(steps) > 1 else "")


def _scores(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    return stage["spelled"] if "spelled" in stage else stage["scores"]


def _rates_text(stage: Mapping[str, Any], name: str) -> str:
    rates = _scores(stage)[name]
    wer = f"{rates['wer']:.1%} [{rates['wer_low']:.1%}, {rates['wer_high']:.1%}]"
    return f"{wer}, CER {rates['cer']:.1%}, by CTC" if "spelled" in stage else wer


def _number_text(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}" if number < 1000 else f"{number:.0f}"


EXAMPLES = (
    "--recipe small-ablation data=runs/data/train validation=runs/data/dev out=runs/ablation",
    "--recipe small-ablation data=runs/data/train validation=runs/data/dev last_stage=1 seeds=0,1 out=runs/ablation",
)
"""Arguments that --help shows."""
main = partial(run_job, AblateRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
