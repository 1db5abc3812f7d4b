"""Test that a finished run goes on with more epochs: the batches are those of a run that had them from the start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.errors import GraftError, OutputError
from graft.processor import GraftProcessor
from graft.training.progress import latest_checkpoint, read_progress
from jobs import stage1
from jobs.training.batches import plan_run
from tests.support.speech_corpus import corpus, row
from tests.support.stage_runs import stage1_recipe, train_here


def recipe_of(folder: Path, out: str, **settings: Any) -> stage1.Stage1Recipe:
    """A run of four batches an epoch, of which a step has two."""
    data = corpus(folder / "clips.parquet", [row(f"c{seed}", seed) for seed in range(8)])
    given = {"data": data, "out": str(folder / out), "token_budget": 200, "max_batch_clips": 2, "step_batches": 2}
    given |= {"dtype": "fp32", "max_steps": None, "schedule": "constant", "learning_rate": 1e-2}
    return stage1_recipe(folder, **given | settings)


def metrics(recipe: stage1.Stage1Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(recipe.out, "metrics.jsonl").read_text().splitlines()]


def test_batches_do_not_depend_on_the_epochs_that_follow(tmp_path: Path) -> None:
    few, many = recipe_of(tmp_path, "a", epochs=2), recipe_of(tmp_path, "a", epochs=4)
    assert many.is_longer_than(few)
    assert not few.is_longer_than(many)
    assert few.model_copy(update={"epochs": 1, "max_steps": 3}).is_longer_than(few) is False
    assert few.is_longer_than(few.model_copy(update={"max_steps": 3}))
    processor = GraftProcessor.from_pretrained(few.model)
    plans = [plan_run(recipe, processor)[2] for recipe in (few, many)]
    half = len(plans[0].batches(position=0, step_batches=2))
    whole = list(plans[1].batches(position=0, step_batches=2))
    assert list(plans[0].batches(position=0, step_batches=2)) == whole[:half]
    assert list(plans[1].batches(position=whole[half - 1].position, step_batches=2)) == whole[half:]


@pytest.mark.seconds
def test_a_finished_run_goes_on_with_more_epochs_as_if_it_had_had_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(monkeypatch)
    at_once = recipe_of(tmp_path, "at-once", epochs=3)
    whole = stage1.run(at_once)
    first = stage1.run(recipe_of(tmp_path, "in-two", epochs=1))
    with pytest.raises(OutputError, match="token_budget was 200 there and is 210 now"):
        stage1.run(recipe_of(tmp_path, "in-two", epochs=3, token_budget=210))
    assert Path(tmp_path, "in-two", "result.json").is_file()
    capsys.readouterr()
    more = recipe_of(tmp_path, "in-two", epochs=3)
    result = stage1.run(more)
    steps = first["steps"]
    line = (
        f"stage 1: going on from step {steps} to {3 * steps} (epochs 1 -> 3); the schedule starts anew there: 0 steps "
    )
    assert line + "of warm-up to 0.01, then constant\n" in capsys.readouterr().out
    same = ("steps", "clips", "audio_s", "loss_first", "loss_last")
    assert {key: result[key] for key in same} == {key: whole[key] for key in same}
    assert [(one["step"], one["loss"]) for one in metrics(more)] == [
        (one["step"], one["loss"]) for one in metrics(at_once)
    ]
    own, other = (load_file(Path(recipe.out, "projector.safetensors")) for recipe in (more, at_once))
    assert all(torch.equal(own[name], tensor) for name, tensor in other.items())
    assert stage1.run(more) == result
    with pytest.raises(OutputError, match="epochs was 3 there and is 1 now"):
        stage1.run(recipe_of(tmp_path, "in-two", epochs=1))

    # The schedule is said anew, and the rate begins at its height again.
    anew = recipe_of(tmp_path, "in-two", epochs=5, schedule="linear", learning_rate=3e-3)
    stage1.run(anew)
    rates = [one["learning_rate"] for one in metrics(anew)][3 * steps :]
    assert rates == pytest.approx([3e-3 * (1 - step / (2 * steps)) for step in range(2 * steps)])
    checkpoint = latest_checkpoint(Path(anew.out, "checkpoints"))
    assert read_progress(checkpoint).schedule_start == 3 * steps
    shutil.rmtree(Path(anew.out, "checkpoints"))
    with pytest.raises(GraftError, match="can't go on, because its checkpoints are gone"):
        stage1.run(recipe_of(tmp_path, "in-two", epochs=6))


@pytest.mark.slow
def test_the_best_weights_stay_the_best_where_more_epochs_are_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(monkeypatch)
    validation = {
        "data": corpus(tmp_path / "dev.parquet", [row(f"d{seed}", 50 + seed) for seed in range(3)]),
        "every": 1,
    }
    shared = {"validation": validation | {"patience": 3}, "keep_checkpoints": 1}
    first = stage1.run(recipe_of(tmp_path, "out", epochs=2, **shared))
    best = load_file(tmp_path / "out" / "projector.safetensors")
    worse = stage1.run(recipe_of(tmp_path, "out", epochs=4, learning_rate=3.0, **shared))
    assert worse["best_step"] == first["best_step"]
    assert worse["steps"] > first["steps"]
    after = load_file(tmp_path / "out" / "projector.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in best.items())
