"""Train a tiny graft in one process or several, each of which takes its share of the same steps."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from graft.checkpoints.lora import LoraSettings
from graft.processor import GraftProcessor
from graft.training.backends import TrainingBatch
from graft.training.checkpoint import State
from graft.training.progress import Progress
from graft.training.stages import ComputeSettings, Stage, make_backend, open_for_stage
from tests.support.network import sent_bytes
from tests.support.training import example, filler, run_steps, step_batches, weights

LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
EVERYWHERE = LoraSettings(rank=4, alpha=8, dropout=0.1, encoder=True)
STAGES = {"stage1": Stage(1), "stage2": Stage(2, lora=LORA), "qlora": Stage(2, lora=LORA, nf4=True)}
STAGES["encoder"] = Stage(2, lora=EVERYWHERE)
STEPS, STEP_BATCHES = 3, 4


@dataclass(frozen=True)
class Case:
    """A stage trained for steps `first` to `end`, by one backend, or by several in turn, each resuming the one before.

    Backends are `torch`, `zero1`, `zero2` and `zero3`. Each process takes its share of a step's four batches, padded
    with fillers.
    """

    folder: str
    stage: str
    backends: tuple[str, ...]
    dtype: str = "fp32"
    first: int = 0
    end: int = STEPS
    begin: State | None = None
    """State after the steps before `first`."""
    lr_scales: Mapping[str, float] | None = None


def train_share(case: Case, *, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Train this process's share of the steps; returns weights, buffers, optimizer state, losses and bytes sent."""
    torch.set_num_threads(1)
    accumulation = -(-STEP_BATCHES // world_size)
    progress, state, losses, resident, sent = Progress(step=case.first), case.begin, [], 0, 0
    for leg, name in enumerate(case.backends):
        computing = (
            ComputeSettings(case.dtype, "torch")
            if name == "torch"
            else ComputeSettings(case.dtype, "deepspeed", int(name[-1]))
        )
        model, processor = open_for_stage(STAGES[case.stage], case.folder, computing)
        resident = resident_bytes(model)
        trainer = make_backend(
            model,
            computing,
            accumulation=accumulation,
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scales=case.lr_scales,
        )
        if state:
            trainer.load_state(state, step=progress.step)
        steps = range(case.first + leg, case.first + leg + 1) if len(case.backends) > 1 else range(case.first, case.end)
        share = step_share(processor, steps, rank, world_size)
        before = sent_bytes()
        progress, logs = run_steps(share, trainer, progress=progress, accumulation=accumulation, learning_rate=1e-4)
        sent += sent_bytes() - before
        state = trainer.state()
        losses += [log.loss for log in logs]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return {
        "weights": weights(model),
        "buffers": buffers,
        "state": state,
        "losses": losses,
        "resident": resident,
        "sent": sent,
    }


def resident_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of the frozen weights that this process holds."""
    held = [
        getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters() if not parameter.requires_grad
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def step_share(processor: GraftProcessor, steps: Sequence[int], rank: int, world_size: int) -> list[TrainingBatch]:
    """Select every world_size-th batch of steps of four batches of one to three clips.

    The last step ends with a filler, and so does a step that four batches do not fill.
    """
    batches: list[TrainingBatch] = []
    for step in steps:
        clips = [[example(processor, 10 * step + index) for index in range(size)] for size in (2, 1, 3, 2)]
        ends = [*clips[:3], filler(processor)] if step == STEPS - 1 else clips
        fillers = [filler(processor)] * (-STEP_BATCHES % world_size)
        batches += step_batches(processor, *ends, *fillers, first=STEP_BATCHES * step)
    return batches[rank::world_size]


def in_processes(cases: Mapping[int, Sequence[Case]], scratch: Path) -> dict[int, list[list[dict[str, Any]]]]:
    """Train cases by the number of processes joined by gloo, one case after the other.

    Returns for each number and case the results of each process. One fresh process imports what all need, then forks
    them.
    """
    torch.multiprocessing.spawn(_fork, args=(cases, str(scratch)), nprocs=1)
    return {
        count: [
            [torch.load(scratch / f"{count}-{index}-{rank}.pt") for rank in range(count)]
            for index in range(len(cases[count]))
        ]
        for count in cases
    }


def _fork(_: int, cases: Mapping[int, Sequence[Case]], scratch: str) -> None:
    if any(name.startswith("zero") for some in cases.values() for case in some for name in case.backends):
        import deepspeed  # noqa: F401

    for count in cases:
        torch.multiprocessing.start_processes(
            _join, args=(count, cases[count], scratch), nprocs=count, start_method="fork"
        )


def _join(rank: int, count: int, cases: Sequence[Case], scratch: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}  # DeepSpeed asks for them
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{scratch}/rendezvous-{count}", rank=rank, world_size=count
    )
    for index, case in enumerate(cases):
        torch.save(train_share(case, rank=rank, world_size=count), Path(scratch, f"{count}-{index}-{rank}.pt"))
    torch.distributed.destroy_process_group()
