"""Recipes come from a file and overrides, complete and checked, and every fault is named in one line."""

from typing import Literal

import pytest
from pydantic import Field

from graft.config import Recipe, read_recipe, recipe_yaml
from graft.errors import RecipeError


class Schedule(Recipe):
    lr: float = 1e-3
    warmup_steps: int = 0


class Optimizer(Recipe):
    schedule: Schedule = Schedule(lr=2e-4)
    betas: tuple[float, float] = (0.9, 0.95)


class Training(Recipe):
    out: str
    """Folder of the results."""
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Optimizer = Optimizer(schedule=Schedule(lr=5e-5, warmup_steps=7))
    sources: list[str] = Field(default_factory=list)
    shares: dict[str, float] = Field(default_factory=dict)
    lora: Schedule | None = None
    steps: int | None = None


def read(*overrides: str, text: str | None = None, tmp_path=None) -> Training:
    path = None
    if text is not None:
        path = str(tmp_path / "recipe.yaml")
        (tmp_path / "recipe.yaml").write_text(text)
    return read_recipe(Training, path, ["out=here", *overrides])


def fault(*overrides: str, **more) -> str:
    with pytest.raises(RecipeError) as caught:
        read(*overrides, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    text = "precision: bf16\nsteps: 5\noptimizer:\n  schedule: {lr: 0.5}\n"
    recipe = read("optimizer.schedule.warmup_steps=3", "steps=9", text=text, tmp_path=tmp_path)
    assert (recipe.precision, recipe.steps) == ("bf16", 9)
    assert recipe.optimizer.schedule == Schedule(lr=0.5, warmup_steps=3)


def test_override_values_are_yaml():
    recipe = read(
        "sources=[a.jsonl, b.jsonl]",
        "optimizer.schedule.lr=1e-3",
        "shares.train=0.9",
        "shares.dev=0.1",
        "steps=",
        "out=s3://b/x",
    )
    assert recipe.sources == ["a.jsonl", "b.jsonl"]
    assert recipe.optimizer.schedule.lr == 1e-3
    assert recipe.shares == {"train": 0.9, "dev": 0.1}
    assert recipe.steps is None
    assert recipe.out == "s3://b/x"


def test_a_group_given_in_part_keeps_the_defaults_of_its_place():
    assert read("optimizer.betas=[0, 1]").optimizer.schedule == Schedule(lr=5e-5, warmup_steps=7)
    assert read("optimizer.schedule.warmup_steps=1").optimizer.schedule == Schedule(lr=5e-5, warmup_steps=1)
    assert read("lora.warmup_steps=1").lora == Schedule(lr=1e-3, warmup_steps=1)


def test_an_unknown_key_is_named_with_a_suggestion_at_every_depth():
    assert "unknown key precison='x' (did you mean 'precision'? known here:" in fault("precison=x")
    message = fault("optimizer.schedule.warmup_step=4")
    assert (
        "unknown key optimizer.schedule.warmup_step=4 (did you mean 'warmup_steps'? known here: lr, warmup_steps)"
        in message
    )
    assert "unknown key lora.rank=8 (known here: lr, warmup_steps)" in fault("lora.rank=8")


def test_all_faults_stand_in_one_line():
    message = fault(
        "precision=fp16", "steps=many", "optimizer.betas=[1, x]", "colour=red", "optimizer.schedule.lr=null"
    )
    for part in [
        "precision='fp16': input should be 'fp32' or 'bf16'",
        "steps='many'",
        "optimizer.betas.1='x'",
        "colour='red'",
        "optimizer.schedule.lr=None",
    ]:
        assert part in message
    assert "quotes" in fault("out=2024")


def test_a_missing_key_is_named():
    with pytest.raises(RecipeError, match="key out is required"):
        read_recipe(Training, None, [])


@pytest.mark.parametrize("override", ["steps", "=3", "optimizer..lr=3", "steps=[1", "precision.kind=3", "out=*.flac"])
def test_a_malformed_override_is_refused(override):
    assert f"override {override!r}" in fault("precision=fp32", override)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1\n", "not YAML"), ("- 1\n", "holds a list"), ("\x00", "not YAML"), ("out: 1\nout2: 2\n", "out2")],
)
def test_a_malformed_file_is_refused(text, words, tmp_path):
    message = fault(text=text, tmp_path=tmp_path)
    assert words in message
    assert "recipe.yaml" in message


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe .*none\.yaml: no such file"):
        read_recipe(Training, str(tmp_path / "none.yaml"), [])
    with pytest.raises(RecipeError, match="not readable"):
        read_recipe(Training, str(tmp_path), [])


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = read("optimizer.schedule.lr=1e-7", "shares={b: 0.5, a: 0.5}", "sources=[é.jsonl]")
    (tmp_path / "again.yaml").write_text(recipe_yaml(recipe))
    assert read_recipe(Training, str(tmp_path / "again.yaml"), []) == recipe
    assert recipe_yaml(recipe).startswith("out: here\nprecision: fp32\noptimizer:\n  schedule:\n    lr: 1.0e-07\n")
