"""Tests that each bundled recipe is read by its command, and that the reference's settings are the published."""

import pytest

from graft.checkpoints.known_bases import AUDIO_BASES, TEXT_BASES
from graft.config import Recipe, read_recipe
from jobs.ablate import AblateRecipe
from jobs.build import BuildRecipe
from jobs.evaluate import EvaluateRecipe
from jobs.label import LabelRecipe
from jobs.prepare import PrepareRecipe
from jobs.stage1 import Stage1Recipe
from jobs.stage2 import Stage2Recipe
from tests.support.paths import ROOT

RECIPES = ROOT / "jobs" / "recipes"
CLASSES: dict[str, type[Recipe]] = {
    "build": BuildRecipe,
    "stage1": Stage1Recipe,
    "stage2": Stage2Recipe,
    "data": PrepareRecipe,
    "unlabelled": PrepareRecipe,
    "dev": PrepareRecipe,
    "start": Stage2Recipe,
    "further": Stage2Recipe,
    "label": LabelRecipe,
    "evaluate": EvaluateRecipe,
    "ablation": AblateRecipe,
}
GIVEN = {"model": "m", "projector": "p", "data": "d", "out": "o"}
"""Keys that a recipe may leave to the command line."""
KINDS = ("reference-7b", "fast-7b", "quality-7b", "reference-2b", "fast-2b", "quality-2b", "small")


def read(name: str) -> Recipe:
    recipe_class = CLASSES[name.rpartition("-")[2]]
    text = (RECIPES / f"{name}.yaml").read_text()
    fields = recipe_class.model_fields.items()
    missing = [f"{key}={GIVEN[key]}" for key, field in fields if field.is_required() and f"\n{key}:" not in text]
    return read_recipe(recipe_class, str(RECIPES / f"{name}.yaml"), missing)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.iterdir()))
def test_recipe_is_read(name):
    out = read(name).out
    assert (
        out.startswith("runs/small/")
        if name.startswith("small-weights-") and name != "small-weights-evaluate"
        else out == "o"
    )


def test_the_recipes_of_the_small_weights_follow_one_another():
    data, unlabelled, label, dev = (read(f"small-weights-{job}") for job in ("data", "unlabelled", "label", "dev"))
    first, start, second, last, evaluate = (
        read(f"small-weights-{job}") for job in ("stage1", "start", "stage2", "further", "evaluate")
    )
    splits = {f"{recipe.out}/{source.split}" for recipe in (data, unlabelled) for source in recipe.long_sources()}
    later = {f"{data.out}/piper", f"{data.out}/more"}
    for stage in (first, start, second, last):
        assert stage.model == "runs/small/graft"
        assert {source.files for source in stage.data} == splits - (set() if stage is last else later)
        assert {source.texts for source in stage.data} == {None, f"{label.out}/texts.parquet"}
    assert label.data == f"{unlabelled.out}/train"
    assert start.projector == first.out
    assert (second.adapters, last.adapters) == (start.out, second.out)
    assert first.encoder_cache == start.encoder_cache == second.encoder_cache
    held_out = {f"{dev.out}/{source.split}" for source in dev.long_sources()}
    assert set(second.validation.data) == set(last.validation.data) < set(evaluate.data.values()) == held_out
    assert not held_out & splits


def test_there_is_a_recipe_for_each_stage_and_kind():
    assert {path.stem for path in RECIPES.iterdir()} == {
        *(f"{kind}-{job}" for kind in KINDS for job in ("build", "stage1", "stage2")),
        "reference-evaluate",
        "small-ablation",
        *(
            f"small-weights-{job}"
            for job in ("data", "unlabelled", "label", "dev", "stage1", "start", "stage2", "further", "evaluate")
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_are_known_by_shape(kind):
    recipe = read(f"{kind}-build")
    assert recipe.audio_base in AUDIO_BASES
    assert recipe.text_base in TEXT_BASES


@pytest.mark.parametrize("size", ["7b", "2b"])
def test_the_reference_is_the_published_one(size):
    build, first, second = (read(f"reference-{size}-{job}") for job in ("build", "stage1", "stage2"))
    assert (build.audio_pool, build.audio_context, build.audio_projector) == (1, "full", "linear")
    assert (build.prompt_style, build.text_style) == ("reference", "raw")
    assert (first.max_batch_clips, first.step_batches, first.max_steps, first.learning_rate) == (8, 4, 5000, 1e-3)
    assert (second.max_batch_clips, second.step_batches, second.max_steps, second.learning_rate) == (4, 4, 1250, 2e-4)
    for stage in (first, second):
        assert (stage.schedule, stage.warmup_steps, stage.dtype, stage.attention) == (
            "linear",
            0,
            "bf16",
            "flash_attention_2",
        )
        assert stage.token_budget // stage.max_batch_clips >= 1800
        assert (stage.augment, stage.no_speech, stage.words.is_default) == (None, 0, True)
    assert first.epochs * 20_000 == first.max_steps * first.max_batch_clips * first.step_batches
    assert second.epochs * 20_000 == second.max_steps * second.max_batch_clips * second.step_batches
    assert (second.quantize, second.gradient_checkpointing) == ("nf4", True)
    assert (second.lora.rank, second.lora.alpha, second.lora.dropout) == (64, 16, 0.05)


def test_the_published_weights_are_expected_to_score_as_published():
    recipe = read("reference-evaluate")
    low, high = recipe.expected["test"]["wer_raw"]
    assert low < 0.1133 < high
    assert recipe.data.keys() == recipe.expected.keys()
