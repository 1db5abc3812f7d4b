"""From a recipe to the batches of its run: data read without their audio, the plan, what is left of it, and the validation's batches."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from graft.data.dataset import RowTable, read_rows
from graft.data.settings import Sources
from graft.errors import DataError
from graft.processor import GraftProcessor
from graft.storage.atomic import write_atomic
from graft.training.plan import Batches, Plan, PlanSettings
from graft.training.progress import Progress

from .loader import Delivery
from .recipe import TrainRecipe
from .samples import Variation, as_they_are, plan_training, trainable, vary

PLAN_FILE = "plan.sha256"
ROWS = "rows"


def plan_run(
    recipe: TrainRecipe, processor: GraftProcessor, *, cache: Path | None = None
) -> tuple[RowTable, Variation, Plan]:
    """Read the recipe's data, without its audio, and plan the run; `cache` is a folder that makes reading again quick.

    Prints what is left out. Raises DataError, RecipeError.
    """
    rows = _trainable(recipe.data, cache)
    names = ("seed", "epochs", "token_budget", "max_batch_clips", "window_row_groups", "short_first")
    settings = PlanSettings(**{name: getattr(recipe, name) for name in names})
    varied = ("seed", "no_speech", "augment", "words", "token_noise")
    variation = vary(rows, processor, **{name: getattr(recipe, name) for name in varied})
    return rows, variation, plan_training(rows, processor, settings, variation)


def remaining_batches(plan: Plan, progress: Progress, recipe: TrainRecipe) -> tuple[Batches, int]:
    """List what is still to be delivered, and count the updates at its end."""
    step_batches = recipe.step_batches or recipe.workers
    slots = recipe.workers * recipe.accumulation
    batches = plan.batches(position=progress.position, step_batches=step_batches, slots=slots)
    steps = len(batches) // slots
    if recipe.max_steps is not None:
        steps = min(steps, max(0, recipe.max_steps - progress.step))
    return batches[: steps * slots], progress.step + steps


def validation_delivery(recipe: TrainRecipe, graft: str, processor: GraftProcessor) -> Delivery | None:
    """Batches of the validation's clips, one after the other for each worker, fillers at the end."""
    if recipe.validation is None:
        return None
    rows = _trainable(recipe.validation.data)
    if len(rows) > recipe.validation.clips:
        rows = rows.select(
            np.sort(np.random.default_rng(recipe.seed).permutation(len(rows))[: recipe.validation.clips])
        )
    settings = PlanSettings(recipe.seed, 1, recipe.token_budget, recipe.max_batch_clips, recipe.window_row_groups)
    variation = as_they_are(rows, processor)
    batches = plan_training(rows, processor, settings, variation).batches(position=0, step_batches=recipe.workers)
    return Delivery(rows, batches, graft, variation, cache_row_groups=recipe.window_row_groups)


@contextlib.contextmanager
def kept_rows(out: Path) -> Iterator[Path]:
    """A folder for what is read of the data's files, so that a run which goes on does not ask a hub for thousands of them again.

    It gets its place only when the block ends well: what is refused leaves nothing.
    """
    if (out / ROWS).is_dir():
        yield out / ROWS
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        shutil.copytree(folder, out / ROWS)


def check_plan(out: Path, plan: Plan) -> None:
    """Raise DataError when a run would go on with other rows than those it began with."""
    columns = plan.columns
    digest = hashlib.sha256(
        b"".join(array.tobytes() for array in (columns.token_counts, columns.label_counts, columns.row_groups))
    )
    path = out / PLAN_FILE
    if not path.is_file():
        write_atomic(path, digest.hexdigest() + "\n")
    elif path.read_text().strip() != digest.hexdigest():
        raise DataError(
            f"the data are not those that {out} began with: train anew in another out=, or put them back (hub: name a revision)"
        )


def _trainable(data: Sources, cache: Path | None = None) -> RowTable:
    rows, left_out = trainable(read_rows(data, cache=cache))
    if left_out:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        print(f"left out: {reasons}; {len(rows)} clips remain", flush=True)
    return rows
