"""Choose how many loaders a run needs: enough for its devices, and no more than the cluster has CPUs for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graft.checkpoints.lora import LoraSettings
from graft.data.dataset import RowTable
from graft.data.settings import AugmentRecipe
from graft.model.configuration import WINDOW_FRAMES, AnyGraftConfig
from graft.training.devices import device_peak_flops
from graft.training.estimate import batch_flops
from graft.training.plan import Plan

AUDIO_S_PER_S = 650.0
"""Seconds of audio that one loader decodes and featurizes in a second, at least: 650 to 1,700 were measured."""
AUGMENTED_AUDIO_S_PER_S = 210.0
"""The same with every augmentation: 13 loaders fed an H200 2,750 s of audio a second, which then waited."""
SAMPLED = 10_000
SPARE = 1.2
"""Loaders are chosen for this many times what the devices take."""
DEVICE_SHARE = 0.5
"""Share of its peak that a device is expected to reach."""
UNKNOWN_DEVICE = "h200"
CPU_LOADERS = 2
"""Loaders of a run without GPUs, which trains more slowly than any loader works."""
_GPU_PREFIX = "accelerator_type:"


@dataclass(frozen=True)
class DataWorkers:
    """A number of loaders, and the reason for it."""

    count: int
    reason: str


def choose_data_workers(
    *, flops_per_audio_s: float, workers: int, device: str | None, augment: AugmentRecipe | None
) -> DataWorkers:
    """Choose the loaders of `workers` devices of a name, or of `workers` CPU processes where `device` is None."""
    if device is None:
        return DataWorkers(CPU_LOADERS, "which no CPU that trains outruns")
    peak = device_peak_flops(device)
    named = device if peak else f"unknown GPU, as fast as an {UNKNOWN_DEVICE},"
    taken = workers * DEVICE_SHARE * (peak or device_peak_flops(UNKNOWN_DEVICE) or 0.0) / flops_per_audio_s
    prepared = AUDIO_S_PER_S if augment is None else AUGMENTED_AUDIO_S_PER_S
    reason = f"{workers} x {named} take {taken:,.0f} s of audio a second, and one prepares {prepared:.0f}"
    return DataWorkers(max(1, math.ceil(SPARE * taken / prepared)), reason)


def flops_per_audio_s(
    config: AnyGraftConfig,
    rows: RowTable,
    plan: Plan,
    *,
    lora: LoraSettings | None,
    is_ctc: bool,
    gradient_checkpointing: bool,
) -> float:
    """Estimate the FLOPs of training on a second of audio, from up to SAMPLED rows of the data."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(int))
    durations_s = rows.duration_s[chosen]
    flops = batch_flops(
        config,
        token_counts=[] if is_ctc else plan.columns.token_counts[chosen],
        label_count=0 if is_ctc else int(plan.columns.label_counts[chosen].sum()),
        frame_counts=np.ceil(durations_s * (WINDOW_FRAMES // 30)).clip(8, WINDOW_FRAMES).astype(int),
        lora_rank=lora.rank if lora else None,
        lora_encoder=bool(lora and lora.encoder),
        gradient_checkpointing=gradient_checkpointing,
    )
    return flops / float(durations_s.sum())


def fit_cluster(
    wanted: DataWorkers, resources: Mapping[str, float], *, workers: int, gpu: bool, resource: str | None
) -> DataWorkers:
    """Choose no more loaders than a Ray cluster of these resources has room for beside its training workers.

    A cluster that has not as many GPUs as workers is still growing, and gets the loaders that are wanted.
    """
    if gpu and resources.get("GPU", 0) < workers:
        return wanted
    room = int(resources.get("CPU", 0)) - workers
    if resource is not None and resource in resources:
        room = min(room, int(resources[resource]))
    if wanted.count <= max(1, room):
        return wanted
    return DataWorkers(max(1, room), f"for which the cluster has room; {wanted.count} are wanted, as {wanted.reason}")


def gpu_name(resources: Mapping[str, float]) -> str:
    """Return the name of the cluster's GPUs, as Ray calls them."""
    names = (name.removeprefix(_GPU_PREFIX) for name in resources if name.startswith(_GPU_PREFIX))
    return next((name for name in names if device_peak_flops(name)), "")
