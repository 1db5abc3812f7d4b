"""Train variants of a recipe and compare their word error rates.

For each variant and seed: build -> stage 1 -> stage 2, the WER after each stage (after CTC pre-alignment the CER too), all in
out/VARIANT-SEED/; then ablation.json and ablation.md are written anew. What an earlier trial did with the same settings is not done
again, and a run that was cut off goes on.
All variants take equally many steps over the same clips when max_batch_clips bounds a batch, and token_budget never does.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from graft.config import R, Recipe, read_recipe
from graft.data.settings import Sources
from graft.errors import RecipeError
from graft.storage.atomic import write_atomic

from . import build, stage1, stage2
from .common.cli import run_job
from .common.outputs import claim_output, holds_results
from .evaluation.ablation_table import table
from .evaluation.recipe import EvaluateRecipe
from .training.recipe import EXECUTION_KEYS

if TYPE_CHECKING:
    from graft.data.dataset import RowTable

RESULT_FILE, TABLE_FILE = "ablation.json", "ablation.md"
BASE = "base"
Settings = dict[Literal["build", "stage1", "stage2"], dict[str, Any]]
"""Keys of three jobs' recipes; a variant names those alone that it changes."""


class AblateRecipe(Recipe):
    """What is compared, and on what."""

    data: Sources
    """To train on, as in jobs.stage1."""
    out: str
    """Folder for everything; a run that was cut off goes on there, also with more variants and seeds."""
    validation: Sources | None = None
    """Measure the loss on these clips as well; the best weights are then the result of a stage."""
    evaluate: dict[str, Sources] = Field(default={})
    """Name of a test set -> its data, as in jobs.evaluate; by default the validation's."""
    scoring: dict[str, Any] = Field(default={})
    """Other keys of jobs.evaluate, such as limit and batch_clips."""
    base: Settings = Field(default={})
    """The recipe that the variants change; a stage's encoder_cache is OUT/encoded unless it is given."""
    variants: dict[str, Settings] = Field(default={})
    """Name, which its folder has too -> what is changed; groups such as lora are changed key by key."""
    last_stage: Literal[1, 2] = 2
    """Last stage to train: 2 for both; 1 compares the projectors alone, which takes minutes with `stage1.objective: ctc`."""
    seeds: list[int] | dict[str, list[int]] = Field(default=[0])
    """Of every variant, or of those named, `base` among them; the others have seed 0."""


@dataclass(frozen=True)
class Trial:
    """A variant with a seed: the recipes of its jobs, of which an earlier trial may have done some; `scoring` lacks the model."""

    variant: str
    seed: int
    build: build.BuildRecipe
    stage1: stage1.Stage1Recipe
    stage2: stage2.Stage2Recipe
    scoring: EvaluateRecipe


def run(recipe: AblateRecipe) -> None:
    """Train and score all variants. Raises what the jobs raise, and RecipeError before the first of them."""
    from graft.data.dataset import read_rows

    from .training.samples import trainable

    planned = trials(recipe)
    rows, _ = trainable(read_rows(recipe.data))
    out = claim_output(
        recipe.out, recipe.model_copy(update={"variants": {}, "seeds": [0], "last_stage": 2})
    )  # these may grow
    results: list[dict[str, Any]] = []
    unchanged = _trial(recipe, BASE, {}, 0, {})
    for trial in planned:
        changes = recipe.variants.get(trial.variant, {})
        change = ", ".join(_in_words(changes, {job: getattr(unchanged, job).model_dump() for job in changes})) or "-"
        print(f"\n== {trial.variant}-{trial.seed}, {len(results) + 1} of {len(planned)}: {change}", flush=True)
        results.append(
            {"variant": trial.variant, "seed": trial.seed, "change": change, **_result(trial, rows, recipe.last_stage)}
        )
        write_atomic(out / RESULT_FILE, json.dumps(results, indent=2) + "\n")
        write_atomic(out / TABLE_FILE, table(results))
    print(f"\n{table(results)}", end="", flush=True)


def trials(recipe: AblateRecipe) -> list[Trial]:
    """All that is to be done, the base first. Raises RecipeError for a wrong setting of any variant."""
    variants: dict[str, Settings] = {BASE: {}, **recipe.variants}
    if BASE in recipe.variants:
        raise RecipeError(f"variants.{BASE}: that name is the unchanged recipe's: give the variant another one")
    if not recipe.evaluate and recipe.validation is None:
        raise RecipeError("there is nothing to score: give evaluate.NAME=DATA, or validation=DATA")
    given = recipe.seeds if isinstance(recipe.seeds, dict) else dict.fromkeys(variants, recipe.seeds)
    if unknown := given.keys() - variants:
        raise RecipeError(f"seeds.{min(unknown)}: there is no such variant: give {', '.join(variants)}")
    homes: dict[str, Path] = {}
    return [
        _trial(recipe, name, change, seed, homes) for name, change in variants.items() for seed in given.get(name, [0])
    ]


