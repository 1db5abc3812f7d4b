"""The training loop of both stages, which each worker runs over its own share of the batches."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from graft.errors import DataError, ModelError
from graft.training.backends import Backend, TrainingBatch
from graft.training.meter import Meter, StepLog
from graft.training.progress import Progress

NAMED_CLIPS = 8
"""Clips of a batch that an error names; the longest are its first ones."""


@dataclass(frozen=True)
class LoopSettings:
    """Optimization, and how often the loop logs, validates and saves."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    accumulation: int = 1
    """Batches of each worker per step."""
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    validate_every: int | None = None
    patience: int | None = None
    """End the run after this many validations in a row that are not better than the best; None for no limit."""
    max_loss: float = 24.0
    """A step's loss above this is an error, in nats per label token; guessing among 150,000 tokens costs 12."""
    max_masked: float = 0.1
    """End the run with an error when more than this share of the clips is masked."""
    peak_flops: float | None = None
    """Peak FLOP/s of one worker's device; None logs no utilisation."""


@dataclass(frozen=True)
class ValidationResult:
    """The metrics of a validation, such as `validation_loss` and `validation_wer/calls`; less is better."""

    metrics: Mapping[str, float]
    monitor: str
    """Name of the metric by which the best weights are chosen."""

    @property
    def monitored(self) -> float:
        return self.metrics[self.monitor]

    def is_better(self, best: Mapping[str, float]) -> bool:
        """Tell whether it is better than the metrics of the best validation so far, which may be none."""
        return self.monitor not in best or self.monitored < best[self.monitor]


class Observer:
    """Receives the events of a run; every worker calls it at the same steps. These defaults do nothing."""

    def log(self, log: StepLog) -> None:
        """Record the means over the steps since the last log."""

    def validate(self, step: int) -> ValidationResult:
        """Validate the model over all workers."""
        raise NotImplementedError

    def checkpoint(self, progress: Progress, *, is_last: bool) -> None:
        """Save the trained weights; `progress.best_step` is this step after the best validation so far.

        `is_last` marks the end of the run, after which the observer may change the model.
        """

    def wants_stop(self) -> bool:
        """Tell whether this worker was asked to end the run early."""
        return False

    def fault(self, batches: Sequence[TrainingBatch], reason: str) -> None:
        """Save this worker's batches of a step that failed."""


def train(
    batches: Iterable[TrainingBatch],
    backend: Backend,
    settings: LoopSettings,
    *,
    progress: Progress,
    total_steps: int,
    observer: Observer,
) -> Progress:
    """Train from `progress` until the batches, the steps or the patience end, or a worker wants to stop.

    Every worker takes `accumulation` batches per step. Returns the progress at the end. Raises ModelError when the loss
    or its gradient is not finite, explodes or diverges; the weights then are those before the step. Raises ModelError
    for a metric of a validation that is not finite, and DataError when too many clips are masked.
    """
    waiting = iter(batches)
    meter = Meter(progress, total_steps=total_steps, max_loss=settings.max_loss, peak_flops=settings.peak_flops)
    stops = False
    while (
        not stops
        and not is_finished(progress, settings, total_steps)
        and (step := meter.take(waiting, settings.accumulation))
    ):
        learning_rate = learning_rate_at(progress.step, settings, total_steps, start=progress.schedule_start)
        loss, stops = meter.add(_accumulate(step, backend, settings, observer), step, wants_stop=observer.wants_stop())
        _raise_fault(meter.find_fault(loss), progress.step + 1, step, observer)
        with naming_clips(step, observer, where="in the update after"):
            grad_norm = backend.step(learning_rate)
        if not math.isfinite(grad_norm):
            _raise_fault(f"the gradient's norm is {grad_norm}", progress.step + 1, step, observer)
        progress = meter.advance(progress, loss, step[-1].step_position)
        ends = stops or progress.step == total_steps
        if reason := meter.find_masked(progress, settings.max_masked, ends=progress.step == total_steps):
            observer.log(meter.read(progress.step, learning_rate, grad_norm))  # lists the masked clips
            raise DataError(
                f"{reason}, and max_masked={settings.max_masked:g} is the largest share that may be masked: "
                "repair the data and train in another out=, or raise max_masked"
            )
        is_best = False
        if settings.validate_every and (ends or progress.step % settings.validate_every == 0) and not stops:
            started = time.perf_counter()
            result = _validate(progress.step, observer)
            is_best = result.is_better(progress.best_metrics)
            progress = replace(progress, stale_validations=0 if is_best else progress.stale_validations + 1)
            if is_best:
                progress = replace(progress, best_metrics=dict(result.metrics), best_step=progress.step)
            meter.since += time.perf_counter() - started  # This time is not spent on training.
            ends = ends or is_finished(progress, settings, total_steps)
        if ends or progress.step == 1 or progress.step % settings.log_every == 0:
            observer.log(meter.read(progress.step, learning_rate, grad_norm))
        if ends or is_best or progress.step % settings.checkpoint_every == 0:
            observer.checkpoint(progress, is_last=is_finished(progress, settings, total_steps))
    return progress


