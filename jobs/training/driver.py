"""Run a training stage: recipe -> plan -> Ray Data and a TorchTrainer -> an output folder.

While it trains, an output folder holds recipe.yaml, log.txt, metrics.jsonl, checkpoints/ and, where clips are left out
or masked, left_out.jsonl and skipped.jsonl; once it is done also projector.safetensors (stage 2: the adapters too),
curves.png, stage.json and, last of all, result.json.
"""

import contextlib
import json
import math
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from graft.checkpoints.loading import base_checkpoint, check_graft, write_stage
from graft.checkpoints.lora import save_adapters
from graft.checkpoints.projector_file import encoder_digest, read_projector, write_projector
from graft.config import recipe_values
from graft.data.dataset import RowTable
from graft.errors import GraftError, OutputError, RecipeError, require
from graft.model.configuration import AnyGraftConfig, read_graft_config
from graft.processor import GraftProcessor, read_graft_processor
from graft.storage.atomic import write_atomic
from graft.text.instructions import trained_instructions
from graft.training.checkpoint import AVERAGE_FOLDER, load_checkpoint
from graft.training.encoder_cache import EncoderCache, open_cache
from graft.training.loop import LoopSettings, is_finished
from graft.training.plan import Plan
from graft.training.progress import Progress, best_checkpoint, latest_checkpoint, read_progress, write_progress
from graft.training.stages import ComputeSettings, Stage
from graft.training.tracking import draw_curves

from ..common.cli import STOPPED
from ..common.cluster import connect
from ..common.console import follow
from ..common.outputs import claim_output, held_recipe, holds_results, locked_output
from .batches import (
    LEFT_OUT_FILE,
    ROWS,
    LeftOutRows,
    cached_rows,
    check_plan,
    plan_run,
    remaining_batches,
    validation_specs,
)
from .data_workers import (
    CPU_LOADERS,
    DataWorkers,
    choose_data_workers,
    fit_cluster,
    flops_per_audio_s,
    gpu_name,
)
from .loader import LoaderSpec
from .observer import AVERAGE_FILE, CHECKPOINTS, LOG_FILE, STOP_FILE
from .ray_dataset import DataStep, LoadBatches, ReadWindows, RemainingBatches
from .ray_entry import ordered_data_config, run_worker
from .recipe import EXECUTION_KEYS, LONGER_RUN_KEYS, TrainRecipe
from .samples import check_ctc_lengths, choose_letters, most_tokens_per_s
from .worker import FAULT_FILE, Run

RESULT_FILE = "result.json"


def fit(recipe: TrainRecipe, stage: Stage) -> dict[str, Any]:
    """Train a stage, or resume it; returns the content of result.json.

    A recipe with more epochs or steps than that of the folder goes on where that one ended, or stands. Raises
    GraftError for what a user can correct, and SystemExit(143) after a SIGTERM, when everything is saved.
    """
    out = Path(recipe.out).resolve()
    goes_on = _shorter_recipe(recipe) is not None
    if not goes_on and holds_results(recipe.out, recipe, ignore=EXECUTION_KEYS) and (out / RESULT_FILE).is_file():
        print(f"stage {stage.number}: {out} is done already")
        return json.loads((out / RESULT_FILE).read_text())
    with locked_output(recipe.out):
        return _fit(recipe, stage, out)


def _shorter_recipe(recipe: TrainRecipe) -> TrainRecipe | None:
    """Return the recipe of the output folder where this one only has more epochs or steps; otherwise None.

    Raises OutputError where other keys differ, too.
    """
    held = held_recipe(recipe.out, type(recipe))
    if held is None or not recipe.is_longer_than(held):
        return None
    holds_results(recipe.out, recipe, ignore=EXECUTION_KEYS | LONGER_RUN_KEYS)
    return held


