"""Run stage 1 in this process, on a tiny graft and a few clips, without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graft.config import recipe_yaml
from jobs import stage1
from jobs.training import driver
from jobs.training.loader import BatchLoader, LoaderSpec
from jobs.training.worker import Run, work
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, row


def train_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fit` run its only worker in this process, on the blocks that Ray would deliver."""

    def train(recipe: stage1.Stage1Recipe, run: Run, spec: LoaderSpec) -> None:
        loader = BatchLoader(spec)
        blocks = SimpleNamespace(iter_batches=lambda **_: loader.blocks(range(len(spec.batches))))
        monkeypatch.setattr("ray.train.get_dataset_shard", lambda name: blocks)
        monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
        monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
        torch.distributed.init_process_group("gloo", init_method=f"file://{run.out}/rendezvous", rank=0, world_size=1)
        try:
            work(run)
        finally:
            torch.distributed.destroy_process_group()

    monkeypatch.setattr(driver, "_train", train)
    monkeypatch.setattr(driver, "connect", lambda **_: None)


def stage1_recipe(folder: Path, **settings: Any) -> stage1.Stage1Recipe:
    """A training of one step on a tiny graft and three clips."""
    data = corpus(folder / "train.parquet", [row(f"t{seed}", seed) for seed in range(3)])
    model = tiny_models.save_tiny_graft(folder / "graft")
    given = {"model": str(model), "data": data, "out": str(folder / "out"), "token_budget": 400, "max_steps": 1}
    return stage1.Stage1Recipe.model_validate(
        given | {"backend": "torch", "log_every": 1, "data_workers": 1} | settings
    )


def arguments(recipe: stage1.Stage1Recipe, **changed: Any) -> list[str]:
    """Write a recipe for the command line, with other values of some keys."""
    path = Path(f"{recipe.out}.yaml")
    path.write_text(recipe_yaml(stage1.Stage1Recipe.model_validate({**recipe.model_dump(), **changed})))
    return ["--recipe", str(path)]
