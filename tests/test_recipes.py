"""Every recipe that ships can be read by its job."""

from pathlib import Path

import pytest

from graft.config import read_recipe
from jobs.stage1 import Stage1Recipe
from jobs.stage2 import Stage2Recipe

RECIPES = sorted((Path(__file__).parent.parent / "jobs" / "recipes").glob("*.yaml"))
CLASSES = {"stage1": Stage1Recipe, "stage2": Stage2Recipe}
GIVEN = {"stage1": ["model=m", "data=[d]", "out=o"], "stage2": ["model=m", "projector=p", "data=[d]", "out=o"]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read(path):
    stage = path.stem.rpartition("-")[2]
    recipe = read_recipe(CLASSES[stage], str(path), GIVEN[stage])
    assert recipe.out == "o"


def test_there_is_a_recipe_for_each_stage_and_size():
    assert {path.stem for path in RECIPES} >= {f"{size}-{stage}" for size in ("small", "7b") for stage in CLASSES}
