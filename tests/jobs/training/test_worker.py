"""Test faults of a training worker: those that would recur are recorded, those of a dead peer are left to Ray."""

import json
import re
from pathlib import Path

import pytest
import torch
from ray.exceptions import RayActorError
from torch.distributed import DistBackendError

from graft.checkpoints.loading import multiplies_bf16
from graft.errors import DataError, ModelError
from jobs import stage1
from jobs.common.cli import run_job
from jobs.training.worker import FAULT_FILE, StaleCheckpoint, _record_faults
from tests.support.speech_corpus import BROKEN, corpus, flac, row
from tests.support.stage_runs import arguments, stage1_recipe, train_here


@pytest.mark.seconds
def test_slow_bf16_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_here(monkeypatch)
    stage1.run(stage1_recipe(tmp_path, dtype="bf16"))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert re.search("^step 1/1 ", log, re.MULTILINE)
    assert ("dtype=fp32 takes a fraction of the time" in log) is not multiplies_bf16("cpu")


@pytest.mark.seconds
def test_a_corpus_in_which_nothing_can_be_read_ends_the_run_and_names_its_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(monkeypatch)
    good = stage1_recipe(tmp_path, dtype="fp32", max_steps=None)
    broken = corpus(tmp_path / "broken.parquet", [row(f"b{seed}", seed, **BROKEN) for seed in range(3)])
    run_job(stage1.Stage1Recipe, stage1.run, summary="", argv=arguments(good, data=broken))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("graft: error: none of 3 clips could be used (b")
    assert error.endswith("repair the data and train in another out=, or raise max_masked")
    assert {json.loads(line)["id"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()} == {
        "b0",
        "b1",
        "b2",
    }
    assert not (tmp_path / "out" / "result.json").exists()
    again = arguments(good, out=str(tmp_path / "again"), validation={"data": broken})
    assert run_job(stage1.Stage1Recipe, stage1.run, summary="", argv=again) == 2
    assert "validation.data: none of 3 clips could be used (b" in capsys.readouterr().err


@pytest.mark.seconds
def test_validation_leaves_out_a_clip_that_is_longer_than_the_data_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(monkeypatch)
    lies = {"duration": 1.0, "wav": {"bytes": flac(31.0, 7), "path": "lies.flac"}}
    data = corpus(tmp_path / "dev.parquet", [row("lies", 7, **lies), row("good", 8)])
    stage1.run(stage1_recipe(tmp_path, dtype="fp32", validation={"data": data}, max_masked=0.5))
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_loss"] > 0 for line in metrics if "validation_loss" in line] == [True]
    heard = [json.loads(line)["id"] for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert heard == ["good"]
    assert '"id": "lies"' in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (DataError("no such row"), {"error": "no such row"}),
        (RuntimeError("expected an array of shape [2], got a restored one"), {"bug"}),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), None),
        (DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2397, remote process exited"), None),
        (RayActorError(), None),
        (StaleCheckpoint("batch 9 does not follow the checkpoint at 2"), None),
        (KeyError("no connection of the store to its peer timed out"), {"bug"}),
    ],
    ids=["user", "bug", "gloo", "nccl", "actor", "stale checkpoint", "bug in other words"],
)
def test_only_recurring_faults_are_recorded(tmp_path: Path, error: Exception, kept: object) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))), _record_faults(tmp_path):
        raise error
    found = json.loads((tmp_path / FAULT_FILE).read_text()) if (tmp_path / FAULT_FILE).exists() else None
    if isinstance(kept, set):
        assert found is not None
        assert found.keys() == kept
        assert str(error) in found["bug"]
    else:
        assert found == kept


def test_running_out_of_memory_names_the_remedies(tmp_path: Path) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    error.add_note("on a batch of 2 x 90 tokens with the clips a, b")
    reason = "ran out on a batch of 2 x 90 tokens with the clips a, b: lower token_budget"
    with pytest.raises(ModelError, match=reason), _record_faults(tmp_path):
        raise error
    assert reason in json.loads((tmp_path / FAULT_FILE).read_text())["error"]
