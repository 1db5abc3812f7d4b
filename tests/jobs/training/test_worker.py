"""Test faults of a training worker: those that would recur are recorded, those of a dead peer are left to Ray."""

import json
import re
from pathlib import Path

import pytest
import torch

from graft.errors import DataError, ModelError
from jobs.training.worker import FAULT_FILE, _record_faults


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (DataError("no such row"), {"error": "no such row"}),
        (RuntimeError("expected an array of shape [2], got a restored one"), {"bug"}),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), None),
        (RuntimeError("batch 9 does not follow the checkpoint at 2"), None),
    ],
    ids=["user", "bug", "death", "stale checkpoint"],
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
    with pytest.raises(ModelError, match="lower token_budget"), _record_faults(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "lower token_budget" in json.loads((tmp_path / FAULT_FILE).read_text())["error"]