def _fit(recipe: TrainRecipe, stage: Stage, out: Path) -> dict[str, Any]:
    shorter = _shorter_recipe(recipe)
    started = time.perf_counter()
    require("ray.train", extra="train")
    check_graft(recipe.model)
    graft = base_checkpoint(recipe.model)
    config = read_graft_config(graft)
    if stage.projector:
        read_projector(stage.projector, config)
    processor = read_graft_processor(graft)
    computing = ComputeSettings(**{name: getattr(recipe, name) for name in ComputeSettings.__dataclass_fields__})
    left_out = LeftOutRows()
    with cached_rows(out) as cache_folder:
        rows, variation, plan = plan_run(recipe, processor, cache=cache_folder, left_out=left_out)
        spelled: dict[str, Any] = {}
        if stage.letters is not None:
            check_ctc_lengths(rows, processor)
            letters, share = choose_letters(rows, processor, stage.letters)
            stage = replace(stage, letters=letters)
            spelled = {"letters": letters, "spelled_share": share}
            print(f"stage {stage.number}: CTC spells {share:.1%} of the texts with {len(letters)} letters", flush=True)
        progress = read_progress(latest_checkpoint(out / CHECKPOINTS))
        batches, total_steps = remaining_batches(plan, progress, recipe)
        _check_average(recipe, total_steps - (progress.schedule_start if shorter is None else progress.step))
        validation = validation_specs(recipe, graft, processor, left_out)
        cache = _encoder_cache(recipe, stage, config, graft, processor, is_sharded=computing.is_sharded)
        if shorter is not None:
            check_plan(out, plan)
            progress = _go_on(out, recipe, shorter, progress, total_steps, stage)
        ignore = EXECUTION_KEYS | (LONGER_RUN_KEYS if shorter is not None else frozenset())
        claim_output(recipe.out, recipe, ignore=ignore)  # only now: a wrong recipe leaves no folder
    check_plan(out, plan)
    left_out.write(out / LEFT_OUT_FILE)
    planned_s = np.delete(rows.duration_s, plan.left_out[plan.left_out < len(rows)])
    print(
        f"stage {stage.number}: {len(planned_s)} clips, {planned_s.sum() / 3600:.2f} h, "
        f"{total_steps} steps, padding {plan.padding_waste():.1%}",
        flush=True,
    )
    names = ["learning_rate", "schedule", "warmup_steps", "accumulation", "seed", "log_every", "checkpoint_every"]
    names += ["max_masked"]
    settings = LoopSettings(
        **{name: getattr(recipe, name) for name in names},
        # CTC's loss grows with the audio tokens, of which there are many per label.
        max_loss=math.inf if stage.letters else recipe.max_loss,
        validate_every=recipe.validation.every if recipe.validation else None,
        patience=recipe.validation.patience if recipe.validation else None,
    )
    if not is_finished(progress, settings, total_steps):
        is_given = recipe.data_workers != "auto"
        connect(cpus=recipe.workers + (int(recipe.data_workers) if is_given else CPU_LOADERS))
        if not is_given:
            chosen = _choose_data_workers(recipe, stage, config, rows, plan)
            print(f"stage {stage.number}: data_workers={chosen.count}, {chosen.reason}", flush=True)
            recipe = recipe.model_copy(update={"data_workers": chosen.count})
        windows = plan.epochs[0].window_count
        spec = LoaderSpec(
            rows,
            batches,
            graft,
            variation,
            encoder_cache=cache,
            epoch_windows=windows,
            token_budget=recipe.token_budget,
        )
        run = Run(
            recipe_values(recipe),
            stage,
            computing,
            settings,
            graft,
            str(out),
            total_steps,
            validation,
            cache,
        )
        _train(recipe, run, spec)
        progress = read_progress(latest_checkpoint(out / CHECKPOINTS))
    if not is_finished(progress, settings, total_steps):
        print(
            f"stage {stage.number}: stopped at step {progress.step} and saved: give the same command again to go on",
            flush=True,
        )
        raise SystemExit(STOPPED)
    words = None if recipe.words.is_default else trained_instructions(recipe.words, rows.languages)
    seconds, tokens_per_s = time.perf_counter() - started, most_tokens_per_s(rows, plan)
    return _finish(
        out, config, stage, graft=graft, words=words, seconds=seconds, spelled=spelled, tokens_per_s=tokens_per_s
    )


def _check_average(recipe: TrainRecipe, steps: int) -> None:
    """Raise RecipeError where a run of so many steps has too few checkpoints for the average."""
    needed = (recipe.average_checkpoints - 1) * recipe.checkpoint_every + 1
    if recipe.average_checkpoints > 1 and steps < needed:
        raise RecipeError(
            f"average_checkpoints={recipe.average_checkpoints} and checkpoint_every={recipe.checkpoint_every} need "
            f"{needed:,} steps, and the run has {steps:,}: lower one of them"
        )


