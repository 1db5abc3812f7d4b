"""Measure the memory that is free for one more model, and estimate what the model takes of it."""

import gc
import os
from pathlib import Path

import torch
from transformers import WhisperConfig

from graft.checkpoints.loading import DTYPES, base_checkpoint, check_model
from graft.inference.estimate import graft_memory, whisper_memory
from graft.model.configuration import GraftConfig

LONGEST_CHUNK_S = 30.0
CGROUP = Path("/sys/fs/cgroup")


def model_memory(path: str | os.PathLike[str], *, dtype: str | None = None, device: str = "cpu") -> float:
    """Estimate the bytes that a model takes on a device: its weights, and what full batches need.

    Raises ModelError as check_model does.
    """
    is_graft, folder = check_model(os.fspath(path)) == "graft", base_checkpoint(os.fspath(path))
    config = (GraftConfig if is_graft else WhisperConfig).from_pretrained(folder)
    stored = DTYPES[dtype] if dtype else config.dtype
    dtype_bytes = stored.itemsize if isinstance(stored, torch.dtype) else torch.float32.itemsize
    kind = torch.device(device).type
    if isinstance(config, GraftConfig):
        memory = graft_memory(config, chunk_s=LONGEST_CHUNK_S, dtype_bytes=dtype_bytes, kind=kind)
    else:
        memory = whisper_memory(config, dtype_bytes=dtype_bytes, kind=kind)
    return memory.total


def free_memory(device: str) -> float:
    """Return the bytes that this process can still take on a device; infinite where the system does not tell."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has taken from the device and holds no tensor is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_memory(), _cgroup_memory())


def release_memory() -> None:
    """Give the memory of objects that nobody uses any more back to the devices."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _available_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _cgroup_memory() -> float:
    """Return what the limit of this container leaves; files in the page cache do not count, as they can be dropped."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit ("max"), or no cgroup
        return float("inf")
    return limit - used + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
