"""Run a training worker of either stage inside Ray's TorchTrainer: model, backend, preflight, training loop.

Ray restarts all workers when one of them or its node dies; they resume from the newest checkpoint.
"""

import contextlib
import itertools
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import DistError

from graft.checkpoints.loading import multiplies_bf16
from graft.errors import GraftError, ModelError
from graft.model.configuration import AnyGraftConfig
from graft.model.ctc import CtcPrealignment
from graft.model.modeling import AnyGraft
from graft.processor import GraftProcessor
from graft.storage.atomic import write_atomic
from graft.training.backends import Backend, TrainingBatch, trainable_parameters, trained_part
from graft.training.checkpoint import load_checkpoint
from graft.training.devices import device_peak_flops
from graft.training.encoder_cache import CachingEncoder, EncoderCache
from graft.training.estimate import batch_flops
from graft.training.loop import LoopSettings, is_finished, naming_clips, train
from graft.training.preflight import check_labels, preflight
from graft.training.progress import latest_checkpoint, read_progress
from graft.training.stages import ComputeSettings, Stage, make_backend, open_for_stage, trainable_module

from .loader import LoaderSpec, prefetch, training_batches
from .observer import CHECKPOINTS, RunObserver
from .ray_dataset import iter_blocks
from .validation import Validation

FAULT_FILE = "fault.json"


class StaleCheckpoint(RuntimeError):
    """The batches that a worker gets begin elsewhere than its checkpoint: workers were restarted meanwhile."""


_RAISED_IN_GLOO = re.compile(r"\bgloo/\w+")  # a source file: gloo raises a plain RuntimeError


@dataclass(frozen=True)
class Run:
    """All that a worker needs to know. `recipe` is a resolved TrainRecipe as plain values."""

    recipe: dict[str, Any]
    stage: Stage
    computing: ComputeSettings
    settings: LoopSettings
    graft: str
    out: str
    total_steps: int
    validation: Mapping[str, LoaderSpec] = field(default_factory=dict)
    """Validation sets by name; the name of a single one may be ""."""
    encoder_cache: EncoderCache | None = None


def work(run: Run) -> None:
    """Train on this worker's share of the batches; every worker calls it once."""
    import ray.train
    from ray.train.torch import get_device

    out, device = Path(run.out), get_device()
    newest = [latest_checkpoint(out / CHECKPOINTS)]
    torch.distributed.broadcast_object_list(newest, src=0)  # a shared file system may show others an older state
    (checkpoint,) = newest
    peak_flops = device_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    settings = replace(run.settings, peak_flops=peak_flops)
    progress = read_progress(checkpoint)
    if (out / FAULT_FILE).is_file() or is_finished(progress, settings, run.total_steps):
        return  # the fault would happen again, or Ray restarted workers that were finished
    torch.set_num_threads(run.recipe["threads_per_worker"])
    with _record_faults(out):
        graft, processor = open_for_stage(run.stage, run.graft, run.computing, device=device, seed=run.recipe["seed"])
        model = trainable_module(graft, run.stage, run.computing, processor)
        del graft  # frees the language model where CTC pre-alignment does not use it
        limits = {name: run.recipe[name] for name in ("weight_decay", "max_grad_norm")}
        rates = {part: rate for part, rate in run.recipe.get("learning_rates", {}).items() if rate is not None}
        scales = {part: rate / settings.learning_rate for part, rate in rates.items()}
        backend = make_backend(model, run.computing, accumulation=settings.accumulation, lr_scales=scales, **limits)
        sets = {name: _validation(run, name, backend, processor) for name in run.validation}
        observer = RunObserver(run.recipe, out, backend, from_step=progress.step, sets=sets)
        if run.computing.dtype == "bf16" and not multiplies_bf16(device):
            observer.say("this processor has no fast bf16: dtype=fp32 takes a fraction of the time")
        if rates:
            parts = ", ".join(
                f"{part} {rates.get(part, settings.learning_rate):.2e}" for part in _trained_parts(backend)
            )
            observer.say(f"learning rates: {parts}, each with the schedule of learning_rate")
        if checkpoint:
            backend.load_state(load_checkpoint(checkpoint)[0], step=progress.step)
            observer.say(f"going on at step {progress.step}, batch {progress.position} of the plan")
        encoder = CachingEncoder(model, run.encoder_cache) if run.encoder_cache else None
        cost = _make_flop_counter(run, model.config)
        batches = prefetch(
            training_batches(
                iter_blocks(ray.train.get_dataset_shard("train")), device, observer.skipped, encoder=encoder, cost=cost
            )
        )
        first = next(batches)
        if first.position != min(progress.position + ray.train.get_context().get_world_rank() + 1, first.step_position):
            raise StaleCheckpoint(f"batch {first.position} does not follow the checkpoint at {progress.position}")
        if progress.step == 0 and first.ids:  # neither a filler nor a batch of masked clips
            with naming_clips([first], observer):
                line = _preflight_line(model, backend, first, processor, token_noise=run.recipe["token_noise"] > 0)
            observer.say(line)
        train(
            itertools.chain([first], batches),
            backend,
            settings,
            progress=progress,
            total_steps=run.total_steps,
            observer=observer,
        )
        observer.close()
        if encoder:
            encoder.close()


