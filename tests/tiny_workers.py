"""Training on a tiny graft in one process or several, each of which takes its share of the same steps."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from tiny_training import example, filler, run_steps, step_batches, weights

from graft.model.adapters import LoraSettings
from graft.processor import GraftProcessor
from graft.training.backends import Backend, DeepSpeedBackend, TorchBackend
from graft.training.checkpoint import Progress
from graft.training.loop import TrainingBatch
from jobs.train_worker import Stage, stage_model

LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
STAGES = {"stage1": Stage(1), "stage2": Stage(2, lora=LORA), "qlora": Stage(2, lora=LORA, nf4=True)}
STEPS, STEP_BATCHES = 3, 4


@dataclass(frozen=True)
class Case:
    """A stage trained for three steps: by one backend, or by three, each of which takes over the state of the one before."""

    folder: str
    stage: str
    backends: tuple[str, ...]
    dtype: torch.dtype = torch.float32


def train_share(case: Case, *, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Train this process's share of the steps; returns weights, optimizer state and losses."""
    torch.set_num_threads(1)
    accumulation = STEP_BATCHES // world_size
    progress, state, losses = Progress(), None, []
    for leg, backend in enumerate(case.backends):
        model, processor = stage_model(STAGES[case.stage], case.folder, dtype=case.dtype, device="cpu", seed=0)
        trainer = make_backend(backend, model.train(), case.dtype, accumulation)
        if state:
            trainer.load_state(state, step=progress.step)
        share = step_share(processor, range(leg, leg + 1) if len(case.backends) > 1 else range(STEPS), rank, world_size)
        progress, logs = run_steps(share, trainer, progress=progress, accumulation=accumulation, learning_rate=1e-4)
        state = trainer.state()
        losses += [log.loss for log in logs]
    return {"weights": weights(model), "state": state, "losses": losses}


def make_backend(name: str, model: torch.nn.Module, dtype: torch.dtype, accumulation: int) -> Backend:
    settings = {"weight_decay": 0.01, "max_grad_norm": 1.0}
    if name == "torch":
        return TorchBackend(model, **settings)
    bf16 = dtype == torch.bfloat16
    return DeepSpeedBackend(model, zero_stage=int(name.removeprefix("zero")), accumulation=accumulation, bf16=bf16, **settings)


def step_share(processor: GraftProcessor, steps: Sequence[int], rank: int, world_size: int) -> list[TrainingBatch]:
    """Every world_size-th batch of steps of four batches of one to three clips; a filler ends the last step."""
    batches: list[TrainingBatch] = []
    for step in steps:
        clips = [[example(processor, 10 * step + index) for index in range(size)] for size in (2, 1, 3, 2)]
        ends = [*clips[:3], filler(processor)] if step == STEPS - 1 else clips
        batches += step_batches(processor, *ends, first=STEP_BATCHES * step)
    return batches[rank::world_size]


def in_processes(count: int, cases: Sequence[Case], scratch: Path) -> list[list[dict[str, Any]]]:
    """Train the cases one after the other in `count` processes joined by gloo; returns, for each case, what each process has at the end."""
    torch.multiprocessing.spawn(_join, args=(count, cases, str(scratch)), nprocs=count)
    return [[torch.load(scratch / f"{rank}-{index}.pt") for rank in range(count)] for index in range(len(cases))]


def _join(rank: int, count: int, cases: Sequence[Case], scratch: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}  # DeepSpeed asks for them
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=count)
    for index, case in enumerate(cases):
        torch.save(train_share(case, rank=rank, world_size=count), Path(scratch, f"{rank}-{index}.pt"))
    torch.distributed.destroy_process_group()
