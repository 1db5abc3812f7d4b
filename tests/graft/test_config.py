"""Recipes come from a file and overrides, complete and checked, and every fault is named in one line."""

from typing import Any, Literal

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


class Files(Recipe):
    files: str | list[str]
    weight: float = 1


class Training(Recipe):
    out: str
    """Folder of the results."""
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Optimizer = Optimizer(schedule=Schedule(lr=5e-5, warmup_steps=7))
    sources: list[str] = Field(default_factory=list)
    shares: dict[str, float] = Field(default_factory=dict)
    lora: Schedule | None = None
    steps: int | None = None
    words: list[str] | None = None
    level: Literal[1, 2] = 1
    strict: bool = False
    note: str | None = None
    kinds: dict[str, dict[str, str]] = Field(default_factory=dict)
    free: dict[str, Any] = Field(default_factory=dict)
    data: str | Files | list[str | Files] | None = None
    parts: list[Files] = Field(default_factory=list)
    rate: float = Field(default=0.5, gt=0, le=1)


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


@pytest.mark.parametrize(
    "text",
    [
        *(
            "call #1.wav",
            "*.mp3",
            "&a",
            "2024-05-01",
            "3",
            "true",
            "null",
            "~",
            "a: b",
            "- a",
            "{a}.wav",
            "[2024] a.wav",
        ),
        *("'a'", '"a b"', "a,b", "!x", "%x", "@x", "C:\\a", "é", "s3://b/x?y=1", " a ", "[", "{", "[a.wav]"),
    ],
)
def test_text_is_taken_as_it_is_typed(text):
    assert read(f"out={text}").out == text


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("call #1.wav", ["call #1.wav"]),
        ("a.jsonl,2024-05-01, null", ["a.jsonl", "2024-05-01", "null"]),
        ("[a.jsonl, 2024-05-01, null, 3, true]", ["a.jsonl", "2024-05-01", "null", "3", "true"]),
        ('["Smith, John.wav", "*.mp3"]', ["Smith, John.wav", "*.mp3"]),
        ("['it''s', 'a #1']", ["it's", "a #1"]),
        ("[]", []),
        ("[1] a.wav", ["[1] a.wav"]),
    ],
)
def test_a_list_is_one_value_or_several(text, items):
    assert read(f"sources={text}").sources == items


@pytest.mark.parametrize("text", ["null", "", "[]", "a,b"])
def test_a_list_that_may_be_missing_takes_no_value(text):
    expected = {"null": None, "": None, "[]": []}.get(text, ["a", "b"])
    assert read(f"words={text}").words == expected


def test_numbers_choices_and_groups_are_read_by_their_types():
    recipe = read(
        "optimizer.schedule.lr=1e-3",
        "optimizer.betas=0.5,0.6",
        "shares.train=0.9",
        "shares.dev=0.1",
        "steps=",
        "lora={lr: 5e-4, warmup_steps: 2}",
        "level=2",
        "strict=yes",
        "note=null",
        "kinds={a: {x: 1}, b: {x: '2'}}",
        "free={a: 0.001, b: 2024-05-01, c: [true, null, x], d: '3'}",
        "free.e=4",
        "free.f=2024-05-01",
    )
    assert recipe.optimizer.schedule.lr == 1e-3
    assert recipe.optimizer.betas == (0.5, 0.6)
    assert recipe.shares == {"train": 0.9, "dev": 0.1}
    assert (recipe.steps, recipe.level, recipe.strict, recipe.note) == (None, 2, True, None)
    assert recipe.lora == Schedule(lr=5e-4, warmup_steps=2)
    assert recipe.kinds == {"a": {"x": "1"}, "b": {"x": "2"}}
    assert recipe.free == {"a": 1e-3, "b": "2024-05-01", "c": [True, None, "x"], "d": "3", "e": 4, "f": "2024-05-01"}


