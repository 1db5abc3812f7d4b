"""What --plan prints of a training recipe: parameters, memory on each device, steps, tokens, speed, hours and cost. Nothing starts.

A graft's folder or hub id is read for its configuration alone. In its place a recipe of jobs.build will do, by its file or, for those that
ship, by its name (fast-7b): the bases that it names are known by shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from graft.checkpoints.loading import base_graft
from graft.errors import RecipeError
from graft.model.configuration import WINDOW_FRAMES, GraftConfig, audio_token_count
from graft.processor import GraftProcessor
from graft.training.estimate import (
    LAYOUTS,
    PEAKS,
    Parameters,
    batch_flops,
    count_parameters,
    device_memory,
    device_peak_flops,
    encoded_frames,
    encoder_flops,
)

from ..common.cli import PlanOptions
from .batches import plan_run
from .recipe import TrainRecipe

FRAMES_PER_S = WINDOW_FRAMES // 30
PROMPT_TOKENS = {"graft": 16, "reference": 27}
"""Of a prompt without its audio, by prompt style."""
LABELS_PER_S = {"raw": 4.0, "lower": 3.0, "formatted": 3.2}
"""Label tokens to a second of speech by text style: 2.7 words of English, which make 1.45, 1.09 and 1.16 tokens each in Qwen2's tokenizer
(raw: in capitals)."""


@dataclass(frozen=True)
class Trained:
    """What a stage trains besides the projector, and on what base."""

    lora_rank: int | None = None
    lora_encoder: bool = False
    nf4: bool = False
    reads: bool = True
    """Whether the language model takes part, which it does not where the projector learns to spell."""


PROJECTOR_ALONE = Trained()


@dataclass(frozen=True)
class Work:
    """What a run trains on, all epochs together."""

    clips: int
    audio_s: float
    token_count: int
    label_count: int
    longest: int
    """Tokens of the longest clip."""
    frame_count: int
    """Encoder frames, 50 a second."""
    steps: int
    padding: float
    flops: float
    encoder_flops: float
    source: str


def print_plan(
    recipe: TrainRecipe,
    options: PlanOptions,
    config: GraftConfig,
    is_built: bool,
    *,
    trained: Trained = PROJECTOR_ALONE,
) -> None:
    """Print what a run of this recipe on a graft of this configuration takes; the data of a graft that is not yet built is not read.

    Raises ModelError, DataError and RecipeError for what is not known or cannot be read.
    """
    parameters = count_parameters(config, lora_rank=trained.lora_rank, lora_encoder=trained.lora_encoder)
    work = (
        _read_work(recipe, config, trained)
        if recipe.data is not None and is_built
        else _assumed_work(recipe, config, trained, hours=options.hours, clip_s=options.clip_s)
    )
    lines = [
        *_work_lines(recipe, options, parameters, work),
        "",
        *_memory_lines(recipe, config, parameters, work, trained),
    ]
    print("\n".join(lines), flush=True)


def _read_work(recipe: TrainRecipe, config: GraftConfig, trained: Trained) -> Work:
    """Plan the run as it would be trained."""
    rows, variation, plan = plan_run(recipe, GraftProcessor.from_pretrained(base_graft(recipe.model)))
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
    )


def _assumed_work(recipe: TrainRecipe, config: GraftConfig, trained: Trained, *, hours: float, clip_s: float) -> Work:
    """Plan for clips of one length, which leave no padding."""
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
    )


def _work(
    recipe: TrainRecipe,
    config: GraftConfig,
    trained: Trained,
    *,
    token_counts: np.ndarray,
    frame_counts: np.ndarray,
    label_count: int,
    steps: int,
    padding: float,
    source: str,
) -> Work:
    """Add up the clips of all epochs; a run that stops at max_steps takes the same share of each sum."""
    share = min(1.0, recipe.max_steps / steps) if recipe.max_steps else 1.0
    flops = batch_flops(
        config,
        token_counts=token_counts if trained.reads else [],
        label_count=label_count if trained.reads else 0,
        frame_counts=frame_counts,
        lora_rank=trained.lora_rank,
        lora_encoder=trained.lora_encoder,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    encoder = encoder_flops(config, frame_counts, lora_rank=trained.lora_rank if trained.lora_encoder else None)
    from_cache = (
        encoder * (1 - 1 / recipe.epochs) if recipe.encoder_cache else 0.0
    )  # later epochs read what the first has encoded
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
    )


def _work_lines(recipe: TrainRecipe, options: PlanOptions, parameters: Parameters, work: Work) -> Iterator[str]:
    parts = ("audio_tower", "projector", "text", "lm_head", "vision", "lora")
    counts = {name: count for name in parts if (count := getattr(parameters, name))}
    peak = device_peak_flops(options.device)
    if peak is None:
        known = ", ".join(" ".join(words) for words, flops in PEAKS.items() if flops)
        raise RecipeError(f"--device {options.device} is not known: give one of {known}")
    step_batches = recipe.step_batches or recipe.workers
    busy = step_batches / recipe.accumulation  # devices, of those that a step's batches are shared out to
    rate = busy * peak * options.share / (work.flops / work.clips)
    hours = work.clips / rate / 3600
    yield "parameters  " + ", ".join(f"{name} {_millions(count)}" for name, count in counts.items())
    yield f"            {_millions(parameters.total)} without adapters, {_millions(parameters.trained)} trained"
    yield f"data        {work.clips:,} clips, {work.audio_s / 3600:,.2f} h, epochs: {recipe.epochs} ({work.source})"
    tokens = f"{work.token_count:,} ({work.token_count / work.clips:.0f} a clip), {work.label_count:,} of them labels"
    yield f"tokens      {tokens}, padding {work.padding:.1%}"
    batch = f"a batch: up to {recipe.token_budget:,} tokens and {recipe.max_batch_clips} clips"
    yield f"steps       {work.steps:,}, batches a step: {step_batches}, {batch}"
    yield f"work        {work.flops / 1e12 / work.clips:.3g} TFLOP a clip, {work.encoder_flops / work.flops:.0%} of it the encoder's"
    per_clip_s, per_clip_tokens = work.audio_s / work.clips, work.token_count / work.clips
    yield f"speed       {rate:,.1f} samples/s, {rate * per_clip_s:,.0f} audio-s/s, {rate * per_clip_tokens:,.0f} tokens/s"
    idle = "" if busy == recipe.workers else f", of which {busy:.1f} at work: make step_batches a multiple of workers"
    yield f"            expected of {recipe.workers} x {options.device} at {options.share:.0%} of {peak / 1e12:.0f} TFLOP/s{idle}"
    cost = (
        "" if options.price is None else f", {hours * recipe.workers * options.price:,.2f} at {options.price:g} an hour"
    )
    yield f"time        {hours:,.2f} h, {hours * recipe.workers:,.2f} device hours{cost}"


def _memory_lines(
    recipe: TrainRecipe, config: GraftConfig, parameters: Parameters, work: Work, trained: Trained
) -> Iterator[str]:
    """A table of what each layout takes; the recipe's own is marked."""
    tokens = min(recipe.token_budget, recipe.max_batch_clips * work.longest)
    own = f"zero {recipe.zero_stage}" if recipe.backend == "deepspeed" else "ddp"
    shards = trained.reads and not trained.nf4  # 4-bit weights cannot be sharded
    layouts = [layout for layout in LAYOUTS if shards or layout != "zero 3"]
    if not trained.reads:
        parameters, tokens = replace(parameters, text=0, lm_head=0, vision=0), 0
    yield f"memory      GB a device, {recipe.workers} workers, for {tokens:,} tokens, {'NF4' if trained.nf4 else recipe.dtype}"
    yield f"            {'':<8}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'total':>9}"
    for layout in layouts:
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
        yield f"            {layout:<8}{sizes}{'  <- this recipe' if layout == own else ''}"
    yield "            activations as measured at 7B, scaled by width and layers; the allocator's own memory comes on top"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