def _trained_parts(backend: Backend) -> dict[str, None]:
    return dict.fromkeys(map(trained_part, trainable_parameters(backend.model)))


def _validation(run: Run, name: str, backend: Backend, processor: GraftProcessor) -> Validation:
    """Load a validation set. Raises DataError where too many of its clips cannot be read."""
    return Validation(
        run.validation[name],
        backend,
        processor,
        samples=max(run.recipe["validation"][count] for count in ("transcripts", "wer_clips")),
        is_sharded=run.computing.is_sharded,
        max_masked=run.settings.max_masked,
        key=f"validation.data.{name}" if name else "validation.data",
    )


def _preflight_line(
    model: AnyGraft | CtcPrealignment,
    backend: Backend,
    batch: TrainingBatch,
    processor: GraftProcessor,
    *,
    token_noise: bool,
) -> str:
    """Check the first batch; returns the line to log. CTC pre-alignment starts at zero: only labels are checked."""
    end = processor.prompt_end_ids()
    if isinstance(model, CtcPrealignment):
        return (
            f"preflight: {check_labels(batch.inputs['input_ids'], batch.inputs['labels'], end)} labels, all in answers"
        )
    with backend.evaluating():
        change, label_count = preflight(model, batch.model_inputs(), end, token_noise=token_noise)
    return f"preflight: other audio changes the logits by {change:.2g}; {label_count} labels, all in answers"


def _make_flop_counter(run: Run, config: AnyGraftConfig) -> Callable[[Mapping[str, np.ndarray]], float]:
    """Make the function that computes a block's FLOPs, from which the log computes the device's utilisation."""
    lora = run.stage.lora
    is_ctc = run.stage.letters is not None

    def cost(block: Mapping[str, np.ndarray]) -> float:
        frame_counts = block["audio_frame_counts"][0]
        if "cached_token_counts" in block:
            found = json.loads(str(block["cached_token_counts"][0]))
            frame_counts = [count for count, tokens in zip(frame_counts, found, strict=True) if tokens is None]
        return batch_flops(
            config,
            token_counts=[] if is_ctc else block["attention_mask"][0].sum(axis=1),
            label_count=0 if is_ctc else int((block["labels"][0] != -100).sum()),
            frame_counts=frame_counts,
            lora_rank=lora.rank if lora else None,
            lora_encoder=bool(lora and lora.encoder),
            gradient_checkpointing=run.computing.gradient_checkpointing,
        )

    return cost


@contextlib.contextmanager
def _record_faults(out: Path) -> Iterator[None]:
    """Write a fault that would happen again to FAULT_FILE, for the driver and for restarted workers.

    These are bugs and errors that a user can correct, but not what happens to a worker because another one died.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        where = " ".join(["the device's memory ran out", *getattr(error, "__notes__", [])])
        reason = f"{where}: lower token_budget, set gradient_checkpointing=true, or raise zero_stage"
        write_atomic(out / FAULT_FILE, json.dumps({"error": reason}) + "\n")
        raise ModelError(reason) from error
    except GraftError as error:
        write_atomic(out / FAULT_FILE, json.dumps({"error": str(error)}) + "\n")
        raise
    except Exception as error:
        if not _is_met_where_others_died(error):
            write_atomic(out / FAULT_FILE, json.dumps({"bug": traceback.format_exc()}) + "\n")
        raise


def _is_met_where_others_died(error: Exception) -> bool:
    from ray.exceptions import RayError

    if type(error) is RuntimeError:
        return _RAISED_IN_GLOO.search(str(error)) is not None
    return isinstance(error, DistError | RayError | ConnectionError | TimeoutError | StaleCheckpoint)
