"""Estimate what a training run takes, for --plan: parameters, memory, steps, tokens, speed, hours and cost.

Nothing is started. A graft is read for its configuration only, and need not be built yet: the recipe of jobs.build that
will build it is enough.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from graft.audio.features import HOP_LENGTH
from graft.checkpoints.loading import base_checkpoint
from graft.data.dataset import RowTable
from graft.errors import RecipeError
from graft.model.configuration import WINDOW_FRAMES, AnyGraftConfig, audio_token_count
from graft.processor import read_graft_processor
from graft.training.devices import KNOWN_DEVICES, device_nvlink, device_peak_flops
from graft.training.estimate import (
    LABELS_PER_S,
    LAYOUTS,
    PROMPT_TOKENS,
    Layout,
    Parameters,
    batch_flops,
    count_parameters,
    device_memory,
    encoded_frames,
    encoder_flops,
    network_bytes,
    validation_flops,
)
from graft.training.plan import Plan

from ..common.cli import PlanOptions
from .batches import plan_run, validation_rows
from .reader import NOISE_BYTES, largest_window
from .recipe import TrainRecipe
from .samples import Variation, plan_columns

STORED_BYTES_PER_S = 20_000
"""Bytes of a second of speech in FLAC at 16 kHz, about."""
PROCESS_BYTES = 0.6e9
"""Memory of a reader or a loader before it reads anything, as measured with a CPU build of torch."""
MUCH_BYTES = 4e9
"""Memory of the reader above which a plan says how to lower it."""
FRAMES_PER_S = WINDOW_FRAMES // 30
NETWORKS_GBIT = (25.0, 100.0, 400.0)
"""Networks that a plan compares where its options name none."""


@dataclass(frozen=True)
class TrainedParts:
    """The parts that a stage trains besides the projector, and the base that it trains on."""

    lora_rank: int | None = None
    lora_encoder: bool = False
    nf4: bool = False
    language_model: bool = True
    """Whether the language model is used; CTC pre-alignment does not use it."""


@dataclass(frozen=True)
class Work:
    """Totals of a run over all epochs."""

    clips: int
    audio_s: float
    token_count: int
    label_count: int
    longest: int
    """Number of tokens of the longest clip."""
    frame_count: int
    """Number of encoder frames, 50 per second."""
    steps: int
    padding: float
    flops: float
    encoder_flops: float
    source: str
    """How the numbers were found."""
    reading: tuple[str, ...]
    """What the reader holds of the data, and the memory of reader and loaders, in lines."""


@dataclass(frozen=True)
class ValidationWork:
    """What a run's validations take."""

    count: int
    """Number of validations of the run."""
    clips: Mapping[str, int]
    """Number of clips of each set; the name of a single set is ""."""
    audio_s: float
    """Seconds of audio of all sets."""
    flops: float
    """FLOPs of the loss of all sets, once."""
    transcripts: int
    """Number of clips of all sets that are transcribed."""


def print_plan(
    recipe: TrainRecipe,
    options: PlanOptions,
    config: AnyGraftConfig,
    is_built: bool,
    *,
    trained: TrainedParts,
) -> None:
    """Print what a run of this recipe takes on a graft of this configuration.

    The data is read only where the graft `is_built`, because its tokenizer is needed. Raises ModelError, DataError and
    RecipeError for inputs that are unknown or cannot be read.
    """
    parameters = count_parameters(config, lora_rank=trained.lora_rank, lora_encoder=trained.lora_encoder)
    reads_data = recipe.data is not None and is_built
    work = (
        _read_work(recipe, config, trained)
        if reads_data
        else _assumed_work(recipe, config, trained, hours=options.hours, clip_s=options.clip_s)
    )
    validation = _validation_work(recipe, config, trained, work, clip_s=None if reads_data else options.clip_s)
    print("\n".join(_work_lines(recipe, options, parameters, work, validation)))
    print("\n".join(["", *_memory_lines(recipe, config, parameters, work, trained)]))
    if recipe.workers > 1:
        print("\n".join(["", *_network_lines(recipe, options, config, parameters, work, trained)]))
    sys.stdout.flush()