def test_a_value_of_several_types_is_read_by_the_one_that_fits():
    assert read("data=a, b").data == ["a", "b"]
    assert read("data=2024").data == "2024"
    assert read("data={files: [2024, b], weight: 2}").data == Files(files=["2024", "b"], weight=2)
    assert read("parts={files: a, weight: 2}").parts == [Files(files="a", weight=2)]
    assert read("data=[a, {files: 7}]").data == ["a", Files(files="7")]
    assert read("data.files=a,b", "data.weight=3").data == Files(files=["a", "b"], weight=3)
    assert read("data=a", "data=null").data is None


def test_a_group_given_in_part_keeps_the_defaults_of_its_place():
    assert read("optimizer.betas=[0, 1]").optimizer.schedule == Schedule(lr=5e-5, warmup_steps=7)
    assert read("optimizer.schedule.warmup_steps=1").optimizer.schedule == Schedule(lr=5e-5, warmup_steps=1)
    assert read("lora.warmup_steps=1").lora == Schedule(lr=1e-3, warmup_steps=1)


def test_an_unknown_key_is_named_with_a_suggestion_at_every_depth():
    assert "unknown key precison=x (did you mean 'precision'? --help lists all)" in fault("precison=x")
    message = fault("optimizer.schedule.warmup_step=4")
    assert "unknown key optimizer.schedule.warmup_step=4 (did you mean 'warmup_steps'? --help lists all)" in message
    assert "unknown key lora.rank=8 (known here: lr, warmup_steps)" in fault("lora.rank=8")


def test_all_faults_stand_in_one_line():
    message = fault(
        "precision=fp16", "steps=many", "optimizer.betas=[1, x]", "colour=red", "optimizer.schedule.lr=null", "rate=2"
    )
    for part in [
        "precision=fp16: give fp32 or bf16",
        "steps=many: give an integer or null",
        "optimizer.betas.1=x: give a number",
        "unknown key colour=red (",
        "optimizer.schedule.lr=null: give a number",
        "rate=2: give a number over 0 and of at most 1",
    ]:
        assert part in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data=[a, {files: b, wieght: 2}]", "unknown key data.1.wieght=2 (did you mean 'weight'?"),
        ("data={files: b, weight: much}", "arguments: data.weight=much: give a number"),
        ("data={weight: 2}", "arguments: key data.files is required"),
        ("lora=8", "lora=8: give lora.KEY=value or lora={KEY: value}"),
        ("shares=0.5", "shares=0.5: give shares.NAME=value or shares={NAME: value}"),
        ("out=", "out= has no value: give text"),
        ("precision=", "precision= has no value: give fp32 or bf16"),
        ("sources=a,,b", "sources=a,,b has an empty part between its commas"),
        ("sources=[*.mp3, b]", """is not YAML (expected alphabetic or numeric character, but found '.'): put values"""),
        ("sources=[a, b #1]", """put values with signs in quotes, as in ["a, b.wav", "*.mp3"]"""),
        ("level=3", "level=3: give 1 or 2"),
        ("strict=maybe", "strict=maybe: give true or false"),
    ],
)
def test_a_fault_names_its_remedy(override, words):
    message = fault(override)
    assert words in message
    assert message.count(override.partition("=")[0]) <= 3


def test_a_missing_key_is_named():
    with pytest.raises(RecipeError, match="key out is required"):
        read_recipe(Training, None, [])


@pytest.mark.parametrize("override", ["steps", "=3", "optimizer..lr=3", "precision.kind=3"])
def test_a_malformed_override_is_refused(override):
    assert f"override {override!r}" in fault("precision=fp32", override)


def test_values_of_a_file_are_yaml(tmp_path):
    assert read(text="steps: 5\nsources: [a, b]\nnote: 2024-05\n", tmp_path=tmp_path).sources == ["a", "b"]
    assert "steps=many: give an integer or null" in fault(text="steps: many\n", tmp_path=tmp_path)
    assert "note=2024: give text or null in quotes" in fault(text="note: 2024\n", tmp_path=tmp_path)


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