def _trial(recipe: AblateRecipe, name: str, change: Settings, seed: int, homes: dict[str, Path]) -> Trial:
    """Put a trial's recipes together; `homes` are the folders of those who were the first with a build or a stage 1."""
    home, given = Path(recipe.out, f"{name}-{seed}"), recipe.model_dump(mode="json")
    settings = _changed({"build": {}, "stage1": {}, "stage2": {}} | given["base"], change)
    built = homes.setdefault(json.dumps([seed, settings["build"]]), home)
    trained = homes.setdefault(json.dumps([seed, settings["build"], settings["stage1"]]), home)
    validation = {"data": given["validation"]} if recipe.validation else None
    shared = {"encoder_cache": str(Path(recipe.out, "encoded")), "validation": validation}
    graft, first, second = str(built / "graft"), str(trained / "stage1"), str(home / "stage2")
    training = {"model": graft, "data": given["data"], "seed": seed}
    sets = given["evaluate"] or {"validation": given["validation"]}
    return Trial(
        name,
        seed,
        _read(build.BuildRecipe, f"{name}.build", settings["build"], out=graft, seed=seed),
        _read(stage1.Stage1Recipe, f"{name}.stage1", _changed(shared, settings["stage1"]), out=first, **training),
        _read(
            stage2.Stage2Recipe,
            f"{name}.stage2",
            _changed(shared, settings["stage2"]),
            out=second,
            projector=first,
            **training,
        ),
        _read(EvaluateRecipe, "scoring", {"baseline": None, **recipe.scoring}, model="", out="", data=sets),
    )


def _changed(base: Mapping[Any, Any], changes: Mapping[Any, Any]) -> dict[str, Any]:
    """The base with the changes; a group is changed key by key."""
    groups = [key for key, value in changes.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return {**base, **changes, **{key: _changed(base[key], changes[key]) for key in groups}}


def _read(recipe_class: type[R], where: str, settings: Mapping[str, Any], **given: Any) -> R:
    """A job's recipe. Raises RecipeError that says where its settings stand."""
    if taken := settings.keys() & given.keys():
        raise RecipeError(f"{where}.{min(taken)} is for jobs.ablate to give: leave it out")
    try:
        return read_recipe(
            recipe_class, None, [f"{key}={json.dumps(value)}" for key, value in {**settings, **given}.items()]
        )
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _in_words(changes: Mapping[Any, Any], was: Mapping[Any, Any] | None) -> Iterator[str]:
    """Each change as `key new instead of old`; groups give those of their keys."""
    for key, value in changes.items():
        old = (was or {}).get(key)
        yield from _in_words(value, old) if isinstance(value, dict) else [f"{key} {value} instead of {old}"]


def _result(trial: Trial, rows: "RowTable", last_stage: int) -> dict[str, Any]:
    from graft.checkpoints.loading import open_processor

    from .training.samples import audio_counts

    if not holds_results(trial.build.out, build.as_trained(trial.build)):
        build.run(trial.build)
    by_ctc = trial.stage1.objective == "ctc"
    counts = audio_counts(open_processor(trial.build.out), rows.duration_s)
    results = {
        "audio_tokens_per_s": float(counts.sum() / rows.duration_s.sum()),
        "stage1": stage1.run(trial.stage1)
        | (_ctc_scores(trial) if by_ctc else _scores(trial.stage1.out, trial.scoring)),
    }
    if last_stage == 2:
        results["stage2"] = stage2.run(trial.stage2) | _scores(trial.stage2.out, trial.scoring)
    return results


def _ctc_scores(trial: Trial) -> dict[str, dict[str, Any]]:
    from .evaluation.ctc import score_ctc

    recipe = trial.scoring.model_copy(update={"model": trial.stage1.out, "out": f"{trial.stage1.out}-scored"})
    return {"spelled": score_ctc(recipe, trial.stage1.letters)}


def _scores(stage: str, recipe: EvaluateRecipe) -> dict[str, dict[str, Any]]:
    """Set -> what jobs.evaluate finds of a stage there, now or in an earlier run."""
    from .evaluation.scoring import REPORT_FILE
    from .evaluation.scoring import run as score

    recipe = recipe.model_copy(update={"model": stage, "out": f"{stage}-scored"})
    is_done = holds_results(recipe.out, recipe, ignore=EXECUTION_KEYS)
    report = json.loads(Path(recipe.out, REPORT_FILE).read_text()) if is_done else score(recipe)
    return {"scores": {name: report["sets"][name]["graft"] for name in recipe.data}}


if __name__ == "__main__":
    sys.exit(run_job(AblateRecipe, run, summary=__doc__))
