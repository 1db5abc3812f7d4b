"""Test a run's plan: resuming with other data is refused, columns are cached, validation clips are shared evenly."""

import json
from pathlib import Path

import pytest

from graft.errors import DataError
from graft.processor import GraftProcessor
from graft.training.plan import Plan
from jobs.training.batches import ROWS, LeftOutRows, cached_rows, check_plan, plan_run, validation_specs
from jobs.training.recipe import TrainRecipe
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, row


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("planning") / "graft"))


def recipe(folder: str, data: str, **more: object) -> TrainRecipe:
    return TrainRecipe.model_validate({"model": folder, "data": data, "out": "out", "token_budget": 400, **more})


def plan_of(folder: str, data: str) -> Plan:
    return plan_run(recipe(folder, data), GraftProcessor.from_pretrained(folder))[2]


def test_a_run_is_not_resumed_with_other_data(folder: str, tmp_path: Path) -> None:
    rows = [row(f"c{seed}", seed) for seed in range(4)]
    data = corpus(tmp_path / "clips.parquet", rows)
    check_plan(tmp_path, plan_of(folder, data))
    check_plan(tmp_path, plan_of(folder, data))
    corpus(tmp_path / "clips.parquet", [*rows[:3], row("c3", 9)])
    with pytest.raises(DataError, match="the data differs from that which"):
        check_plan(tmp_path, plan_of(folder, data))


def test_columns_are_cached_only_without_an_error(tmp_path: Path) -> None:
    def fill() -> None:
        with cached_rows(tmp_path) as folder:
            (folder / "one").write_text("1")
            (tmp_path / "claimed").touch()
            if refused:
                raise DataError("no")

    refused = True
    with pytest.raises(DataError):
        fill()
    assert not (tmp_path / ROWS).exists()
    refused = False
    fill()
    assert (tmp_path / ROWS / "one").read_text() == "1"
    with cached_rows(tmp_path) as folder:
        assert folder == tmp_path / ROWS


def test_one_text_that_is_too_long_is_left_out_and_named(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row("book", 9, text="word " * 500),
        row("mute", 10, text="-"),
        *(row(f"c{seed}", seed) for seed in range(4)),
    ]
    data = corpus(tmp_path / "clips.parquet", rows)
    left_out = LeftOutRows()
    found, _, plan = plan_run(recipe(folder, data), GraftProcessor.from_pretrained(folder), left_out=left_out)
    assert sorted(found.id(number) for number in plan.epochs[0].rows) == ["c0", "c1", "c2", "c3"]
    assert "left out: 1 of over token_budget=400 tokens (book)\n" in capsys.readouterr().out
    (spec,) = validation_specs(
        recipe(folder, data, validation={"data": data}), folder, GraftProcessor.from_pretrained(folder), left_out
    ).values()
    assert 0 not in spec.batches.rows
    left_out.write(tmp_path / "left_out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    expected = [("mute", "no words"), ("book", "over token_budget=400 tokens")]
    assert lines == [{"id": name, "reason": reason} for name, reason in expected] * 2
    assert "left out: 1 of over" in capsys.readouterr().out


def test_validation_clips_are_sampled_and_divided_evenly(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*(row(f"c{seed}", seed) for seed in range(12)), row("mute", 12, text=" ")]
    validation = {"data": corpus(tmp_path / "clips.parquet", rows), "clips": 7}
    training = recipe(folder, validation["data"], workers=3, validation=validation)
    specs = validation_specs(training, folder, GraftProcessor.from_pretrained(folder))
    assert list(specs) == [""]
    spec = specs[""]
    assert len(spec.batches) % 3 == 0
    assert sorted(place for batch in spec.batches for place in batch.rows) == list(range(7))
    assert len({spec.rows.id(place) for place in range(7)}) == 7
    assert "left out: 1 with no words; 12 clips remain" in capsys.readouterr().out


def test_labels_of_validation_may_all_be_unformatted(folder: str, tmp_path: Path) -> None:
    processor = GraftProcessor.from_pretrained(folder)
    processor.text_style = "formatted"
    data = corpus(tmp_path / "clips.parquet", [row(f"c{seed}", seed, text="no capitals here") for seed in range(3)])
    training = recipe(folder, data, validation={"data": data})
    with pytest.raises(DataError, match="none of 3 texts is formatted"):
        plan_run(training, processor)
    (spec,) = validation_specs(training, folder, processor).values()
    assert spec.variation.instruction("no capitals here", 0).style == "lower"
