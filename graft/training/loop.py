"""The training loop of both stages, on one worker of any number: batches in, losses and checkpoints out."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from graft.errors import ModelError
from graft.training.backends import Backend
from graft.training.checkpoint import Progress


@dataclass(frozen=True)
class LoopSettings:
    """What a step does."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500


@dataclass(frozen=True)
class TrainingBatch:
    """A batch on its device: the model's inputs with labels, what the plan says of it, and the clips and seconds in it that count."""

    inputs: Mapping[str, Tensor]
    position: int
    step_position: int
    step_label_count: int
    clip_count: int
    audio_s: float


@dataclass(frozen=True)
class StepLog:
    """Means since the last log, over all workers; `data_wait` is the share of time spent waiting for batches."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    samples_per_s: float
    audio_s_per_s: float
    data_wait: float
    left_s: float

    def line(self) -> str:
        minutes, seconds = divmod(round(self.left_s), 60)
        return (
            f"step {self.step}/{self.total_steps}  loss {self.loss:.4f}  lr {self.learning_rate:.2e}  grad {self.grad_norm:.2f}  "
            f"{self.samples_per_s:.1f} samples/s  {self.audio_s_per_s:.0f} audio-s/s  data wait {self.data_wait:.0%}  "
            f"left {minutes}:{seconds:02d}"
        )


def train(
    batches: Iterable[TrainingBatch],
    backend: Backend,
    settings: LoopSettings,
    *,
    progress: Progress,
    total_steps: int,
    on_log: Callable[[StepLog], None],
    on_checkpoint: Callable[[Progress], None],
) -> Progress:
    """Train from `progress` until the batches or `total_steps` end; returns where that is.

    Every worker takes `accumulation` batches a step. Raises ModelError when the loss or its gradient is no longer finite.
    """
    waiting = _Stopwatch(batches)
    meter = _Meter(progress.step)
    while progress.step < total_steps and (step := list(islice(waiting, settings.accumulation))):
        learning_rate = learning_rate_at(progress.step, settings, total_steps)
        for index, batch in enumerate(step):
            torch.manual_seed(settings.seed * 1_000_003 + batch.position)  # dropout depends on the batch, not on the worker
            is_last = index == len(step) - 1
            meter.add(backend.backward(batch.inputs, label_count=batch.step_label_count, is_last=is_last), batch)
        grad_norm = backend.step(learning_rate)
        progress = replace(progress, step=progress.step + 1, position=step[-1].step_position)
        saves = progress.step == total_steps or progress.step % settings.checkpoint_every == 0
        if saves or progress.step == 1 or progress.step % settings.log_every == 0:
            log, clips, audio_s = meter.read(progress.step, total_steps, learning_rate, grad_norm, waiting)
            progress = replace(progress, clips=progress.clips + clips, audio_s=progress.audio_s + audio_s)
            progress = replace(progress, first_loss=log.loss if progress.first_loss is None else progress.first_loss)
            on_log(log)
            if not math.isfinite(log.loss + grad_norm):
                reason = f"the loss is {log.loss}, the gradient's norm {grad_norm} at step {progress.step}"
                raise ModelError(f"{reason}: lower learning_rate or train in bf16 or fp32")
        if saves:
            on_checkpoint(progress)
    return progress


def learning_rate_at(step: int, settings: LoopSettings, total_steps: int) -> float:
    """The learning rate of the update after `step` others: linear warm-up, then constant, or linear or cosine to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
    return settings.learning_rate * factor


class _Stopwatch:
    """Iterates over batches and sums the seconds spent waiting for them."""

    def __init__(self, batches: Iterable[TrainingBatch]):
        self.batches = iter(batches)
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        start = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.waited_s += time.perf_counter() - start


class _Meter:
    """Sums of this worker since the last log; reading them adds up those of all workers and starts anew."""

    def __init__(self, step: int):
        self.first_step, self.started = step, time.perf_counter()
        self._start(step)

    def _start(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()
        self.losses: list[Tensor] = []
        self.clips, self.audio_s = 0, 0.0

    def add(self, loss: Tensor, batch: TrainingBatch) -> None:
        self.losses.append(loss)
        self.clips += batch.clip_count
        self.audio_s += batch.audio_s

    def read(self, step: int, total_steps: int, learning_rate: float, grad_norm: float, waiting: _Stopwatch) -> tuple[StepLog, int, float]:
        device = self.losses[0].device
        sums = torch.stack([torch.stack(self.losses).sum().float(), *torch.tensor([self.clips, self.audio_s], device=device)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        loss, clips, audio_s = sums.tolist()
        now = time.perf_counter()
        elapsed_s = now - self.since
        log = StepLog(
            step=step,
            total_steps=total_steps,
            loss=loss / (step - self.step),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            samples_per_s=clips / elapsed_s,
            audio_s_per_s=audio_s / elapsed_s,
            data_wait=waiting.waited_s / elapsed_s,
            left_s=(now - self.started) / (step - self.first_step) * (total_steps - step),
        )
        waiting.waited_s = 0.0
        self._start(step)
        return log, round(clips), audio_s
