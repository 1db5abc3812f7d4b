"""Fixtures of the GPU tests: the device, exact float32, and a graft on disk.

The GPU tests need only torch, transformers, numpy and pytest; a test that needs more names it and is skipped.
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
    """Return the first GPU, or the device that GRAFT_TEST_DEVICE names: `cpu` runs what a CPU can."""
    if name := os.environ.get("GRAFT_TEST_DEVICE"):
        return torch.device(name)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """Return the device if it is a GPU; other tests are skipped."""
    if device.type != "cuda":
        pytest.skip("no CUDA device")
    return device


@pytest.fixture(autouse=True)
def exact_float32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disable TF32, to which convolutions round float32 by default; free a test's memory afterwards."""
    if device.type == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def folder(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a whole graft."""
    from tests.support import wide_models

    return wide_models.save_wide_graft(tmp_path_factory.mktemp("gpu") / "graft")
