"""Test a stage on a disk that is full when a checkpoint is written: one line says so, and the command goes on."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import stage1
from jobs.common.cli import run_job
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_started")]


def test_a_disk_that_is_full_of_checkpoints_is_one_line_and_the_run_goes_on(
    mount: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = corpus(tmp_path / "train.parquet", [row(f"t{seed}", seed) for seed in range(24)])
    graft = tiny_models.save_tiny_graft(tmp_path / "graft")
    settings = {
        "model": str(graft),
        "data": data,
        "epochs": 6,
        "token_budget": 250,
        "learning_rate": 1e-3,
        "dtype": "fp32",
        "backend": "torch",
        "data_workers": 1,
        "checkpoint_every": 2,
        "retries": 0,
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]

    def train(out: Path) -> int:
        return run_job(stage1.Stage1Recipe, stage1.run, summary="", argv=[*arguments, f"out={out}"])

    assert train(tmp_path / "undisturbed") == 0
    disk = mount("size=2m")
    used = sum(path.stat().st_size for path in (tmp_path / "undisturbed").rglob("*") if path.is_file())
    (disk / "filler").write_bytes(bytes(2 * 2**20 - used // 3 - 40_000))
    capsys.readouterr()
    assert train(disk / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.match(rf"graft: error: the disk of {disk / 'out'} is full \(No space left on device\)", line), line
    mount("remount,size=64m")
    assert train(disk / "out") == 0
    own, other = ((folder / "projector.safetensors") for folder in (disk / "out", tmp_path / "undisturbed"))
    for name, value in load_file(other).items():
        assert torch.equal(load_file(own)[name], value)
    losses = [json.loads((folder / "result.json").read_text()) for folder in (disk / "out", tmp_path / "undisturbed")]
    assert losses[0]["steps"] == losses[1]["steps"]
