"""Test the average of the last checkpoints: which they are, what it holds, and when it is the result."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graft.errors import RecipeError
from graft.training.checkpoint import average_weights, load_checkpoint, write_average, write_checkpoint
from graft.training.progress import Progress, latest_checkpoint
from jobs import stage1
from tests.jobs.training.test_more_epochs import recipe_of
from tests.support.speech_corpus import corpus, row
from tests.support.stage_runs import train_here


def test_an_average_is_made_of_the_weights_of_checkpoints_that_are_kept_for_it(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
        return {"a": {"weight": torch.full((3,), value), "exp_avg": torch.ones(3)}}

    for step in (2, 3, 4, 5):
        write_checkpoint(tmp_path, state(step), Progress(step=step, best_step=3), keep=1, also=(2, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (2, 3, 4, 5)]
    averaged = average_weights([tmp_path / "step-00000002", tmp_path / "step-00000004"], state(9.0))
    assert averaged.keys() == {"a"}
    assert averaged["a"].keys() == {"weight"}
    assert averaged["a"]["weight"].tolist() == [5.0] * 3
    path = write_average(tmp_path, averaged, Progress(step=5))
    assert torch.equal(load_checkpoint(path)[0]["a"]["weight"], averaged["a"]["weight"])
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000005"
    write_checkpoint(tmp_path, state(6), Progress(step=6, best_step=6), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["average", "step-00000006"]


@pytest.mark.slow
def test_the_last_checkpoints_are_averaged_whatever_is_saved_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(monkeypatch)
    weights = []
    for step in (2, 4, 5):  # one folder that goes on with more steps
        stage1.run(recipe_of(tmp_path, "steps", epochs=9, max_steps=step))
        weights.append(load_file(tmp_path / "steps" / "projector.safetensors")["linear.weight"])
    with pytest.raises(RecipeError, match="epochs 9 -> 10 adds no step to the 5 that"):
        stage1.run(recipe_of(tmp_path, "steps", epochs=10, max_steps=5))
    settings = {"epochs": 9, "max_steps": 5, "checkpoint_every": 2, "average_checkpoints": 3, "keep_checkpoints": 1}
    with pytest.raises(
        RecipeError, match="average_checkpoints=4 and checkpoint_every=2 need 7 steps, and the run has 5"
    ):
        stage1.run(recipe_of(tmp_path, "average", **settings | {"average_checkpoints": 4}))
    result = stage1.run(recipe_of(tmp_path, "average", **settings))
    assert result["average"] == {"steps": [2, 4, 5], "is_result": True, "metrics": {}}
    averaged = load_file(tmp_path / "average" / "projector.safetensors")["linear.weight"]
    torch.testing.assert_close(averaged, sum(weights) / 3, rtol=0, atol=1e-7)
    assert not torch.equal(averaged, weights[-1])

    data = corpus(tmp_path / "dev.parquet", [row(f"d{seed}", 50 + seed) for seed in range(3)])
    for name, every, rate in (("better", 5, 1e-2), ("worse", 1, 1.0)):
        validation = {"data": {"dev": data}, "every": every, "wer_clips": 1}
        recipe = recipe_of(tmp_path, name, **settings | {"validation": validation, "learning_rate": rate})
        result = stage1.run(recipe)
        lines = [json.loads(line) for line in Path(recipe.out, "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
        average = result["average"]
        assert average["metrics"].keys() >= {"validation_loss/dev", "validation_wer/dev"}
        assert average["is_result"] is (average["metrics"]["validation_loss"] < min(losses.values()))
        assert result["validation_loss"] == min(average["metrics"]["validation_loss"], *losses.values())
        assert [line for line in lines if "average_validation_loss/dev" in line]
        log = Path(recipe.out, "log.txt").read_text()
        assert "average of steps 2, 4, 5  validation loss " in log
        assert f"the {'average' if average['is_result'] else 'best step'} is the result" in log
        assert {path.name for path in Path(recipe.out, "checkpoints").iterdir()} <= {
            "step-00000005",
            f"step-{result['best_step']:08d}",
        }
