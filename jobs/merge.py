"""Merge the projector and adapters of a stage into full-precision weights.

The result is a whole graft again; the trained parts are kept beside it in adapter/, and with data= also
comparison.json: loss and WER of the adapters on an NF4 base, on the plain base, and merged.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from graft.config import Recipe
from graft.data.settings import Sources
from graft.errors import GraftError, ModelError
from graft.keys import DataKey, MachineKey, ModelKey, OutputKey, StageFolder
from graft.storage.atomic import write_atomic

from .common.cli import run_job
from .common.outputs import holds_results, staged_output

if TYPE_CHECKING:
    from graft.data.dataset import RowTable

ADAPTER_FOLDER = "adapter"
COMPARISON_FILE = "comparison.json"


class MergeRecipe(Recipe):
    """The stage to merge, and onto which base."""

    model: ModelKey[StageFolder]
    """Output folder of stage 1 or stage 2."""
    out: OutputKey[str]
    """Folder for the merged graft."""
    onto: ModelKey[Literal["full", "nf4"]] = "full"
    """Base that the adapters are added to: the full-precision base, or the base with the values that NF4 rounds it to,
    on which QLoRA trained the adapters. Neither result is quantized."""
    dtype: OutputKey[Literal["fp32", "bf16", "base"]] = "base"
    """Precision of the weights on disk; base keeps that of the graft. The merge itself is computed in float32."""
    data: DataKey[Sources | None] = None
    """Labelled clips on which to compare the adapters on NF4, the adapters on the plain base and the merged graft; null
    compares nothing."""
    clips: DataKey[int] = Field(default=64, ge=1)
    """Number of clips to compare on, the first of `data`."""
    gpu: MachineKey[bool] = False
    """Compare on a GPU."""


def run(recipe: MergeRecipe) -> None:
    """Merge recipe.model into recipe.out, and compare, unless that is done already.

    A comparison that fails leaves the whole merge, and a second run only compares. Raises ModelError if recipe.model is
    not a stage's output, DataError, OutputError, and GraftError for a comparison that fails.
    """
    from graft.checkpoints.lora import has_adapters

    compares = recipe.data is not None and has_adapters(recipe.model)
    is_merged = holds_results(recipe.out, recipe)
    if is_merged and (not compares or Path(recipe.out, COMPARISON_FILE).is_file()):
        print(f"merge: {recipe.out} is done already", flush=True)
        return
    from .evaluation.merge_check import comparison_rows

    read_stage_output(recipe.model)
    rows = comparison_rows(recipe.data, recipe.clips) if recipe.data is not None and compares else None
    if not is_merged:
        _merge(recipe)
    if rows is not None:
        _compare(recipe, rows)


def _compare(recipe: MergeRecipe, rows: "RowTable") -> None:
    """Write comparison.json. Raises GraftError; the merge is whole then."""
    import torch

    from graft.checkpoints.loading import multiplies_bf16

    from .evaluation.merge_check import compare

    device = "cuda" if recipe.gpu else "cpu"
    fast = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    try:
        figures = compare(recipe.model, Path(recipe.out), rows, dtype=fast, device=device)
    except GraftError as error:
        raise GraftError(f"{recipe.out} is merged, but not compared: {error}") from error
    write_atomic(Path(recipe.out, COMPARISON_FILE), json.dumps(figures, indent=2) + "\n")


def _merge(recipe: MergeRecipe) -> None:
    from graft.checkpoints.loading import DTYPES, base_checkpoint
    from graft.checkpoints.lora import ADAPTER_FILES, has_adapters
    from graft.checkpoints.merging import write_merged
    from graft.checkpoints.projector_file import PROJECTOR_FILE
    from graft.model.configuration import read_graft_config

    with staged_output(recipe.out, recipe) as out:
        config: Any = read_graft_config(base_checkpoint(recipe.model))
        dtype = DTYPES.get(recipe.dtype) or config.dtype
        write_merged(recipe.model, out, dtype=dtype, onto_nf4=recipe.onto == "nf4")
        trained_files = [PROJECTOR_FILE, *(ADAPTER_FILES if has_adapters(recipe.model) else ())]
        (out / ADAPTER_FOLDER).mkdir()
        for name in trained_files:
            shutil.copyfile(Path(recipe.model, name), out / ADAPTER_FOLDER / name)
    print(f"merge: {recipe.model} -> {recipe.out} ({dtype}), trained parts kept in {ADAPTER_FOLDER}/", flush=True)


def read_stage_output(model: str) -> dict[str, Any]:
    """Read the stage.json of a stage's output folder. Raises ModelError for any other folder."""
    from graft.checkpoints.loading import read_stage

    if (stage := read_stage(model)) is None:
        raise ModelError(
            f"{model} is no stage's output (it has no stage.json): give the folder of `graft stage1` or `graft stage2`"
        )
    return stage


EXAMPLES = (
    "model=runs/stage2 out=runs/merged",
    "model=runs/stage2 onto=nf4 data=runs/data/dev out=runs/merged",
)
"""Arguments that --help shows."""
main = partial(run_job, MergeRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
