"""What every training worker of both stages runs inside Ray's TorchTrainer: model, backend, preflight, loop, files."""

import functools
import itertools
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graft.model.adapters import LoraSettings, add_adapters, save_adapters
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.opening import DTYPES, open_graft
from graft.model.weights import load_projector, save_projector
from graft.processor import GraftProcessor
from graft.training.backends import Backend, DeepSpeedBackend, State, TorchBackend
from graft.training.checkpoint import PROGRESS_FILE, Progress, load_checkpoint, write_checkpoint
from graft.training.loop import LoopSettings, StepLog, train
from graft.training.preflight import preflight
from graft.training.tracking import MetricsLog
from jobs.ingest import training_batches

CHECKPOINTS = "checkpoints"
FINAL = ".final"
LOG_FILE = "log.txt"
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True)
class Stage:
    """What sets a stage apart: adapters or none, a quantized base or not, and the projector it starts from."""

    number: int
    lora: LoraSettings | None = None
    nf4: bool = False
    projector: str | None = None


@dataclass(frozen=True)
class Run:
    """All that a worker needs to know; `recipe` is a resolved TrainRecipe as plain values."""

    recipe: dict[str, Any]
    stage: Stage
    graft: str
    out: str
    checkpoint: str | None
    total_steps: int


def work(run: Run) -> None:
    """Train on this worker's share of the plan; every worker calls it once."""
    import ray.train
    from ray.train.torch import get_device

    recipe, out, device = run.recipe, Path(run.out), get_device()
    is_first = ray.train.get_context().get_world_rank() == 0
    say = functools.partial(_say, out if is_first else None)
    torch.set_num_threads(recipe["threads_per_worker"])
    model, processor = stage_model(run.stage, run.graft, dtype=DTYPES[recipe["dtype"]], device=device, seed=recipe["seed"])
    backend = make_backend(recipe, model)
    progress = Progress()
    if run.checkpoint:
        state, progress = load_checkpoint(run.checkpoint)
        backend.load_state(state, step=progress.step)
        say(f"going on at step {progress.step}, batch {progress.position} of the plan")
    skipped: list[dict[str, str]] = []
    blocks = ray.train.get_dataset_shard("train").iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
    batches = training_batches(blocks, device, skipped)
    first = next(batches)
    model.train()
    if progress.step == 0 and bool((first.inputs["labels"] != -100).any()):  # not a filler, nor clips that were all masked
        result = preflight(model, first.inputs, processor.prompt_end_ids())
        say(f"preflight: other audio changes the logits by {result.logit_change:.2g}; {result.label_count} labels, all in answers")
    metrics = MetricsLog(out, from_step=progress.step) if is_first else None

    def on_log(log: StepLog) -> None:
        if metrics:
            metrics.write(asdict(log))
            say(log.line())
        _append_skipped(out, skipped)

    def on_checkpoint(done: Progress) -> None:
        state = backend.state()  # gathered from all workers
        if is_first and done.step == run.total_steps:
            _write_final(model, state, out / FINAL, done)
        if is_first:
            write_checkpoint(out / CHECKPOINTS, state, done, keep=recipe["keep_checkpoints"])

    train(
        itertools.chain([first], batches),
        backend,
        LoopSettings(**{name: recipe[name] for name in LoopSettings.__dataclass_fields__}),
        progress=progress,
        total_steps=run.total_steps,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
    )


def stage_model(
    stage: Stage, graft: str, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    """Open the graft for a stage: its projector in place, everything frozen but what the stage trains, which is in float32."""
    model, processor = open_graft(graft, dtype=dtype, device=device, nf4=stage.nf4)
    model.audio_projector.float()  # before it is loaded, lest `dtype` round it
    if stage.projector:
        load_projector(model, stage.projector)
    model.requires_grad_(False)
    if stage.lora:
        torch.manual_seed(seed)
        add_adapters(model, stage.lora)
    model.audio_projector.requires_grad_(True)
    return model, processor


def make_backend(recipe: dict[str, Any], model: GraftForConditionalGeneration) -> Backend:
    """Make the backend that a recipe names."""
    shared = {"weight_decay": recipe["weight_decay"], "max_grad_norm": recipe["max_grad_norm"]}
    if recipe["backend"] == "torch":
        return TorchBackend(model, **shared)
    bf16 = recipe["dtype"] == "bf16"
    return DeepSpeedBackend(model, zero_stage=recipe["zero_stage"], accumulation=recipe["accumulation"], bf16=bf16, **shared)


@torch.no_grad()
def _write_final(model: GraftForConditionalGeneration, state: State, folder: Path, progress: Progress) -> None:
    """Write the stage's results with float32 weights, whatever precision they were trained in."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.data = state[name]["weight"].to(parameter.device)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_projector(model, folder)
    if getattr(model, "peft_config", None):
        save_adapters(model, folder)
    (folder / PROGRESS_FILE).write_text(json.dumps(asdict(progress)) + "\n")


def _say(out: Path | None, line: str) -> None:
    """Add a line to the run's log, which the driver prints as it grows; without a folder, as on all workers but the first, do nothing."""
    if out:
        with (out / LOG_FILE).open("a") as file:
            file.write(line + "\n")


def _append_skipped(out: Path, skipped: list[dict[str, str]]) -> None:
    """List clips that were masked, each once however many epochs and resumptions meet it, and forget them."""
    path = out / SKIPPED_FILE
    listed = set(path.read_text().splitlines()) if path.is_file() else set()
    if new := [line for line in dict.fromkeys(map(json.dumps, skipped)) if line not in listed]:
        with path.open("a") as file:
            file.writelines(line + "\n" for line in new)
        _say(out, f"{len(new)} clips could not be decoded and do not count, see {SKIPPED_FILE}")
    skipped.clear()
