"""Measure the memory that is free for one more model, and estimate what the model takes of it."""

import gc
import os
from pathlib import Path

import torch
from transformers import WhisperConfig

from graft.checkpoints.loading import DTYPES, base_checkpoint, check_model
from graft.checkpoints.names import INT8
from graft.errors import ModelError
from graft.inference.estimate import InferenceMemory, graft_memory, whisper_memory
from graft.model.configuration import read_graft_config

LONGEST_CHUNK_S = 30.0
CGROUP = Path("/sys/fs/cgroup")


def model_memory(path: str | os.PathLike[str], *, dtype: str | None = None, device: str = "cpu") -> InferenceMemory:
    """Estimate the memory that a model takes on a device with full batches. Raises ModelError as check_model does."""
    is_graft, folder = check_model(os.fspath(path)) == "graft", base_checkpoint(os.fspath(path))
    config = read_graft_config(folder) if is_graft else WhisperConfig.from_pretrained(folder)
    int8 = dtype == INT8
    stored = DTYPES["fp32" if int8 else dtype] if dtype else config.dtype
    dtype_bytes = stored.itemsize if isinstance(stored, torch.dtype) else torch.float32.itemsize
    kind = torch.device(device).type
    if not isinstance(config, WhisperConfig):
        return graft_memory(config, chunk_s=LONGEST_CHUNK_S, dtype_bytes=dtype_bytes, kind=kind, int8=int8)
    return whisper_memory(config, dtype_bytes=dtype_bytes, kind=kind, int8=int8)


def check_memory(path: str | os.PathLike[str], *, dtype: str | None = None, device: str = "cpu") -> None:
    """Raise ModelError where a model's weights alone exceed the free memory: the system would kill this process."""
    dtype = "fp32" if dtype == INT8 else dtype  # in which it is opened before its layers are rounded one by one
    needed, free = model_memory(path, dtype=dtype, device=device).weights, free_memory(device)
    if needed > free:
        raise ModelError(
            f"the weights of {path} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}: "
            "give a machine with more memory, or dtype=bf16"
        )


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