def is_finished(progress: Progress, settings: LoopSettings, total_steps: int) -> bool:
    """Tell whether a run has done all its steps or exhausted its patience."""
    return progress.step >= total_steps or (
        settings.patience is not None and progress.stale_validations >= settings.patience
    )


def learning_rate_at(step: int, settings: LoopSettings, total_steps: int, *, start: int = 0) -> float:
    """Compute the learning rate of update `step` + 1: linear warm-up, then constant, linear or cosine decay to zero.

    The schedule begins after `start` updates, where a run of fewer steps ended.
    """
    step, total_steps = step - start, total_steps - start
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
    return settings.learning_rate * factor


def _validate(step: int, observer: Observer) -> ValidationResult:
    """Validate. Raises ModelError for a metric of any set that is not finite, which is never the best."""
    result = observer.validate(step)
    for name, value in result.metrics.items():
        if not math.isfinite(value):
            metric, _, of = name.partition("/")
            where = f" of {of}" if of else ""
            raise ModelError(
                f"the {metric.replace('_', ' ')}{where} is {value} at step {step}: lower learning_rate, train in bf16 "
                "or fp32, or check the clips of validation.data"
            )
    return result


@contextlib.contextmanager
def naming_clips(batches: Sequence[TrainingBatch], observer: Observer, *, where: str = "on") -> Iterator[None]:
    """Name the clips of the batches, and save them, when the device's memory runs out in the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        note = f"{where} {'; '.join(map(_describe_batch, batches))}"
        error.add_note(note)
        observer.fault(batches, f"the device's memory ran out {note}")
        raise


def _describe_batch(batch: TrainingBatch) -> str:
    clips, tokens = batch.inputs["input_ids"].shape
    others = f" and {len(batch.ids) - NAMED_CLIPS} others" if len(batch.ids) > NAMED_CLIPS else ""
    return f"a batch of {clips} x {tokens} tokens with the clips {', '.join(batch.ids[:NAMED_CLIPS])}{others}"


def _accumulate(step: Sequence[TrainingBatch], backend: Backend, settings: LoopSettings, observer: Observer) -> Tensor:
    """Accumulate the gradients of a step's batches; returns this worker's part of the step's loss."""
    losses = []
    for index, batch in enumerate(step):
        torch.manual_seed(settings.seed * 1_000_003 + batch.position)  # dropout follows the batch
        is_last = index == len(step) - 1
        with naming_clips([batch], observer):
            loss = backend.backward(batch.model_inputs(), label_count=batch.step_label_count, is_last=is_last)
        losses.append(loss)
    return torch.stack(losses).sum().double()


def _raise_fault(fault: str | None, number: int, step: Sequence[TrainingBatch], observer: Observer) -> None:
    if fault:
        reason = f"{fault} at step {number}"
        observer.fault(step, reason)
        raise ModelError(f"{reason}: look at the saved batch, lower learning_rate, or train in bf16 or fp32")
