"""What the tests for a GPU share: the device, exact float32, and a graft that training opens.

Nothing here or in what these tests import needs more than torch, transformers, numpy and pytest; what else a test needs it skips by name.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

sys.path.append(str(ROOT))  # the tiny models, which are found by themselves only where all tests run


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU, or what GRAFT_TEST_DEVICE names: `cpu` runs what a CPU can."""
    if name := os.environ.get("GRAFT_TEST_DEVICE"):
        return torch.device(name)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device where it is a GPU, for what a CPU cannot show."""
    if device.type != "cuda":
        pytest.skip("no CUDA device")
    return device


@pytest.fixture(autouse=True)
def exact_float32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions round float32 to TF32 unless told otherwise; afterwards a test's memory goes back."""
    if device.type == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def folder(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole graft on disk."""
    from tests.support import wide_models

    return wide_models.save_wide_graft(tmp_path_factory.mktemp("gpu") / "graft")
