"""Read an evaluation: the answers of its systems, counted clip by clip, its scores and its recipe.

predictions.jsonl -> test sets -> counts of each clip, as graft score makes them
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.errors import DataError
from graft.text.wer import NORMALIZERS

from ..pairing import pair
from ..predictions import Prediction, read_predictions
from ..samples import CountedSet, ScoringSettings, count_set
from ..scoring import by_language, score_predictions

PREDICTIONS_FILE, REPORT_FILE, RECIPE_FILE = "predictions.jsonl", "report.json", "recipe.yaml"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as the page shows it."""

    scores: Mapping[str, Any]
    """The content of report.json or scores.json."""
    sets: Sequence[CountedSet]
    """The sets with the counts of each clip."""
    recipe: str | None = None
    """The resolved recipe as YAML."""
    folder: Path | None = None
    """The output folder of graft evaluate."""
    systems: Sequence[str] = field(default=())
    """All systems, the evaluated model first."""


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read the output folder of graft evaluate. Raises DataError where a file cannot be read."""
    folder = Path(folder)
    try:
        with (folder / PREDICTIONS_FILE).open(encoding="utf-8") as file:
            lines = list(read_predictions(file, str(folder / PREDICTIONS_FILE)))
        report = folder / REPORT_FILE
        scores = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
        recipe = folder / RECIPE_FILE
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no folder of graft evaluate ({error}): evaluate again") from error
    if scores is not None and (not isinstance(scores, dict) or not {"sets", "settings"} <= scores.keys()):
        raise DataError(f"{folder / REPORT_FILE} holds no scores of this version: evaluate again, or remove it")
    return evaluation_of(lines, scores=scores, recipe=text, folder=folder)


def evaluation_of(
    lines: Sequence[Prediction],
    *,
    scores: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    folder: Path | None = None,
    own_references: bool = True,
) -> Evaluation:
    """Count the clips of predictions, and score them where no scores are given. Raises DataError, MissingExtra."""
    if scores is None:
        scores = score_predictions(lines, own_references=own_references)
    sets, _ = pair(lines, own_references=own_references)
    counted = []
    for one in sets:
        for part in by_language(one, ScoringSettings()):
            counted.append(count_set(part, _settings(scores, part.name)))
    systems = dict.fromkeys(system for one in counted for system in one.systems)
    return Evaluation(scores, counted, recipe, folder, [*systems])


def _settings(scores: Mapping[str, Any], set_name: str) -> ScoringSettings:
    """Return how a set was scored, as far as its scores say."""
    normalizer = scores["sets"].get(set_name, {}).get("normalizer")
    return ScoringSettings(
        scorer=scores["settings"]["scorer"], normalizer=normalizer if normalizer in NORMALIZERS else None
    )
