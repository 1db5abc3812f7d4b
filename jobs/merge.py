"""Merge the projector and adapters of a stage into full-precision weights.

The result is a whole graft again; the trained parts are kept beside it in adapter/.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from graft.config import Recipe
from graft.data.settings import Sources
from graft.errors import ModelError

from .common.cli import run_job
from .common.outputs import staged_output

ADAPTER_FOLDER = "adapter"
COMPARISON_FILE = "comparison.json"


class MergeRecipe(Recipe):
    """What to merge."""

    model: str
    """Output folder of stage 1 or stage 2."""
    out: str
    """Folder for the merged graft."""
    onto: Literal["full", "nf4"] = "full"
    """The full-precision base, or the base as NF4 rounds it, on which QLoRA trained the adapters; neither result is quantized."""
    dtype: Literal["fp32", "bf16", "base"] = "base"
    """Of the weights on disk; `base` keeps the graft's. Merging itself is done in float32."""
    data: Sources | None = None
    """Labelled clips on which adapters on NF4, adapters on the plain base and the merged graft are compared."""
    clips: int = Field(default=64, ge=1)
    """How many of the clips to compare on."""
    gpu: bool = False
    """Compare on a GPU."""


def run(recipe: MergeRecipe) -> None:
    """Merge recipe.model into recipe.out. Raises ModelError unless it is a stage's output, DataError."""
    import torch

    from graft.checkpoints.loading import DTYPES, base_graft, computes_bf16, read_stage
    from graft.checkpoints.lora import has_adapters
    from graft.model.configuration import GraftConfig

    from .evaluation.merge_check import compare

    if read_stage(recipe.model) is None:
        raise ModelError(
            f"{recipe.model} is no stage's output (it has no stage.json): give the out folder of jobs.stage1 or jobs.stage2"
        )
    compares = recipe.data is not None and has_adapters(recipe.model)
    with staged_output(recipe.out, recipe) as out:
        dtype = DTYPES.get(recipe.dtype) or GraftConfig.from_pretrained(base_graft(recipe.model)).dtype
        _merge(recipe, out, dtype)
        if recipe.data is not None and compares:
            device = "cuda" if recipe.gpu else "cpu"
            fast = torch.bfloat16 if computes_bf16(device) else torch.float32
            figures = compare(recipe.model, out, recipe.data, clips=recipe.clips, dtype=fast, device=device)
            (out / COMPARISON_FILE).write_text(json.dumps(figures, indent=2) + "\n")
    print(f"merge: {recipe.model} -> {recipe.out} ({dtype}), trained parts kept in {ADAPTER_FOLDER}/", flush=True)


def _merge(recipe: MergeRecipe, out: Path, dtype: Any) -> None:
    import torch

    from graft.checkpoints.loading import open_graft
    from graft.checkpoints.lora import ADAPTER_FILES, has_adapters, merge_adapters
    from graft.checkpoints.projector_file import PROJECTOR_FILE

    model, processor = open_graft(recipe.model, dtype=torch.float32, rounded_to_nf4=recipe.onto == "nf4")
    kept = [PROJECTOR_FILE]
    if has_adapters(recipe.model):
        merge_adapters(model)
        kept += ADAPTER_FILES
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    (out / ADAPTER_FOLDER).mkdir()
    for name in kept:
        shutil.copyfile(Path(recipe.model, name), out / ADAPTER_FOLDER / name)


def main(recipe: MergeRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(MergeRecipe, main, summary=__doc__))