def _go_on(
    out: Path, recipe: TrainRecipe, shorter: TrainRecipe, progress: Progress, total_steps: int, stage: Stage
) -> Progress:
    """Let a run go on with more epochs or steps, with its schedule begun anew; returns the progress to start from.

    What is done twice, where a run is killed in between, changes nothing. Raises OutputError without a checkpoint of a
    finished run, and RecipeError where no step is added.
    """
    checkpoint = latest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:
        if (out / RESULT_FILE).is_file():
            raise OutputError(f"{out} can't go on, because its checkpoints are gone: train its result in another out=")
        return progress
    said = [
        f"{key} {_written(old)} -> {_written(new)}"
        for key in ("epochs", "max_steps")
        if (old := getattr(shorter, key)) != (new := getattr(recipe, key))
    ]
    if total_steps <= progress.step:
        raise RecipeError(f"{', '.join(said)} adds no step to the {progress.step} that {out} has: raise the other one")
    progress = replace(progress, schedule_start=progress.step, stale_validations=0)
    write_progress(checkpoint, progress)
    (out / RESULT_FILE).unlink(missing_ok=True)
    decay = "constant" if recipe.schedule == "constant" else f"with a {recipe.schedule} decay to zero"
    line = (
        f"stage {stage.number}: going on from step {progress.step} to {total_steps} ({', '.join(said)}); the schedule "
        f"starts anew there: {recipe.warmup_steps} steps of warm-up to {recipe.learning_rate:g}, then {decay}"
    )
    print(line, flush=True)
    with (out / LOG_FILE).open("a") as log:
        log.write(f"{line}\n")
    return progress


def _written(value: int | None) -> str:
    return "null" if value is None else str(value)


