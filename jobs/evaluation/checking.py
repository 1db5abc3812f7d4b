"""Choose what checks an evaluation before it runs, and judge it afterwards (honesty).

test sets -> clips with other audio, sounds, clips with context words -> answers (predict) -> checks of report.json
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from graft.data.dataset import RowTable, read_rows
from graft.data.settings import Sources
from graft.errors import GraftError, ModelError
from graft.processor import SpeechProcessor

from ..common.outputs import RECIPE_FILE
from . import honesty
from .check_sets import ContextClips, context_clips, spread, swapped
from .overlap import find_duplicates, find_overlap
from .predictions import Prediction
from .test_sets import Item, sounds

NO_TRAINING = "the model's folder does not say what it was trained on: give train_data"
TRAINED_FROM = ("adapters", "projector", "model")
"""Keys of recipes that name what a model was trained or made from."""


@dataclass(frozen=True)
class PlannedChecks:
    """What the model transcribes besides the test sets, and the context words; or why there are none."""

    items: Sequence[Item] = ()
    context: ContextClips | None = None
    no_context: str = ""


def plan_checks(
    items: Sequence[Item], processor: SpeechProcessor, folder: Path, *, clips: int, seed: int, makes_sounds: bool
) -> PlannedChecks:
    """Choose up to `clips` clips for each check; what has to be made for them is written into the folder."""
    if not clips:
        return PlannedChecks()
    spoken = spread([item for item in items if item.text.strip()], clips)
    made = sounds(seed, folder, are_checks=True) if makes_sounds else []
    context = context_clips(spoken)
    reason = "the references have too few rare words"
    if context:
        try:
            processor.instruction(None, context.words)
        except ModelError as error:
            context, reason = None, str(error)
    return PlannedChecks([*swapped(spoken), *made, *(context.items if context else ())], context, reason)


def judge(
    planned: PlannedChecks,
    items: Sequence[Item],
    predictions: Sequence[Prediction],
    answers: Sequence[Prediction],
    scores: Mapping[str, Any],
    *,
    system: str,
    training: RowTable | str,
    instructions: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the checks of a run, whose model is `system`.

    `items` are the clips of the data, `training` the rows that the model was trained on, or why they are not known.
    """
    overlap = None if isinstance(training, str) else find_overlap(items, training)
    words = planned.context.words if planned.context else ()
    return {
        "checks": [
            honesty.check_duplicates(find_duplicates(items), predictions),
            honesty.check_overlap(overlap, predictions, training if isinstance(training, str) else ""),
            honesty.check_swapped_audio(predictions, answers, system),
            honesty.check_prompt_leakage([*predictions, *answers], instructions),
            honesty.check_no_speech([*predictions, *answers], system),
            honesty.check_context_words(answers, words, system, planned.no_context),
            honesty.check_label_noise(scores),
        ]
    }


def training_rows(train_data: Sources | None, model: str) -> RowTable | str:
    """Return the rows that a model was trained on, by `train_data` or the recipes in its folder; or why it cannot."""
    try:
        if train_data is not None:
            return read_rows(train_data)
        sources = list(chain.from_iterable(_sources_of(recipe) for recipe in recipes_of(model)))
        return read_rows(sources) if sources else NO_TRAINING
    except (GraftError, ValueError) as error:
        return f"its training data cannot be read ({' '.join(str(error).split())})"


def recipes_of(model: str) -> list[Mapping[str, Any]]:
    """Return the recipe in a model's folder, and those of what it was made from."""
    return list(_recipes(model).values())


def recipe_folders(model: str) -> list[Path]:
    """Return the model's folder, and those of what it was made from, as far as they have recipes."""
    return list(_recipes(model))


def _recipes(model: str) -> dict[Path, Mapping[str, Any]]:
    """Read the recipe in a model's folder, and those of what it was made from, by their folders."""
    left, found = [Path(model)], dict[Path, Mapping[str, Any]]()
    while left:
        folder = left.pop(0)
        if folder in found or not (folder / RECIPE_FILE).is_file():
            continue
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
            recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
            if isinstance(recipe, dict):
                found[folder] = recipe
                left += [Path(recipe[key]) for key in TRAINED_FROM if isinstance(recipe.get(key), str)]
    return found


def _sources_of(recipe: Mapping[str, Any]) -> list[Any]:
    """Return the training data that a stage's recipe names, without their weights."""
    from pydantic import TypeAdapter

    if "data" not in recipe or "learning_rate" not in recipe:
        return []
    data = TypeAdapter(Sources).validate_python(recipe["data"])
    return list(data) if isinstance(data, list) else [data]
