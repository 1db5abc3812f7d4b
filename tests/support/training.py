"""Make the batches of training steps on tiny models, without a plan or Ray."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graft.audio.clip import read_audio
from graft.processor import Example, GraftProcessor
from graft.training.backends import Backend, TrainingBatch
from graft.training.loop import LoopSettings, Observer, ValidationResult, train
from graft.training.meter import StepLog
from graft.training.plan import Batches, PlannedBatch
from graft.training.progress import Progress
from jobs.training.loader import BatchLoader
from tests.support.speech_corpus import flac

TEXTS = ("Yes.", "No, thanks", "one two", "GO ON", "please hold")


def example(processor: GraftProcessor, seed: int) -> Example:
    return processor.example(read_audio(flac(0.2 + 0.05 * (seed % 7), seed)), TEXTS[seed % len(TEXTS)])


def filler(processor: GraftProcessor) -> list[Example]:
    one = example(processor, 0)
    return [Example(one.features, one.prompt_ids, [])]


def step_batches(processor: GraftProcessor, *batches: Sequence[Example], first: int = 0) -> list[TrainingBatch]:
    """Make one step of the plan, after `first` real batches; a batch without targets is a filler."""
    label_count = sum(len(one.target_ids) for batch in batches for one in batch)
    end = first + sum(any(one.target_ids for one in batch) for batch in batches)
    return [
        TrainingBatch(
            inputs={name: torch.from_numpy(value) for name, value in processor.training_batch(batch).items()},
            position=min(first + index + 1, end),
            step_position=end,
            step_label_count=label_count,
            ids=tuple("clip" for one in batch if one.target_ids),
            clip_count=sum(bool(one.target_ids) for one in batch),
            token_count=sum(len(one.prompt_ids + one.target_ids) for one in batch),
            audio_s=float(any(one.target_ids for one in batch)),
        )
        for index, batch in enumerate(batches)
    ]


def batches_after(batches: Batches, position: int) -> Batches:
    """Return the batches that remain after `position` real ones, which must end a step."""
    return batches[int(np.searchsorted(batches.step_positions, position, side="right")) :]


def load(loader: BatchLoader, planned: PlannedBatch) -> dict[str, np.ndarray]:
    """Read and make any batch of a loader's rows."""
    (batch,) = loader.reader.read([planned])
    return loader.arrays(batch)


def clip_steps(processor: GraftProcessor, *, steps: int, size: int = 2) -> list[TrainingBatch]:
    """Make steps of one batch each, with other clips in every step."""
    clips = [[example(processor, step * size + index) for index in range(size)] for step in range(steps)]
    return [batch for step, one in enumerate(clips) for batch in step_batches(processor, one, first=step)]


class Recorder(Observer):
    """Records a run's events.

    `losses` are the losses of its validations, or their metrics, in order; those named `monitor` choose the best. The
    run wants to stop after `stop_after` steps.
    """

    def __init__(
        self,
        losses: Sequence[float | dict[str, float]] = (),
        stop_after: int | None = None,
        monitor: str = "validation_loss",
    ) -> None:
        self.logs: list[StepLog] = []
        self.checkpoints: list[tuple[Progress, bool]] = []
        self.faults: list[tuple[list[int], str]] = []
        self.losses = list(losses)
        self.stop_after, self.monitor = stop_after, monitor
        self.asked = 0

    def log(self, log: StepLog) -> None:
        self.logs.append(log)

    def validate(self, step: int) -> ValidationResult:
        found = self.losses.pop(0)
        return ValidationResult(found if isinstance(found, dict) else {self.monitor: found}, self.monitor)

    def checkpoint(self, progress: Progress, *, is_last: bool) -> None:
        self.checkpoints.append((progress, progress.step == progress.best_step))

    def wants_stop(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_after

    def fault(self, batches: Sequence[TrainingBatch], reason: str) -> None:
        self.faults.append(([batch.position for batch in batches], reason))


def run_steps(
    batches: Sequence[TrainingBatch],
    backend: Backend,
    *,
    progress: Progress | None = None,
    total_steps: int | None = None,
    observer: Recorder | None = None,
    **settings: Any,
) -> tuple[Progress, list[StepLog]]:
    """Train on all batches, logging every step."""
    chosen = LoopSettings(**{"learning_rate": 1e-3, "schedule": "constant", "log_every": 1, **settings})
    progress, observer = progress or Progress(), observer or Recorder()
    total_steps = total_steps or progress.step + len(batches) // chosen.accumulation
    return train(batches, backend, chosen, progress=progress, total_steps=total_steps, observer=observer), observer.logs


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)