def _choose_data_workers(
    recipe: TrainRecipe, stage: Stage, config: AnyGraftConfig, rows: RowTable, plan: Plan
) -> DataWorkers:
    """Choose the loaders for the GPUs that the cluster has."""
    import ray

    resources = ray.cluster_resources()
    cost = flops_per_audio_s(
        config,
        rows,
        plan,
        lora=stage.lora,
        is_ctc=stage.letters is not None,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    wanted = choose_data_workers(
        flops_per_audio_s=cost,
        workers=recipe.workers,
        device=gpu_name(resources) if recipe.gpu else None,
        augment=recipe.augment,
    )
    return fit_cluster(wanted, resources, workers=recipe.workers, gpu=recipe.gpu, resource=recipe.data_resource)


def _encoder_cache(
    recipe: TrainRecipe,
    stage: Stage,
    config: AnyGraftConfig,
    graft: str,
    processor: GraftProcessor,
    *,
    is_sharded: bool,
) -> EncoderCache | None:
    """Open the recipe's encoder cache. Raises RecipeError where cached outputs would differ from the encoder's."""
    if recipe.encoder_cache is None:
        return None
    if recipe.augment is not None:
        raise RecipeError("encoder_cache needs unchanged clips: leave out augment, or encoder_cache")
    if stage.lora and stage.lora.encoder:
        raise RecipeError("encoder_cache needs a frozen encoder: leave out lora.encoder, or encoder_cache")
    if is_sharded:
        raise RecipeError(
            "encoder_cache needs an unsharded encoder on each worker: use zero_stage 1 or 2, or leave it out"
        )
    digests = {"encoder": encoder_digest(graft), "features": processor.featurizer.fingerprint()}
    return open_cache(recipe.encoder_cache, config, **digests, dtype=recipe.dtype)


def _train(recipe: TrainRecipe, run: Run, spec: LoaderSpec) -> None:
    """Train with Ray Train until all steps are done. Raises GraftError when workers died more than `retries` times."""
    import ray.train
    from ray.exceptions import RayActorError
    from ray.train.torch import TorchTrainer

    out = Path(run.out)
    for stale in (STOP_FILE, FAULT_FILE):
        (out / stale).unlink(missing_ok=True)
    for resource in {recipe.device_resource, recipe.data_resource} - {None} - ray.cluster_resources().keys():
        print(f"stage {run.stage.number}: no node has the resource {resource} yet: waiting for one", flush=True)
    worker_resources = {"CPU": 1.0, **({"GPU": 1.0} if recipe.gpu else {})}
    if recipe.device_resource:
        worker_resources[recipe.device_resource] = 1.0
    workers = TorchTrainer(
        run_worker,
        train_loop_config={"run": pickle.dumps(run)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.workers, use_gpu=recipe.gpu, resources_per_worker=worker_resources
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{time.time_ns()}",  # Ray Train resumes silently where a name was used before
            storage_path=str(out / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=recipe.retries),
        ),
        datasets={
            "train": RemainingBatches(
                DataStep(ReadWindows, ray.put(spec.reader)),
                DataStep(LoadBatches, ray.put(spec.without_rows())),
                spec.batches.step_positions,
                spec.batches.windows,
                str(out / CHECKPOINTS),
                int(recipe.data_workers),
                recipe.data_resource,
            )
        },
        dataset_config=ordered_data_config(),
    )
    try:
        with follow(out / LOG_FILE), _on_sigterm((out / STOP_FILE).touch):
            workers.fit()
    except ray.train.WorkerGroupError as error:
        causes = [getattr(failure, "health_check_failure", failure) for failure in error.worker_failures.values()]
        if (out / FAULT_FILE).is_file() or not any(isinstance(cause, RayActorError) for cause in causes):
            raise
        raise GraftError(
            f"a training worker died (killed, out of memory or crashed) and retries={recipe.retries} are used up: "
            "give the same command again to go on from the newest checkpoint"
        ) from error
    if (out / FAULT_FILE).is_file():
        fault = json.loads((out / FAULT_FILE).read_text())
        raise (
            GraftError(fault["error"])
            if "error" in fault
            else RuntimeError(f"a training worker failed:\n{fault['bug']}")
        )
    shutil.rmtree(out / "ray", ignore_errors=True)


def _read_average(checkpoints: Path) -> dict[str, Any] | None:
    """Read what is known of a run's averaged weights: their steps and metrics, and whether they are the result."""
    path = checkpoints / AVERAGE_FOLDER / AVERAGE_FILE
    return json.loads(path.read_text()) if path.is_file() else None


@contextlib.contextmanager
def _on_sigterm(act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` at the first SIGTERM; a second one ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        act()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finish(
    out: Path,
    config: AnyGraftConfig,
    stage: Stage,
    *,
    graft: str,
    words: dict[str, Any] | None,
    seconds: float,
    spelled: dict[str, Any],
    tokens_per_s: float,
) -> dict[str, Any]:
    """Write the trained weights of the best or last checkpoint, or the average; result.json is written last.

    `spelled` are the letters of CTC pre-alignment, and the share of the texts that they spell.
    """
    checkpoint = best_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:
        raise GraftError(f"{out} has no checkpoint, although all its steps are done: remove it and train again")
    progress = read_progress(latest_checkpoint(out / CHECKPOINTS))
    average = _read_average(out / CHECKPOINTS)
    uses_average = average is not None and average["is_result"]
    chosen = out / CHECKPOINTS / AVERAGE_FOLDER if uses_average else checkpoint
    weights = {name: entry["weight"] for name, entry in load_checkpoint(chosen)[0].items()}
    prefix = "audio_projector."
    write_projector(
        {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}, config, out
    )
    if stage.lora:
        save_adapters(weights, stage.lora, out)
    write_stage(out, stage=stage.number, graft=graft, words=words, tokens_per_s=tokens_per_s)
    lines = draw_curves(out, title=f"stage {stage.number}")
    result = {
        "loss_first": progress.first_loss,
        "loss_last": [line["loss"] for line in lines if line.get("loss") is not None][-1],
        "steps": progress.step,
        "best_step": progress.best_step,
        "validation_loss": None,  # without validation
        **(average["metrics"] if average and uses_average else progress.best_metrics),
        **({"average": average} if average else {}),
        "clips": progress.clips,
        "audio_s": progress.audio_s,
        "seconds": seconds,
        **spelled,
    }
    write_atomic(out / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    # The newest checkpoint is where more epochs would go on, and the best one may stay the best then.
    kept = {latest_checkpoint(out / CHECKPOINTS), checkpoint}
    for folder in [out / ROWS, *(path for path in (out / CHECKPOINTS).iterdir() if path not in kept)]:
        shutil.rmtree(folder, ignore_errors=True)
    losses = f"loss {result['loss_first']:.3f} -> {result['loss_last']:.3f}"
    print(f"stage {stage.number}: {losses} in {seconds:.0f} s, see {out}", flush=True)
    return result
