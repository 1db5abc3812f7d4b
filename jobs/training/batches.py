"""Plan a run's batches from its recipe: read the data without its audio, plan, and list the remaining batches."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from graft.data.dataset import RowTable, read_rows
from graft.data.settings import Sources
from graft.errors import DataError
from graft.processor import GraftProcessor
from graft.storage.atomic import atomic_file, write_atomic
from graft.training.plan import Batches, Plan, PlanSettings
from graft.training.progress import Progress

from .loader import LoaderSpec
from .reader import NO_SPEECH_ID
from .recipe import TrainRecipe
from .samples import Variation, plain_variation, plan_training, trainable, vary

PLAN_FILE = "plan.sha256"
ROWS = "rows"
LEFT_OUT_FILE = "left_out.jsonl"
NAMED_CLIPS = 3
"""Clips over the token budget that are named, at most."""


class LeftOutRows:
    """Collects the names of the rows that are not trained or validated on, with the reasons."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Any]] = []

    def add(self, reason: str, ids: Any) -> None:
        """Add the rows of a list or an Arrow array of ids."""
        self._found.append((reason, ids))

    def write(self, path: Path) -> None:
        """Write a line {"id", "reason"} for each row; no file where there is none."""
        if not self._found:
            return
        with atomic_file(path) as temporary, temporary.open("w") as file:
            for reason, ids in self._found:
                file.writelines(json.dumps({"id": str(one), "reason": reason}) + "\n" for one in ids)


def plan_run(
    recipe: TrainRecipe, processor: GraftProcessor, *, cache: Path | None = None, left_out: LeftOutRows | None = None
) -> tuple[RowTable, Variation, Plan]:
    """Read the recipe's data without its audio, and plan the run.

    `cache` is a folder that keeps the data's columns for a second reading. The numbers of clips that are left out are
    printed, and their names are added to `left_out`. Raises DataError and RecipeError.
    """
    left_out = left_out or LeftOutRows()
    rows = _read_trainable(recipe.data, left_out, cache)
    names = ("seed", "epochs", "token_budget", "max_batch_clips", "window_clips", "short_first")
    settings = PlanSettings(**{name: getattr(recipe, name) for name in names})
    varied = ("seed", "no_speech", "augment", "words", "token_noise")
    variation = vary(rows, processor, **{name: getattr(recipe, name) for name in varied})
    plan = plan_training(rows, processor, settings, variation)
    _print_over_budget(rows, plan, left_out)
    return rows, variation, plan


def remaining_batches(plan: Plan, progress: Progress, recipe: TrainRecipe) -> tuple[Batches, int]:
    """List the batches that remain to be trained, and count the run's updates at their end."""
    step_batches = recipe.step_batches or recipe.workers
    slots = recipe.workers * recipe.accumulation
    batches = plan.batches(position=progress.position, step_batches=step_batches, slots=slots)
    steps = len(batches) // slots
    if recipe.max_steps is not None:
        steps = min(steps, max(0, recipe.max_steps - progress.step))
    return batches[: steps * slots], progress.step + steps


def validation_specs(
    recipe: TrainRecipe, graft: str, processor: GraftProcessor, left_out: LeftOutRows | None = None
) -> dict[str, LoaderSpec]:
    """Plan the batches of each validation set; worker r of n takes the batches r, r + n and so on.

    The name of a single set is "". Returns no sets without validation. Adds the names of clips that are left out.
    """
    if recipe.validation is None:
        return {}
    clips, left_out = recipe.validation.clips, left_out or LeftOutRows()
    return {
        name: _validation_spec(
            recipe, validation_rows(data, clips, seed=recipe.seed, left_out=left_out), graft, processor, left_out
        )
        for name, data in recipe.validation.sets.items()
    }


def validation_rows(data: Sources, clips: int, *, seed: int, left_out: LeftOutRows | None = None) -> RowTable:
    """Read a validation set without its audio, and choose clips of it where it has more."""
    rows = _read_trainable(data, left_out or LeftOutRows())
    if len(rows) <= clips:
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:clips]))


def _validation_spec(
    recipe: TrainRecipe, rows: RowTable, graft: str, processor: GraftProcessor, left_out: LeftOutRows
) -> LoaderSpec:
    settings = PlanSettings(recipe.seed, 1, recipe.token_budget, recipe.max_batch_clips, recipe.window_clips)
    variation = plain_variation(processor)
    plan = plan_training(rows, processor, settings, variation)
    _print_over_budget(rows, plan, left_out)
    batches = plan.batches(position=0, step_batches=recipe.workers)
    return LoaderSpec(rows, batches, graft, variation, token_budget=recipe.token_budget)


@contextlib.contextmanager
def cached_rows(out: Path) -> Iterator[Path]:
    """Yield a folder that caches the data's columns: a resumed run need not read thousands of remote files again.

    A new folder is temporary, and moves into the output folder when the block ends without an error.
    """
    if (out / ROWS).is_dir():
        yield out / ROWS
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        shutil.copytree(folder, out / ROWS)


def check_plan(out: Path, plan: Plan) -> None:
    """Raise DataError when a resumed run has other rows than it started with."""
    columns, digest = plan.columns, hashlib.sha256()
    for array in (columns.token_counts, columns.label_counts, columns.row_groups):
        digest.update(np.ascontiguousarray(array, np.int32).data)
    path = out / PLAN_FILE
    if not path.is_file():
        write_atomic(path, digest.hexdigest() + "\n")
    elif path.read_text().strip() != digest.hexdigest():
        raise DataError(
            f"the data differs from that which {out} started with: train in another out=, or restore the data "
            "(on a hub: name a revision)"
        )


def _print_over_budget(rows: RowTable, plan: Plan, left_out: LeftOutRows) -> None:
    """Print which clips are left out because one alone exceeds the token budget; a generated one is NO_SPEECH_ID."""
    if count := len(plan.left_out):
        ids = [rows.id(row) if row < len(rows) else NO_SPEECH_ID for row in plan.left_out]
        others = f" and {count - NAMED_CLIPS} others" if count > NAMED_CLIPS else ""
        budget = plan.settings.token_budget
        named = ", ".join(ids[:NAMED_CLIPS])
        print(f"left out: {count} of over token_budget={budget} tokens ({named}{others})", flush=True)
        left_out.add(f"over token_budget={budget} tokens", ids)


def _read_trainable(data: Sources, left_out: LeftOutRows, cache: Path | None = None) -> RowTable:
    every = read_rows(data, cache=cache)
    rows, faulty = trainable(every)
    if faulty:
        reasons = ", ".join(f"{len(found)} with {reason}" for reason, found in faulty.items())
        print(f"left out: {reasons}; {len(rows)} clips remain", flush=True)
    for reason, found in faulty.items():
        left_out.add(reason, every.ids.take(pa.array(found)))
    return rows
