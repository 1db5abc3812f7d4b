"""The batches of training steps on tiny models, without a plan or Ray."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_speech import flac

from graft.audio import read_audio
from graft.processor import Example, GraftProcessor
from graft.training.backends import Backend
from graft.training.checkpoint import Progress
from graft.training.loop import LoopSettings, StepLog, TrainingBatch, train

TEXTS = ("Yes.", "No, thanks", "one two", "GO ON", "please hold")


def example(processor: GraftProcessor, seed: int) -> Example:
    return processor.example(read_audio(flac(0.2 + 0.05 * (seed % 7), seed)), TEXTS[seed % len(TEXTS)])


def filler(processor: GraftProcessor) -> list[Example]:
    one = example(processor, 0)
    return [Example(one.features, one.prompt_ids, [])]


def step_batches(processor: GraftProcessor, *batches: Sequence[Example], first: int = 0) -> list[TrainingBatch]:
    """One step of the plan; a batch without targets is a filler. `first` real batches lie behind it."""
    label_count = sum(len(one.target_ids) for batch in batches for one in batch)
    end = first + sum(any(one.target_ids for one in batch) for batch in batches)
    return [
        TrainingBatch(
            inputs={name: torch.from_numpy(value) for name, value in processor.training_batch(batch).items()},
            position=min(first + index + 1, end),
            step_position=end,
            step_label_count=label_count,
            clip_count=sum(bool(one.target_ids) for one in batch),
            audio_s=float(any(one.target_ids for one in batch)),
        )
        for index, batch in enumerate(batches)
    ]


def clip_steps(processor: GraftProcessor, *, steps: int, size: int = 2) -> list[TrainingBatch]:
    """Steps of one batch each, of other clips every time."""
    clips = [[example(processor, step * size + index) for index in range(size)] for step in range(steps)]
    return [batch for step, one in enumerate(clips) for batch in step_batches(processor, one, first=step)]


def run_steps(
    batches: Sequence[TrainingBatch],
    backend: Backend,
    *,
    progress: Progress | None = None,
    total_steps: int | None = None,
    on_checkpoint: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> tuple[Progress, list[StepLog]]:
    """Train on all batches, logging every step."""
    chosen = LoopSettings(**{"learning_rate": 1e-3, "schedule": "constant", "log_every": 1, **settings})
    progress = progress or Progress()
    total_steps = total_steps or progress.step + len(batches) // chosen.accumulation
    logs: list[StepLog] = []
    done = train(batches, backend, chosen, progress=progress, total_steps=total_steps, on_log=logs.append, on_checkpoint=on_checkpoint)
    return done, logs


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)
