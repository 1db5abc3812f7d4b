"""LoRA adapters in PEFT's format and the NF4 base: inject, save, load, truncate and merge adapters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.errors import ModelError, require
from graft.model.modeling import AnyGraft

LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""The pattern names the language model in full: a bare `q_proj` would also match the Whisper encoder."""
ENCODER_TARGETS = r"audio_tower\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)"

NOT_QUANTIZED = ["audio_tower", "audio_projector", "lm_head", "model.visual"]
PEFT_PREFIX = "base_model.model."
"""Prefix of tensor names in PEFT's files, from the wrapper that its own loader puts around a model."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale and dropout of the adapters; with `encoder` the Whisper encoder has adapters too."""

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    encoder: bool = False


def nf4_config(compute_dtype: torch.dtype) -> Any:
    """Make transformers' configuration of QLoRA's base: NF4 with double quantization of the language model's layers."""
    require("bitsandbytes", extra="train")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def round_to_nf4(model: AnyGraft) -> None:
    """Round the language model's matrices to the values of QLoRA's quantization; their dtype stays."""
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = round_matrix_to_nf4(module.weight.data)


def round_matrix_to_nf4(matrix: Tensor) -> Tensor:
    """Round a matrix to the values of QLoRA's quantization, in its own dtype."""
    functional = require("bitsandbytes", extra="train").functional
    return functional.dequantize_4bit(*functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True))


def add_adapters(model: AnyGraft, settings: LoraSettings) -> None:
    """Inject fresh LoRA layers (float32, B zero) and make them the only trainable weights."""
    _inject(model, lora_config(settings))


def lora_config(settings: LoraSettings) -> Any:
    """Make PEFT's configuration of the adapters."""
    return require("peft", extra="train").LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=f"{LORA_TARGETS}|{ENCODER_TARGETS}" if settings.encoder else LORA_TARGETS,
        bias="none",
    )


def _inject(model: AnyGraft, config: Any) -> None:
    require("peft", extra="train").inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def save_adapters(state: Mapping[str, Tensor], settings: LoraSettings, folder: str | Path) -> None:
    """Write the adapters among a model's tensors, given by parameter name, as PEFT's two files (ADAPTER_FILES)."""
    tensors = {
        PEFT_PREFIX + name.replace(".default.", "."): tensor.detach().float().cpu().contiguous()
        for name, tensor in state.items()
        if ".lora_" in name
    }
    save_file(tensors, Path(folder) / ADAPTER_FILES[1], metadata={"format": "pt"})
    config = lora_config(settings)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def has_adapters(folder: str | Path) -> bool:
    return all((Path(folder) / name).is_file() for name in ADAPTER_FILES)


def read_adapters(folder: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Read saved adapters: tensors by the graft's parameter names, and PEFT's configuration.

    Raises ModelError when they are missing or broken.
    """
    if not has_adapters(folder):
        raise ModelError(f"{folder} holds no adapters ({', '.join(ADAPTER_FILES)}): give the output folder of stage 2")
    try:
        config = require("peft", extra="train").LoraConfig.from_pretrained(str(folder))
        state = {
            name.removeprefix(PEFT_PREFIX): tensor
            for name, tensor in load_file(Path(folder) / ADAPTER_FILES[1]).items()
        }
    except (SafetensorError, TypeError, ValueError) as error:
        raise ModelError(
            f"the adapters in {folder} can't be read ({str(error).splitlines()[0]}): copy or train them again"
        ) from error
    return state, config


def attach_adapters(model: AnyGraft, folder: str | Path) -> None:
    """Inject saved adapters into a graft, unmerged. Raises ModelError when the files are missing or do not fit."""
    state, config = read_adapters(folder)
    _inject(model, config)
    load_adapters(model, state, source=str(folder))


def load_adapters(model: AnyGraft, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights into adapters that are injected already. Raises ModelError when they do not fit."""
    peft = require("peft", extra="train")
    expected = peft.get_peft_model_state_dict(model).keys()
    if state.keys() != expected:
        raise ModelError(
            f"the adapters in {source} do not fit this graft: {len(state.keys() ^ expected)} tensors differ, "
            "train them on it"
        )
    try:
        peft.set_peft_model_state_dict(model, dict(state))
    except RuntimeError as error:
        raise ModelError(
            f"the adapters in {source} do not fit this graft: {str(error).splitlines()[-1].strip()}"
        ) from error


def truncate_adapters(
    state: Mapping[str, Tensor], settings: LoraSettings, rank: int
) -> tuple[dict[str, Tensor], LoraSettings, dict[str, float]]:
    """Approximate each adapter's update B A by the best one of a lower `rank`, in least squares.

    Returns float32 tensors by the same names, their settings, and for each matrix the share of the update's squared
    norm that is kept.
    """
    rank = min(rank, settings.rank)
    cut: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for matrix in sorted(name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")):
        names = (f"{matrix}.lora_A.weight", f"{matrix}.lora_B.weight")
        a, b = (state[name].double() for name in names)
        *factors, shares[matrix] = _truncate(a, settings.alpha / settings.rank * b, rank)
        cut |= {name: factor.float().contiguous() for name, factor in zip(names, factors, strict=True)}
    return cut, replace(settings, rank=rank, alpha=rank), shares


def _truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factor B A into its best approximation of `rank`, by SVD; returns A, B and the share of the squared norm kept.

    a is (r, in), b (out, r). Both new factors carry the square roots of the singular values.
    """
    basis_a, core_a = torch.linalg.qr(a.T)  # (in, r), (r, r)
    basis_b, core_b = torch.linalg.qr(b)  # (out, r), (r, r)
    # B A = basis_b (core_b core_a^T) basis_a^T, so the SVD of an (r, r) matrix is enough.
    left, values, right = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)  # (r, r), (r,), (r, r)
    roots = values[:rank].sqrt()
    energy = values.square()
    share = float(energy[:rank].sum() / energy.sum()) if energy.any() else 1.0
    new_a = roots[:, None] * (right[:rank] @ basis_a.T)  # (rank, in)
    new_b = basis_b @ left[:, :rank] * roots  # (out, rank)
    missing = rank - len(roots)  # rows to pad where the matrix itself has a smaller rank
    return torch.nn.functional.pad(new_a, (0, 0, 0, missing)), torch.nn.functional.pad(new_b, (0, missing)), share


def merge_adapters(model: AnyGraft) -> None:
    """Merge attached adapters into the weights that they adapt.

    Raises ModelError for a quantized base, where merging would lose precision.
    """
    if getattr(model, "quantization_method", None) is not None:
        raise ModelError(
            "adapters are merged into full-precision weights, not into 4-bit ones: load the graft without quantization"
        )
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    del model.peft_config
