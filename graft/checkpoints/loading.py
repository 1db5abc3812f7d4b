"""Open what graft's jobs wrote: a whole graft, or a stage's output on top of the graft it was trained on."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from graft.checkpoints.build import check_kind, reading
from graft.checkpoints.lora import attach_adapters, has_adapters, nf4_config, round_to_nf4
from graft.checkpoints.projector_file import check_projector, load_projector, read_projector, weight_files
from graft.checkpoints.release import installed_graft, known_names
from graft.errors import ModelError
from graft.model.configuration import GraftConfig
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import GraftProcessor

STAGE_FILE = "stage.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def computes_bf16(device: torch.device | str) -> bool:
    """Whether PyTorch multiplies bf16 matrices on a device as fast as others: on CPUs oneDNN has to, with AVX-512, AMX or Arm's BF16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # what torch.compile asks as well


def open_graft(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    nf4: bool = False,
    attention: str = "sdpa",
    rounded_to_nf4: bool = False,
) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    """Load a model and its processor from a graft's folder, a stage's output folder, a hub id or the name of a graft that comes along.

    `dtype` defaults to the checkpoint's own. With `nf4` the language model is quantized (QLoRA); with `rounded_to_nf4` its
    weights are those that quantization leaves, in `dtype` again. `attention` is transformers' name of an implementation. A stage's
    projector, and its adapters unmerged, are put onto the graft that the stage was trained on; the words that it was trained for stand in
    configuration and processor.
    Raises ModelError for anything else, and for a deaf projector.
    """
    model = _load_model(base_graft(path), dtype=dtype, device=device, nf4=nf4, attention=attention)
    if rounded_to_nf4:
        round_to_nf4(model)
    processor = open_processor(path)
    model.config.trained_styles, model.config.trained_context = (
        list(processor.trained_styles),
        processor.trained_context,
    )
    if read_stage(path):
        load_projector(model, path)
        if has_adapters(path):
            attach_adapters(model, path)
    check_projector(model, source=str(path))
    return model.eval(), processor


def model_digest(path: str | Path) -> str:
    """SHA-256 over the files that make up what open_graft opens: weights and configuration, of a stage also of its graft."""
    digest = hashlib.sha256()
    for part in [*([path] if read_stage(path) else []), base_graft(path)]:
        weights = weight_files(part)
        folder = weights[0].parent
        for file in [*weights, *(folder / name for name in ("config.json", STAGE_FILE) if (folder / name).is_file())]:
            with file.open("rb") as data:
                digest.update(f"{file.name} {hashlib.file_digest(data, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def open_processor(path: str | Path) -> GraftProcessor:
    """Load the processor of what open_graft opens, without the model. Raises ModelError for anything else."""
    graft = base_graft(path)
    check_kind(graft, "graft")
    with reading(graft):
        processor = GraftProcessor.from_pretrained(graft)
    if words := (read_stage(path) or {}).get("words"):
        processor.trained_styles, processor.trained_context = words["styles"], words["context"]
    return processor


def check_graft(path: str | Path) -> None:
    """Raise ModelError unless a path is a graft, or a stage's output with a projector for its graft; reads no other weights."""
    graft = base_graft(path)
    check_kind(graft, "graft")
    if read_stage(path):
        read_projector(path, GraftConfig.from_pretrained(graft))


def write_stage(folder: str | Path, *, stage: int, graft: str | Path, words: Mapping[str, Any] | None = None) -> None:
    """Record in a stage's output folder which graft it belongs to, by a path relative to that folder.

    `words` is what it can be asked for now (graft.text.instructions.trained_instructions); None leaves it at what the graft could be asked for.
    """
    relative = os.path.relpath(Path(graft).resolve(), Path(folder).resolve())
    kept = {"stage": stage, "graft": relative, **({"words": dict(words)} if words is not None else {})}
    Path(folder, STAGE_FILE).write_text(json.dumps(kept) + "\n")


def read_stage(folder: str | Path) -> dict[str, Any] | None:
    """Read what write_stage wrote; None for a folder that is no stage's output."""
    path = Path(folder, STAGE_FILE)
    return json.loads(path.read_text()) if path.is_file() else None


def base_graft(path: str | Path) -> str:
    """Name the whole graft behind a path: itself, or the one that a stage's output was trained on; an absolute path, or a hub id.

    A name that comes with the package, where no such folder is, stands for that graft, which is built at its first use.
    """
    stage = read_stage(path)
    folder = Path(path, stage["graft"]) if stage else Path(path)
    if folder.exists():
        return str(folder.resolve())
    return str(installed_graft(str(path))) if str(path) in known_names() else str(path)


def _load_model(
    path: str, *, dtype: torch.dtype | None, device: str | torch.device, nf4: bool, attention: str
) -> GraftForConditionalGeneration:
    check_kind(path, "graft")
    # Only a quantized model needs accelerate's device_map: its weights are quantized on their way to the device.
    options = {"quantization_config": nf4_config(dtype or torch.bfloat16), "device_map": {"": device}} if nf4 else {}
    try:
        model = GraftForConditionalGeneration.from_pretrained(
            path, dtype=dtype or "auto", attn_implementation=attention, **options
        )
    except ValueError as error:
        raise ModelError(str(error).splitlines()[0]) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the weights in {path} can't be read ({str(error).splitlines()[0]}): copy or build them again"
        ) from error
    return model if nf4 else model.to(device)
