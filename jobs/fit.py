"""What both stages share: recipe -> plan -> Ray Data and a TorchTrainer -> an output folder. The verbs are jobs.stage1 and jobs.stage2.

While it trains, an output folder holds recipe.yaml, log.txt, metrics.jsonl, checkpoints/ and, where clips were masked, skipped.jsonl; once
it is done also projector.safetensors (stage 2: the adapters too), loss.png, stage.json and, last of all, result.json.
"""

import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from graft.config import Recipe
from graft.corpus import read_rows
from graft.errors import require
from graft.model.configuration import GraftConfig
from graft.model.opening import base_graft, check_graft, write_stage
from graft.model.weights import read_projector
from graft.processor import GraftProcessor
from graft.training.checkpoint import PROGRESS_FILE, Progress, latest_checkpoint, load_checkpoint
from graft.training.plan import Plan, PlannedBatch, PlanSettings
from graft.training.tracking import draw_loss, read_metrics
from jobs.cluster import connect
from jobs.console import follow
from jobs.ingest import Delivery, plan_columns, planned_dataset
from jobs.outputs import claim_output, holds_results, write_atomic
from jobs.remote import train
from jobs.train_worker import CHECKPOINTS, FINAL, LOG_FILE, Run, Stage

RESULT_FILE = "result.json"
HOW_NOT_WHAT = frozenset({"workers", "threads_per_worker", "data_workers", "gpu", "log_every", "checkpoint_every", "keep_checkpoints"})
"""Keys that may differ when a run is taken up again: how it runs. Of these `workers` alone reaches the result: a step has more batches."""


class TrainRecipe(Recipe):
    """What both stages are told."""

    model: str
    """The graft to train: a folder written by jobs.build, or a hub id."""
    data: str | Annotated[list[str], Field(min_length=1)]
    """Parquet files, folders or globs in SpeechBrain's LargeScaleASR schema."""
    out: str
    """Folder for the results; a run that was cut off goes on from its last checkpoint."""
    seed: int = 0
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many updates."""
    token_budget: int = Field(default=8192, ge=1)
    """Tokens of one worker's batch, padding included."""
    max_batch_clips: int = Field(default=64, ge=1)
    window_row_groups: int = Field(default=16, ge=1)
    """Row groups that are read and shuffled together."""
    accumulation: int = Field(default=1, ge=1)
    """Batches of each worker to one update."""
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the frozen weights and of the arithmetic; trained weights are kept in float32."""
    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed ZeRO, or plain torch: DDP where there are several workers."""
    zero_stage: Literal[1, 2] = 2
    workers: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    data_workers: int = Field(default=2, ge=1)
    """CPU workers that decode and featurize."""
    gpu: bool = False
    """One GPU for each worker."""
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)


def fit(recipe: TrainRecipe, stage: Stage) -> dict[str, Any]:
    """Train a stage, or go on with it; returns what stands in result.json. Raises GraftError for what a user can mend."""
    out = Path(recipe.out).resolve()
    if holds_results(recipe.out, recipe, ignore=HOW_NOT_WHAT) and (out / RESULT_FILE).is_file():
        print(f"stage {stage.number}: {out} is done already")
        return json.loads((out / RESULT_FILE).read_text())
    started = time.perf_counter()
    require("ray.train", extra="train")
    check_graft(recipe.model)
    graft = base_graft(recipe.model)
    if stage.projector:
        read_projector(stage.projector, GraftConfig.from_pretrained(graft))
    processor = GraftProcessor.from_pretrained(graft)
    rows = read_rows(recipe.data)
    settings = PlanSettings(recipe.seed, recipe.epochs, recipe.token_budget, recipe.max_batch_clips, recipe.window_row_groups)
    plan = Plan(plan_columns(rows, processor), settings)
    step_batches = recipe.workers * recipe.accumulation
    checkpoint = latest_checkpoint(out / CHECKPOINTS)
    progress = load_checkpoint(checkpoint)[1] if checkpoint else Progress()
    batches, total_steps = what_is_left(plan, progress, step_batches=step_batches, max_steps=recipe.max_steps)
    claim_output(recipe.out, recipe, ignore=HOW_NOT_WHAT)  # now that nothing in it can be wrong
    hours = rows.duration_s.sum() / 3600
    print(f"stage {stage.number}: {len(rows)} clips, {hours:.2f} h, {total_steps} steps, padding {plan.padding_waste():.1%}", flush=True)
    if progress.step < total_steps:
        connect()
        filler_row = int(plan.columns.token_counts.argmin())
        dataset = planned_dataset(Delivery(rows, batches, filler_row, processor=graft), data_workers=recipe.data_workers)
        run = Run(recipe.model_dump(), stage, graft, str(out), str(checkpoint) if checkpoint else None, total_steps)
        _train(recipe, run, dataset)
    return _finish(out, graft, stage, seconds=time.perf_counter() - started)


def what_is_left(plan: Plan, progress: Progress, *, step_batches: int, max_steps: int | None) -> tuple[list[PlannedBatch], int]:
    """List what is still to be delivered, and count the updates at its end: other workers than before make other steps of it."""
    batches = plan.delivery(position=progress.position, step_batches=step_batches)
    steps = len(batches) // step_batches
    if max_steps is not None:
        steps = min(steps, max(0, max_steps - progress.step))
    return batches[: steps * step_batches], progress.step + steps


def _train(recipe: TrainRecipe, run: Run, dataset: Any) -> None:
    import ray.train
    from ray.data import ExecutionOptions
    from ray.train.torch import TorchTrainer

    resources = {"CPU": 1.0, **({"GPU": 1.0} if recipe.gpu else {})}
    trainer = TorchTrainer(
        train,
        train_loop_config={"run": pickle.dumps(run)},
        scaling_config=ray.train.ScalingConfig(num_workers=recipe.workers, use_gpu=recipe.gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(name=f"attempt-{time.time_ns()}", storage_path=str(Path(run.out, "ray"))),
        datasets={"train": dataset},
        dataset_config=ray.train.DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    with follow(Path(run.out, LOG_FILE)):
        trainer.fit()
    shutil.rmtree(Path(run.out, "ray"), ignore_errors=True)


def _finish(out: Path, graft: str, stage: Stage, *, seconds: float) -> dict[str, Any]:
    """Give what the worker left its final names; result.json comes last and says that all is there."""
    if (out / FINAL).is_dir():  # it is gone where a run was cut off after this
        for path in (out / FINAL).iterdir():
            path.replace(out / path.name)
        (out / FINAL).rmdir()
    write_stage(out, stage=stage.number, graft=graft)
    draw_loss(out, title=f"stage {stage.number}")
    lines = read_metrics(out)
    progress = json.loads((out / PROGRESS_FILE).read_text())
    result = {
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "steps": lines[-1]["step"],
        "clips": progress["clips"],
        "audio_s": progress["audio_s"],
        "seconds": seconds,
    }
    write_atomic(out / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    print(f"stage {stage.number}: loss {result['loss_first']:.3f} -> {result['loss_last']:.3f} in {seconds:.0f} s, see {out}", flush=True)
    return result