def _read_work(recipe: TrainRecipe, config: AnyGraftConfig, trained: TrainedParts) -> Work:
    """Read the data and plan the run, as training does."""
    rows, variation, plan = plan_run(recipe, read_graft_processor(base_checkpoint(recipe.model)))
    samples = np.concatenate([epoch.rows for epoch in plan.epochs])
    seconds = np.concatenate([rows.duration_s, variation.no_speech_s])[samples]
    return _work(
        recipe,
        config,
        trained,
        token_counts=plan.columns.token_counts[samples],
        frame_counts=np.ceil(seconds * FRAMES_PER_S).clip(8, WINDOW_FRAMES).astype(int),
        label_count=int(sum(epoch.label_counts.sum() for epoch in plan.epochs)),
        steps=plan.step_count(recipe.step_batches or recipe.workers),
        padding=plan.padding_waste(),
        source="as planned",
        reading=_reading(recipe, config, rows, variation, plan),
    )


def _reading(
    recipe: TrainRecipe, config: AnyGraftConfig, rows: RowTable, variation: Variation, plan: Plan
) -> tuple[str, ...]:
    clips, size = largest_window(rows, plan)
    window = f"a window: up to {clips:,} clips and {size / 1e6:,.1f} MB"
    held_bytes = 2.0 * size + sum(column.nbytes for column in (rows.ids, rows.texts))
    if variation.noise is not None:
        _, first = np.unique(variation.noise.file.astype(np.int64) << 32 | variation.noise.row_group, return_index=True)
        noise_bytes = float(variation.noise.group_bytes[first].sum(dtype=float))
        held_noise_bytes = min(noise_bytes, NOISE_BYTES)
        window += f"; of {noise_bytes / 1e6:,.1f} MB of noise up to {held_noise_bytes / 1e6:,.1f} MB"
        held_bytes += held_noise_bytes
    return window, *_reading_memory(recipe, config, held_bytes)


def _reading_memory(recipe: TrainRecipe, config: AnyGraftConfig, held_bytes: float) -> Iterator[str]:
    """Tell the memory of the reader, which holds two windows, and of each loader."""
    held = f"{(PROCESS_BYTES + held_bytes) / 1e9:.1f} GB for the one reader, which holds two windows and the texts"
    # A loader holds the features and the samples of a batch twice: of each clip, and padded or resampled.
    values_per_token = 2 * config.audio_pool * 2 * (config.audio_config.num_mel_bins + HOP_LENGTH)
    batch_bytes = 4 * values_per_token * recipe.token_budget
    yield f"memory: about {held}, {(PROCESS_BYTES + batch_bytes) / 1e9:.1f} GB for each loader"
    if held_bytes > MUCH_BYTES:
        yield (
            f"which is much for one machine: lower window_clips={recipe.window_clips}, as row groups of more clips are "
            "read in slices"
        )


