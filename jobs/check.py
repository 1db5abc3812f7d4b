"""Check within a minute that a checkpoint uses its audio and that only answers would be trained.

first clips -> one training batch -> the answers' logits with the clips' own audio and with that of others, and the
labels
"""

from functools import partial
from typing import Literal

from graft.config import Recipe
from graft.data.settings import Sources
from graft.keys import Checkpoint, DataKey, MachineKey, ModelKey

from .common.cli import run_job


class CheckRecipe(Recipe):
    """The checkpoint to check, and the clips to check it on."""

    model: ModelKey[Checkpoint]
    """A graft, or the output folder of a stage."""
    data: DataKey[Sources]
    """Labelled clips: parquet files, folders or globs, or groups of {files, columns}."""
    clips: DataKey[int] = 4
    """Number of clips to use, the first of `data`."""
    dtype: ModelKey[Literal["fp32", "bf16"]] = "fp32"
    """Precision of the weights and of the arithmetic."""
    gpu: MachineKey[bool] = False
    """Run on a GPU."""


def run(recipe: CheckRecipe) -> tuple[float, int]:
    """Run the stages' preflight on the clips that can be read; the others are printed.

    Raises ModelError for a deaf model, DataError for wrong labels and where no clip can be read.
    """
    import numpy as np
    import torch

    from graft.checkpoints.loading import DTYPES, open_graft
    from graft.data.dataset import read_rows
    from graft.errors import DataError
    from graft.training.preflight import preflight

    from .training.samples import trainable
    from .training.validation import read_clips

    model, processor = open_graft(recipe.model, dtype=DTYPES[recipe.dtype], device="cuda" if recipe.gpu else "cpu")
    rows, _ = trainable(read_rows(recipe.data))
    clips, faults = read_clips(rows.select(np.arange(min(recipe.clips, len(rows)))))
    for name, fault in faults.items():
        print(f"check: clip {name} is left out: {fault}", flush=True)
    if not clips:
        raise DataError(f"none of the first {len(faults)} clips can be read, {next(iter(faults.values()))}")
    examples = [processor.example(clip, rows.text(row)) for row, clip in clips.items()]
    batch = processor.training_batch(examples)  # as the stages make it
    inputs = {name: torch.from_numpy(array).to(model.device) for name, array in batch.items()}
    logit_change, label_count = preflight(model, inputs, processor.prompt_end_ids())
    print(f"check: {recipe.model} hears: other audio changes the answer's logits by {logit_change:.2g}")
    print(f"check: {label_count} labels, all of them in answers")
    return logit_change, label_count


EXAMPLES = (
    "model=runs/stage2 data=runs/data/dev",
    "model=runs/stage2 data=runs/data/dev clips=16 dtype=bf16 gpu=true",
)
"""Arguments that --help shows."""
main = partial(run_job, CheckRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
