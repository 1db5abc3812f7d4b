"""Collect what training has left: the curves of each stage, and which weights it changed.

    [{"folder", "stage", "curves": {"step", "loss", ...}, "validation": {set: {"step", "loss", "wer"}},
      "weights": [{"part", "parameters", "changed", "relative_change"}]}]

`curves` are lists as long as their `step`. `relative_change` is the norm of the difference from the graft that the
stage was trained on, over the norm of that, and `changed` the number of its parameters that are others now.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from graft.checkpoints.loading import read_stage
from graft.checkpoints.merging import StageWeights
from graft.training.tracking import METRICS_FILE

from .checking import recipe_folders

CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "data_wait")
PARTS = {
    "audio_tower": "audio encoder",
    "audio_projector": "projector",
    "model.visual": "vision tower",
    "embed_tokens": "text embeddings",
    "self_attn": "attention of the language model",
    "mlp": "MLPs of the language model",
    "lm_head": "output layer",
}
"""Piece of a tensor's name -> the part that it belongs to; the first piece that occurs counts."""
OTHER = "norms of the language model"


def training_runs(model: str) -> list[dict[str, Any]]:
    """Describe the stages that led to a model, by the recipes in its folder, the first stage first.

    Raises ModelError where weights cannot be read.
    """
    return [describe_run(folder) for folder in stage_folders(model)]


def stage_folders(model: str) -> list[Path]:
    """List the output folders of the stages that led to a model, the first stage first."""
    return [folder for folder in recipe_folders(model) if (folder / METRICS_FILE).is_file()][::-1]


def describe_run(folder: Path) -> dict[str, Any]:
    """Describe a stage by its output folder. Raises ModelError where its weights cannot be read."""
    stage = read_stage(folder)
    return {
        "folder": folder.name,
        "stage": stage["stage"] if stage and "stage" in stage else folder.name,
        **read_curves(folder),
        "weights": changed_weights(folder) if stage else [],
    }


def read_curves(folder: Path) -> dict[str, Any]:
    """Read the metrics of a stage: `curves`, and `validation` by set; the set of a single one is ""."""
    curves: dict[str, list[Any]] = {"step": [], **{key: [] for key in CURVES}}
    validation: dict[str, dict[str, list[Any]]] = {}
    for line in _read_lines(folder / METRICS_FILE):
        if "loss" in line:
            for key, values in curves.items():
                values.append(line.get(key))
        sets = {key.partition("/")[2] for key in line if key.startswith("validation_loss")}
        for name in sorted(sets - {""} or sets):
            ending = f"/{name}" if name else ""
            one = validation.setdefault(name, {"step": [], "loss": [], "wer": []})
            one["step"].append(line["step"])
            one["loss"].append(line[f"validation_loss{ending}"])
            one["wer"].append(line.get(f"validation_wer{ending}"))
    return {"curves": curves, "validation": validation}


def changed_weights(stage: str | Path) -> list[dict[str, Any]]:
    """Compare a stage's weights with those of the graft that it was trained on, by part; reads a tensor at a time."""
    weights = StageWeights(stage)
    parts: dict[str, list[float]] = {}  # parameters, changed ones, squared norms of the difference and of the weights
    for name in weights.places:
        before = weights.before(name)
        after = weights.after(name, before).float()
        before = before.float()
        sums = parts.setdefault(part_of(name), [0, 0, 0.0, 0.0])
        difference = after - before
        sums[0] += before.numel()
        sums[1] += int(torch.count_nonzero(difference))
        sums[2] += float(difference.double().square().sum())
        sums[3] += float(before.double().square().sum())
    return [
        {
            "part": part,
            "parameters": int(parameters),
            "changed": int(changed),
            "relative_change": (difference / norm) ** 0.5 if norm else None,
        }
        for part, (parameters, changed, difference, norm) in parts.items()
    ]


def part_of(name: str) -> str:
    """Name the part of a graft that a tensor belongs to."""
    return next((part for piece, part in PARTS.items() if piece in name), OTHER)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
