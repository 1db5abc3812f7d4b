"""Merge a stage's projector and adapters into full-precision weights: a whole graft again, with the adapters kept beside it."""

import shutil
import sys
from pathlib import Path
from typing import Literal

from graft.config import Recipe
from graft.errors import ModelError
from jobs.cli import run_job
from jobs.outputs import staged_output

ADAPTER_FOLDER = "adapter"


class MergeRecipe(Recipe):
    """What to merge."""

    model: str
    """Output folder of stage 1 or stage 2."""
    out: str
    """Folder for the merged graft."""
    dtype: Literal["fp32", "bf16", "base"] = "base"
    """Of the weights on disk; `base` keeps the graft's. Merging itself is done in float32."""


def run(recipe: MergeRecipe) -> None:
    """Merge recipe.model into recipe.out. Raises ModelError unless it is a stage's output."""
    import torch

    from graft.model.adapters import ADAPTER_FILES, has_adapters, merge_adapters
    from graft.model.configuration import GraftConfig
    from graft.model.opening import DTYPES, base_graft, open_graft, read_stage
    from graft.model.weights import PROJECTOR_FILE

    stage = read_stage(recipe.model)
    if stage is None:
        raise ModelError(f"{recipe.model} is no stage's output (it has no stage.json): give the out folder of jobs.stage1 or jobs.stage2")
    with staged_output(recipe.out, recipe) as out:
        model, processor = open_graft(recipe.model, dtype=torch.float32)
        kept = [PROJECTOR_FILE]
        if has_adapters(recipe.model):
            merge_adapters(model)
            kept += ADAPTER_FILES
        dtype = DTYPES.get(recipe.dtype) or GraftConfig.from_pretrained(base_graft(recipe.model)).dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.save_pretrained(out)
        processor.save_pretrained(out)
        (out / ADAPTER_FOLDER).mkdir()
        for name in kept:
            shutil.copyfile(Path(recipe.model, name), out / ADAPTER_FOLDER / name)
    print(f"merge: {recipe.model} -> {recipe.out} ({dtype}), trained parts kept in {ADAPTER_FOLDER}/", flush=True)


def main(recipe: MergeRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(MergeRecipe, main, summary="Merge a stage's output into full-precision weights."))
