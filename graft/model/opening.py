"""Open what graft's jobs wrote: a whole graft, or a stage's output on top of the graft it was trained on."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from graft.errors import ModelError
from graft.model.adapters import attach_adapters, has_adapters, nf4_config
from graft.model.build import check_kind, reading
from graft.model.configuration import GraftConfig
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.weights import check_projector, load_projector, read_projector
from graft.processor import GraftProcessor

STAGE_FILE = "stage.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_graft(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", nf4: bool = False
) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    """Load a model and its processor from a graft's folder, a stage's output folder or a hub id.

    `dtype` defaults to the checkpoint's own. With `nf4` the language model is quantized (QLoRA). A stage's projector, and its adapters
    unmerged, are put onto the graft that the stage was trained on. Raises ModelError for anything else, and for a deaf projector.
    """
    stage = read_stage(path)
    model, processor = _load(base_graft(path), dtype=dtype, device=device, nf4=nf4)
    if stage:
        load_projector(model, path)
        if has_adapters(path):
            attach_adapters(model, path)
    check_projector(model, source=str(path))
    return model.eval(), processor


def check_graft(path: str | Path) -> None:
    """Raise ModelError unless a path is a graft, or a stage's output with a projector for its graft; reads no other weights."""
    graft = base_graft(path)
    check_kind(graft, "graft")
    if read_stage(path):
        read_projector(path, GraftConfig.from_pretrained(graft))


def write_stage(folder: str | Path, *, stage: int, graft: str | Path) -> None:
    """Record in a stage's output folder which graft it belongs to, by a path relative to that folder."""
    relative = os.path.relpath(Path(graft).resolve(), Path(folder).resolve())
    Path(folder, STAGE_FILE).write_text(json.dumps({"stage": stage, "graft": relative}) + "\n")


def read_stage(folder: str | Path) -> dict[str, Any] | None:
    """Read what write_stage wrote; None for a folder that is no stage's output."""
    path = Path(folder, STAGE_FILE)
    return json.loads(path.read_text()) if path.is_file() else None


def base_graft(path: str | Path) -> str:
    """Name the whole graft behind a path: itself, or the one that a stage's output was trained on; an absolute path, or a hub id."""
    stage = read_stage(path)
    folder = Path(path, stage["graft"]) if stage else Path(path)
    return str(folder.resolve()) if folder.exists() else str(path)


def _load(
    path: str, *, dtype: torch.dtype | None, device: str | torch.device, nf4: bool
) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    check_kind(path, "graft")
    # Only a quantized model needs accelerate's device_map: its weights are quantized on their way to the device.
    options = {"quantization_config": nf4_config(dtype or torch.bfloat16), "device_map": {"": device}} if nf4 else {}
    try:
        model = GraftForConditionalGeneration.from_pretrained(path, dtype=dtype or "auto", **options)
    except ValueError as error:
        raise ModelError(str(error).splitlines()[0]) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights in {path} can't be read ({str(error).splitlines()[0]}): copy or build them again") from error
    with reading(path):
        processor = GraftProcessor.from_pretrained(path)
    return model if nf4 else model.to(device), processor