def _assumed_work(
    recipe: TrainRecipe, config: AnyGraftConfig, trained: TrainedParts, *, hours: float, clip_s: float
) -> Work:
    """Assume `hours` of clips that all last `clip_s`, which need no padding."""
    clips = max(1, round(hours * 3600 / clip_s))
    frames = max(8, round(clip_s * FRAMES_PER_S))
    labels = round(clip_s * LABELS_PER_S[config.text_style]) + 1
    tokens = (
        PROMPT_TOKENS[config.prompt_style]
        + labels
        + audio_token_count(frames, pool=config.audio_pool, context=config.audio_context)
    )
    batch_clips = min(recipe.token_budget // tokens, recipe.max_batch_clips)
    if not batch_clips:
        raise RecipeError(f"a clip makes {tokens} tokens, more than token_budget={recipe.token_budget}: raise it")
    clip_bytes = STORED_BYTES_PER_S * clip_s
    unread = "" if recipe.data is None else ", as data is read once the graft is built"
    step_clips = batch_clips * (recipe.step_batches or recipe.workers)
    return _work(
        recipe,
        config,
        trained,
        token_counts=np.full(clips * recipe.epochs, tokens),
        frame_counts=np.full(clips * recipe.epochs, frames),
        label_count=labels * clips * recipe.epochs,
        steps=-(-clips // step_clips) * recipe.epochs,
        padding=0.0,
        source=f"assumed{unread}: {clip_s:g} s a clip, {LABELS_PER_S[config.text_style]} label tokens a second",
        reading=(
            f"a window: up to {recipe.window_clips:,} clips of about {clip_bytes / 1e6:.2g} MB",
            *_reading_memory(recipe, config, 2 * recipe.window_clips * clip_bytes),
        ),
    )


def _validation_work(
    recipe: TrainRecipe, config: AnyGraftConfig, trained: TrainedParts, work: Work, *, clip_s: float | None
) -> ValidationWork | None:
    """Count the clips of all validation sets, which are read, or assumed to last `clip_s` each. None for no set."""
    if recipe.validation is None:
        return None
    processor = None if clip_s is not None else read_graft_processor(base_checkpoint(recipe.model))
    clips, tokens, labels, frames = dict[str, int](), [], 0, []
    for name, data in recipe.validation.sets.items():
        if processor is None:
            count = recipe.validation.clips
            tokens.append(np.full(count, round(work.token_count / work.clips)))
            labels += round(work.label_count / work.clips * count)
            durations_s = np.full(count, clip_s)
        else:
            rows = validation_rows(data, recipe.validation.clips, seed=recipe.seed)
            columns = plan_columns(rows, processor)
            count, durations_s = len(rows), rows.duration_s
            tokens.append(columns.token_counts)
            labels += int(columns.label_counts.sum())
        clips[name] = count
        frames.append(np.ceil(durations_s * FRAMES_PER_S).clip(8, WINDOW_FRAMES).astype(int))
    frame_counts = np.concatenate(frames)
    flops = validation_flops(
        config,
        token_counts=np.concatenate(tokens) if trained.language_model else [],
        label_count=labels if trained.language_model else 0,
        frame_counts=frame_counts,
        lora_rank=trained.lora_rank,
    )
    most = max(recipe.validation.transcripts, recipe.validation.wer_clips)
    return ValidationWork(
        count=-(-work.steps // recipe.validation.every),
        clips=clips,
        audio_s=float(frame_counts.sum()) / FRAMES_PER_S,
        flops=flops,
        transcripts=sum(min(most, count) for count in clips.values()),
    )


def _work(
    recipe: TrainRecipe,
    config: AnyGraftConfig,
    trained: TrainedParts,
    *,
    token_counts: np.ndarray,
    frame_counts: np.ndarray,
    label_count: int,
    steps: int,
    padding: float,
    source: str,
    reading: tuple[str, ...],
) -> Work:
    """Add up the clips of all epochs. A run that stops at max_steps takes the same share of each sum."""
    share = min(1.0, recipe.max_steps / steps) if recipe.max_steps else 1.0
    flops = batch_flops(
        config,
        token_counts=token_counts if trained.language_model else [],
        label_count=label_count if trained.language_model else 0,
        frame_counts=frame_counts,
        lora_rank=trained.lora_rank,
        lora_encoder=trained.lora_encoder,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    encoder = encoder_flops(config, frame_counts, lora_rank=trained.lora_rank if trained.lora_encoder else None)
    # With a cache only the first epoch runs the encoder.
    from_cache = encoder * (1 - 1 / recipe.epochs) if recipe.encoder_cache else 0.0
    return Work(
        clips=max(1, round(len(token_counts) * share)),
        audio_s=float(frame_counts.sum()) / FRAMES_PER_S * share,
        token_count=round(token_counts.sum() * share),
        label_count=round(label_count * share),
        longest=int(token_counts.max()),
        frame_count=round(encoded_frames(config, frame_counts).sum() * share),
        steps=min(steps, recipe.max_steps or steps),
        padding=padding,
        flops=(flops - from_cache) * share,
        encoder_flops=(encoder - from_cache) * share,
        source=source,
        reading=reading,
    )


def _work_lines(
    recipe: TrainRecipe,
    options: PlanOptions,
    parameters: Parameters,
    work: Work,
    validation: ValidationWork | None,
) -> Iterator[str]:
    parts = ("audio_tower", "projector", "text", "lm_head", "vision", "lora")
    counts = {name: count for name in parts if (count := getattr(parameters, name))}
    peak = _peak_flops(options)
    step_batches = recipe.step_batches or recipe.workers
    busy = _busy_devices(recipe)
    hours = _hours(recipe, options, work)
    rate = work.clips / hours / 3600
    yield "parameters  " + ", ".join(f"{name} {_millions(count)}" for name, count in counts.items())
    yield f"            {_millions(parameters.total)} without adapters, {_millions(parameters.trained)} trained"
    yield f"data        {work.clips:,} clips, {work.audio_s / 3600:,.2f} h, epochs: {recipe.epochs} ({work.source})"
    tokens = f"{work.token_count:,} ({work.token_count / work.clips:.0f} a clip), {work.label_count:,} of them labels"
    yield f"tokens      {tokens}, padding {work.padding:.1%}"
    batch = f"a batch: up to {recipe.token_budget:,} tokens and {recipe.max_batch_clips} clips"
    yield f"steps       {work.steps:,}, batches a step: {step_batches}, {batch}"
    yield "reading     " + "\n            ".join(work.reading)
    encoder_share = work.encoder_flops / work.flops
    yield f"work        {work.flops / 1e12 / work.clips:.3g} TFLOP a clip, {encoder_share:.0%} of it the encoder's"
    audio_rate, token_rate = rate * work.audio_s / work.clips, rate * work.token_count / work.clips
    yield f"speed       {rate:,.1f} samples/s, {audio_rate:,.0f} audio-s/s, {token_rate:,.0f} tokens/s"
    idle = "" if busy == recipe.workers else f", of which {busy:.1f} at work: make step_batches a multiple of workers"
    devices = f"{recipe.workers} x {options.device} at {options.share:.0%} of {peak / 1e12:.0f} TFLOP/s"
    yield f"            expected of {devices}{idle}"
    if validation is not None:
        yield from _validation_lines(validation, work)
        hours += validation.count * validation.flops / (recipe.workers * peak * options.share) / 3600
    cost = (
        "" if options.price is None else f", {hours * recipe.workers * options.price:,.2f} at {options.price:g} an hour"
    )
    yield f"time        {hours:,.2f} h, {hours * recipe.workers:,.2f} device hours{cost}"


def _validation_lines(validation: ValidationWork, work: Work) -> Iterator[str]:
    sets = ", ".join(f"{name} {count:,}" for name, count in validation.clips.items() if name)
    clips = f"{sum(validation.clips.values()):,} clips{f' ({sets})' if sets else ''}, {validation.audio_s / 3600:.2f} h"
    share = validation.count * validation.flops / work.flops
    yield f"validation  {validation.count:,} times {clips}: {share:.1%} of the work of training, counted in the time"
    if validation.transcripts:
        yield f"            {validation.transcripts:,} clips are transcribed each time, which the time does not count"


def _peak_flops(options: PlanOptions) -> float:
    """Return the peak FLOP/s of the device to plan for. Raises RecipeError where it is not known."""
    peak = device_peak_flops(options.device)
    if peak is None:
        raise RecipeError(f"--device {options.device} is not known: give one of {KNOWN_DEVICES}")
    return peak


def _busy_devices(recipe: TrainRecipe) -> float:
    """Count the devices that have work, on average over the batches of a step."""
    return (recipe.step_batches or recipe.workers) / recipe.accumulation


def _hours(recipe: TrainRecipe, options: PlanOptions, work: Work) -> float:
    """Estimate the hours of arithmetic of the whole run."""
    return work.flops / (_busy_devices(recipe) * _peak_flops(options) * options.share) / 3600


def _memory_lines(
    recipe: TrainRecipe, config: AnyGraftConfig, parameters: Parameters, work: Work, trained: TrainedParts
) -> Iterator[str]:
    """Tabulate the memory of each layout, and mark the recipe's own."""
    tokens = min(recipe.token_budget, recipe.max_batch_clips * work.longest)
    if not trained.language_model:
        parameters, tokens = replace(parameters, text=0, lm_head=0, vision=0), 0
    precision = "NF4" if trained.nf4 else recipe.dtype
    yield f"memory      GB a device, {recipe.workers} workers, for {tokens:,} tokens, {precision}"
    yield f"            {'':<8}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'total':>9}"
    for layout in _layouts(trained):
        memory = device_memory(
            config,
            parameters,
            layout=layout,
            workers=recipe.workers,
            token_count=tokens,
            label_count=round(tokens * work.label_count / work.token_count),
            trained_frame_count=round(tokens * work.frame_count / work.token_count) if trained.lora_encoder else 0,
            nf4=trained.nf4,
            dtype_bytes=4 if recipe.dtype == "fp32" else 2,
            gradient_checkpointing=recipe.gradient_checkpointing,
        )
        columns = (
            (memory.weights, 10),
            (memory.gradients, 11),
            (memory.optimizer, 11),
            (memory.activations, 13),
            (memory.total, 9),
        )
        sizes = "".join(f"{size / 1e9:>{width}.2f}" for size, width in columns)
        yield f"            {layout:<8}{sizes}{_mark(recipe, layout)}"
    yield "            activations as measured at 7B, scaled by width and layers; the allocator takes more memory"


def _network_lines(
    recipe: TrainRecipe,
    options: PlanOptions,
    config: AnyGraftConfig,
    parameters: Parameters,
    work: Work,
    trained: TrainedParts,
) -> Iterator[str]:
    """Tabulate what the workers' exchange of gradients and weights costs in each layout, by each kind of network."""
    networks = NETWORKS_GBIT if options.network_gbit is None else (options.network_gbit,)
    links = {f"{gbit:g} Gbit/s": gbit * 1e9 / 8 for gbit in networks}  # bytes per second
    if nvlink := device_nvlink(options.device):
        links = {"NVLink": nvlink, **links}
    step_s = _hours(recipe, options, work) * 3600 / work.steps
    yield f"network     GB that each of {recipe.workers} workers sends a step, and the seconds that this takes"
    yield f"            {'':<8}{'GB':>10}{''.join(f'{name:>13}' for name in links)}"
    for layout in _layouts(trained):
        sent = network_bytes(
            config,
            parameters,
            layout=layout,
            workers=recipe.workers,
            accumulation=recipe.accumulation,
            dtype_bytes=4 if recipe.dtype == "fp32" else 2,
            gradient_checkpointing=recipe.gradient_checkpointing,
        )
        seconds = "".join(f"{sent / speed:>13.3f}" for speed in links.values())
        yield f"            {layout:<8}{sent / 1e9:>10.3f}{seconds}{_mark(recipe, layout)}"
    yield f"            a step has {step_s:.3f} s of arithmetic, with which part of the exchange overlaps"


def _layouts(trained: TrainedParts) -> list[Layout]:
    """List the layouts that a stage can train in: ZeRO-3 cannot shard 4-bit weights, and CTC has nothing to shard."""
    shards = trained.language_model and not trained.nf4
    return [layout for layout in LAYOUTS if shards or layout != "zero 3"]


def _mark(recipe: TrainRecipe, layout: Layout) -> str:
    own = f"zero {recipe.zero_stage}" if recipe.backend == "deepspeed" else "ddp"
    return "  <- this recipe" if layout == own else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
