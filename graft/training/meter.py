"""Measure speed, data wait, memory and loss over all workers, and detect a loss that diverges."""

import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from graft.training.backends import TrainingBatch
from graft.training.progress import Progress

DIVERGED_NATS = 1.0
"""A running mean of the loss above twice its minimum plus this many nats counts as diverged."""
SMOOTHING_STEPS = 20
LEAST_JUDGED_CLIPS = 1000
"""Clips after which the share of masked ones is judged; at the end of a run it is judged in any case."""
NAMED_CLIPS = 3
"""Masked clips that an error names."""


@dataclass(frozen=True)
class StepLog:
    """Means over all workers since the last log.

    `data_wait` is the share of time that the slowest-fed worker waited for batches, `mfu` the share of the devices'
    peak FLOP/s that was used, `memory_gb` the peak memory of a worker's device (on a CPU of its process), and `left_s`
    the estimated seconds until the last step.
    """

    step: int
    total_steps: int
    loss: float | None
    """None where no clip could be read."""
    learning_rate: float
    grad_norm: float
    samples_per_s: float
    audio_s_per_s: float
    tokens_per_s: float
    data_wait: float
    mfu: float | None
    memory_gb: float
    left_s: float

    def line(self) -> str:
        minutes, seconds = divmod(round(self.left_s), 60)
        loss = "none, as no clip could be read" if self.loss is None else f"{self.loss:.4f}"
        utilisation = "" if self.mfu is None else f"mfu {self.mfu:.0%}  "
        return (
            f"step {self.step}/{self.total_steps}  loss {loss}  lr {self.learning_rate:.2e}  "
            f"grad {self.grad_norm:.2f}  {self.samples_per_s:.1f} samples/s  {self.audio_s_per_s:.0f} audio-s/s  "
            f"{self.tokens_per_s:.0f} tokens/s  {utilisation}data wait {self.data_wait:.1%}  {self.memory_gb:.1f} GB  "
            f"left {minutes}:{seconds:02d}"
        )


class Meter:
    """Adds up counts over all workers since the last log, and follows the loss over the whole run."""

    def __init__(self, progress: Progress, *, total_steps: int, max_loss: float, peak_flops: float | None):
        self.total_steps, self.max_loss, self.peak_flops = total_steps, max_loss, peak_flops
        self.device = torch.device("cpu")
        self.first_step, self.started = progress.step, time.perf_counter()
        self.masked: list[str] = []  # the first ones of this worker
        self.smoothed: float | None = None
        self.best_smoothed = math.inf
        self._start(progress.step)

    def _start(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()
        self.loss_steps = 0
        self.loss = self.clips = self.audio_s = self.tokens = self.flops = self.waited_s = 0.0

    def take(self, batches: Iterator[TrainingBatch], count: int) -> list[TrainingBatch]:
        """Take the batches of a step, fewer at the end, and measure how long the loop waits for them."""
        start = time.perf_counter()
        step = list(islice(batches, count))
        self.waited_s += time.perf_counter() - start
        return step

    def add(self, loss: Tensor, step: Sequence[TrainingBatch], *, wants_stop: bool) -> tuple[float | None, bool]:
        """Add up a step's counts over all workers; returns its loss, and whether any worker wants to stop.

        Gradients are divided by the planned number of labels, the returned loss by the actual one: clips that could not
        be decoded have no labels. The loss is None where none of them could.
        """
        own = [(one.clip_count, len(one.masked), one.audio_s, one.token_count, one.flops) for one in step]
        self.masked = [*self.masked, *(masked for one in step for masked in one.masked)][:NAMED_CLIPS]
        counts = torch.tensor(
            [float(wants_stop), *map(sum, zip(*own, strict=True))], dtype=torch.float64, device=loss.device
        )
        labels = torch.stack([(one.inputs["labels"] != -100).sum() for one in step]).sum().double()
        sums, self.device = torch.cat([torch.stack([loss, labels]), counts]), loss.device
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, label_count, stops, self.step_clips, self.step_masked, self.step_audio_s, tokens, flops = sums.tolist()
        self.tokens, self.flops = self.tokens + tokens, self.flops + flops
        self.clips, self.audio_s = self.clips + self.step_clips, self.audio_s + self.step_audio_s
        if not label_count:
            return None, stops > 0
        total *= step[-1].step_label_count / label_count
        self.loss, self.loss_steps = self.loss + total, self.loss_steps + 1
        return total, stops > 0

    def find_fault(self, loss: float | None) -> str | None:
        """Say why a step's loss must end the run: it is not finite, too large or diverging; otherwise None."""
        if loss is None:
            return None
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if loss > self.max_loss:
            return f"the loss exploded to {loss:.1f}"
        self.smoothed = loss if self.smoothed is None else self.smoothed + (loss - self.smoothed) / SMOOTHING_STEPS
        self.best_smoothed = min(self.best_smoothed, self.smoothed)
        if self.smoothed > 2 * self.best_smoothed + DIVERGED_NATS:
            return f"the loss diverged: its running mean rose from {self.best_smoothed:.2f} to {self.smoothed:.2f}"
        return None

    def find_masked(self, progress: Progress, max_masked: float, *, ends: bool) -> str | None:
        """Say that more than the share `max_masked` of the run's clips was masked, and why; otherwise None.

        Every worker must call it; all of them get the reasons of each.
        """
        seen = progress.clips + progress.masked
        if progress.masked <= max_masked * seen or not (ends or seen >= LEAST_JUDGED_CLIPS):
            return None
        found = [self.masked]
        if torch.distributed.is_initialized():
            found *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, self.masked)
        return masked_share([one for masked in found for one in masked], progress.masked, seen)

    def advance(self, progress: Progress, loss: float | None, position: int) -> Progress:
        return replace(
            progress,
            step=progress.step + 1,
            position=position,
            clips=progress.clips + round(self.step_clips),
            masked=progress.masked + round(self.step_masked),
            audio_s=progress.audio_s + self.step_audio_s,
            first_loss=loss if progress.first_loss is None else progress.first_loss,
        )

    def read(self, step: int, learning_rate: float, grad_norm: float) -> StepLog:
        """Return the means since the last log, and start the next interval."""
        now = time.perf_counter()
        elapsed_s = now - self.since
        workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if self.device.type == "cuda":
            memory_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        largest = torch.tensor([self.waited_s / elapsed_s, memory_bytes], dtype=torch.float64, device=self.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        data_wait, memory_bytes = largest.tolist()
        log = StepLog(
            step=step,
            total_steps=self.total_steps,
            loss=self.loss / self.loss_steps if self.loss_steps else None,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            samples_per_s=self.clips / elapsed_s,
            audio_s_per_s=self.audio_s / elapsed_s,
            tokens_per_s=self.tokens / elapsed_s,
            data_wait=data_wait,
            mfu=self.flops / elapsed_s / (self.peak_flops * workers) if self.peak_flops else None,
            memory_gb=memory_bytes / 1e9,
            left_s=(now - self.started) / (step - self.first_step) * (self.total_steps - step),
        )
        self._start(step)
        return log


def masked_share(masked: Sequence[str], count: int, seen: int) -> str:
    """Say how many of the clips that were seen are masked, with the first ones, given by id and reason."""
    share = f"none of {seen} clips" if count == seen else f"only {seen - count} of {seen} clips"
    return f"{share} could be used ({'; '.join(masked[:NAMED_CLIPS])}{'; ...' if count > NAMED_CLIPS else ''})"
