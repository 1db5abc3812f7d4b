"""Estimate what transcription takes, for --plan: hours of audio, wall hours, cost, and memory at a device.

Nothing is started. Models are read for their configurations only, audio for its headers and metadata only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import AutoConfig, WhisperConfig

from graft.checkpoints.known_bases import AUDIO_BASES
from graft.checkpoints.names import INT8, WHISPER
from graft.errors import RecipeError
from graft.inference.estimate import (
    GPU_SHARE,
    ChunkWork,
    audio_rate,
    cpu,
    graft_memory,
    graft_work,
    whisper_memory,
    whisper_work,
)
from graft.model.configuration import AnyGraftConfig
from graft.training.devices import KNOWN_DEVICES, Device, find_device
from graft.training.estimate import count_parameters

from .machine import AskedWorkers, this_machine
from .pipeline import Workers
from .plan_options import TranscriptionPlanOptions
from .work_items import durations

ASSUMED_HOURS = 100.0
MOST_PROBES = 500
"""Most files whose headers are read; the hours of the others follow from their bytes."""
READER_S = {"detected": 1.30e-3, "decoded": 0.21e-3}
"""CPU seconds of a reader for a second of audio, with and without the speech detector: FLAC, measured on an AMD EPYC
(2026-11-27)."""
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "int8": 4}
"""Bytes of a number that is not in a linear layer's weights, by dtype."""
WHISPER_BASE_DECODER = {"decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048}


@dataclass(frozen=True)
class PlannedAudio:
    """The audio of a run, and how its length was found."""

    hours: float
    count: int | None
    """Number of recordings or clips; None where they are not known."""
    source: str

    @property
    def mean_s(self) -> float:
        """Mean seconds of a recording; infinite where their number is not known."""
        return self.hours * 3600 / self.count if self.count else float("inf")


@dataclass(frozen=True)
class PlannedModel:
    """A model of a run, and how often it transcribes all of the audio."""

    name: str
    config: Any
    """GraftConfig, or WhisperConfig of a plain Whisper."""
    dtype: str
    passes: int = 1

    @property
    def is_graft(self) -> bool:
        """Whether it is a graft, and not plain Whisper."""
        return not isinstance(self.config, WhisperConfig)


def planned_graft_model(name: str, config: AnyGraftConfig, dtype: str | None, *, passes: int = 1) -> PlannedModel:
    """Describe a graft that computes in `dtype`, by default in the one that its weights are stored in."""
    return PlannedModel(name, config, dtype or _stored_dtype(config), passes)


def planned_whisper(name: str, dtype: str | None, *, passes: int = 1) -> PlannedModel | None:
    """Describe plain Whisper: the bundled one, a folder or a hub id; None for any other model."""
    if name == WHISPER:
        shapes: dict[str, Any] = AUDIO_BASES["bundled"] | WHISPER_BASE_DECODER
        config = WhisperConfig(**shapes)
        return PlannedModel("Whisper base", config, dtype or "fp32", passes)
    if "/" not in name and not Path(name).exists():
        return None  # the name of a graft or of a recipe
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None
    if not isinstance(config, WhisperConfig):
        return None
    return PlannedModel(name, config, dtype or _stored_dtype(config), passes)


def _stored_dtype(config: Any) -> str:
    """Return the precision in which a model's configuration says that its weights are stored."""
    return "bf16" if config.dtype == torch.bfloat16 else "fp32"


@dataclass(frozen=True)
class PlannedRun:
    """What a run transcribes, by which models, on how many workers."""

    models: Sequence[PlannedModel]
    audio: PlannedAudio
    workers: Workers
    longest_s: float
    """Seconds of the longest chunk."""
    is_detected: bool
    """Whether readers look for the speech in the audio."""
    price: float | None
    """Price of an hour of the whole cluster."""


def measure_recordings(recordings: pa.Table, options: TranscriptionPlanOptions) -> PlannedAudio:
    """Measure the recordings of a run (discovery.RECORDINGS): local files by their headers, rows by their metadata."""
    count = len(recordings)
    if options.hours:
        return PlannedAudio(options.hours, count, "as --hours says")
    seconds = recordings["duration_s"].to_numpy()
    is_local = pc.invert(pc.match_substring(recordings["uri"], "://")).to_numpy(zero_copy_only=False)
    is_file = recordings["row"].is_null().to_numpy(zero_copy_only=False)
    size = recordings["size"].to_numpy().astype(np.float64)
    waiting = np.flatnonzero(is_local & is_file & np.isnan(seconds))
    probed = waiting[np.linspace(0, len(waiting) - 1, min(len(waiting), MOST_PROBES)).astype(int)]
    found = durations(recordings["uri"].take(pa.array(probed)).to_pylist())
    probed_s = np.array([np.nan if one is None else one for one in found])
    known_s = float(np.nansum(seconds) + np.nansum(probed_s))
    rest = np.setdiff1d(np.flatnonzero(np.isnan(seconds)), probed)  # other files, local or not
    measured = ~np.isnan(probed_s)
    if not len(rest):
        return PlannedAudio(known_s / 3600, count, "from headers and metadata")
    if not measured.any() or np.isnan(size[rest]).any():
        return PlannedAudio(ASSUMED_HOURS, count, "assumed, as the files are elsewhere: give --hours")
    s_per_byte = probed_s[measured].sum() / size[probed[measured]].sum()
    hours = (known_s + size[rest].sum() * s_per_byte) / 3600
    return PlannedAudio(hours, count, f"from {measured.sum()} headers and the bytes of the other files")


def measure_clips(durations_s: Sequence[np.ndarray]) -> PlannedAudio:
    """Measure the clips of test sets by their metadata."""
    seconds = np.concatenate(list(durations_s))
    return PlannedAudio(float(np.nansum(seconds)) / 3600, len(seconds), "from the data's metadata")


def assumed_audio(options: TranscriptionPlanOptions, key: str) -> PlannedAudio:
    """Assume the audio where the recipe names none under `key`."""
    if options.hours:
        return PlannedAudio(options.hours, None, "as --hours says")
    return PlannedAudio(ASSUMED_HOURS, None, f"assumed, as there is no {key}=: give it, or --hours")


def planned_workers(asked: AskedWorkers, options: TranscriptionPlanOptions) -> Workers:
    """Choose the processes of a plan: on this machine, with a GPU if --device names one."""
    machine = this_machine()
    if options.device:
        machine = this_machine(gpus=0 if options.device == "cpu" else max(1, round(machine.gpus)))
    return asked.choose(machine)


def print_plan(run: PlannedRun, options: TranscriptionPlanOptions) -> None:
    """Print what a run takes. Raises RecipeError for a device that is not known."""
    name = options.device or ("h200" if run.workers.gpus_per_transcriber else "cpu")
    int8 = any(model.dtype == INT8 for model in run.models)
    device = cpu(run.workers.cpus_per_transcriber, int8=int8) if name == "cpu" else find_device(name)
    if device is None:
        raise RecipeError(f"--device {name} is not known: give cpu or one of {KNOWN_DEVICES}")
    print("\n".join([*_speed_lines(run, options, name, device), *_memory_lines(run, name, device)]), flush=True)


def _speed_lines(run: PlannedRun, options: TranscriptionPlanOptions, name: str, device: Device) -> Iterator[str]:
    audio, workers = run.audio, run.workers
    counts = f" in {audio.count:,} recordings" if audio.count else ""
    yield f"audio       {audio.hours:,.2f} h{counts} ({audio.source})"
    chunk_s = min(options.chunk_s, run.longest_s, max(1.0, audio.mean_s))
    share = options.share or (1.0 if name == "cpu" else GPU_SHARE)
    part = 1.0 if name == "cpu" else min(1.0, workers.gpus_per_transcriber or 1.0)  # of the device, for a worker
    speech_s, model_s, passes = audio.hours * 3600 * options.speech_share, 0.0, 0
    for model in run.models:
        work = chunk_work(model, chunk_s, name)
        rate = workers.transcribers * (options.rtfx or part * audio_rate(work, device, share))
        times = f", {model.passes} times" if model.passes > 1 else ""
        yield f"model       {model.name}{_size(model)} in {model.dtype}{times}"
        prompt = f"{work.prompt_flops / 1e12:.3g} TFLOP to encode and read a chunk of {chunk_s:.3g} s"
        yield f"work        {prompt}, then {work.answer_tokens:.0f} tokens; {work.rows} chunks together"
        yield f"speed       {rate:,.1f} s of audio a second by {_counted(workers.transcribers, 'worker')}"
        model_s += model.passes * speech_s / rate
        passes += model.passes
    yield f"            {_basis(options, device, name, share, workers.cpus_per_transcriber)}"
    read_rate = workers.readers / READER_S["detected" if run.is_detected else "decoded"]
    read_s = audio.hours * 3600 * passes / read_rate
    advice = f", for whom the models wait: give readers={math.ceil(workers.readers * read_s / model_s)}"
    yield f"            {read_rate:,.0f} by {_counted(workers.readers, 'reader')}{advice if read_s > model_s else ''}"
    hours = max(read_s, model_s) / 3600
    cost = "" if run.price is None else f", {hours * run.price:,.2f} at {run.price:g} an hour of the cluster"
    yield f"time        {hours:,.2f} h{cost}"


def chunk_work(model: PlannedModel, chunk_s: float, device: str) -> ChunkWork:
    """Count a model's work for chunks of a length on a device, `cpu` or a GPU's name."""
    size = DTYPE_BYTES[model.dtype]
    if model.is_graft:
        return graft_work(model.config, chunk_s=chunk_s, dtype_bytes=size, kind=_kind(device))
    return whisper_work(model.config, chunk_s=chunk_s, dtype_bytes=size, kind=_kind(device))


def _memory_lines(run: PlannedRun, name: str, device: Device) -> Iterator[str]:
    yield f"memory      GB of a worker{'weights':>14}{'keys, values':>14}{'activations':>13}{'total':>9}"
    for model in run.models:
        size, kind, int8 = DTYPE_BYTES[model.dtype], _kind(name), model.dtype == INT8
        if model.is_graft:
            memory = graft_memory(model.config, chunk_s=run.longest_s, dtype_bytes=size, kind=kind, int8=int8)
        else:
            memory = whisper_memory(model.config, dtype_bytes=size, kind=kind, int8=int8)
        columns = ((memory.weights, 14), (memory.cache, 14), (memory.activations, 13), (memory.total, 9))
        sizes = "".join(f"{size / 1e9:>{width}.2f}" for size, width in columns)
        room = device.memory_bytes
        fits = "fits" if memory.total < 0.9 * room else "does not fit"
        yield f"{'':26}{sizes}" + ("" if name == "cpu" else f"  {fits} into the {room / 1e9:.0f} GB of {name}")
    yield "            activations are estimated from the shapes; the allocator and CUDA take more memory"


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def _size(model: PlannedModel) -> str:
    return f", {count_parameters(model.config).total / 1e6:,.1f} M parameters" if model.is_graft else ", plain Whisper"


def _basis(options: TranscriptionPlanOptions, device: Device, name: str, share: float, threads: int) -> str:
    """Say on what a speed rests."""
    if options.rtfx:
        return f"as --rtfx says: {options.rtfx:g} by each worker"
    if name == "cpu":
        rate = f"{share:.0%} of {device.flops / threads / 1e9:.0f} GFLOP/s by each thread of a worker ({threads})"
        return f"expected of {rate}, which the small graft reached on an AMD EPYC"
    peaks = f"{device.flops / 1e12:.0f} TFLOP/s and {device.bytes_per_s / 1e12:g} TB/s"
    return f"expected of {name} at {share:.0%} of {peaks}; an H200 reached 50% at 7B"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
