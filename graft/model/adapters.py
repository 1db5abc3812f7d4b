"""LoRA and NF4: adapters on the language model alone, in PEFT's format, merged into full-precision weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.errors import ModelError, require
from graft.model.modeling import GraftForConditionalGeneration

LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""Anchored: a bare `q_proj` would also hit every attention of the Whisper encoder."""
ENCODER_TARGETS = r"audio_tower\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)"

KEPT_FROM_QUANTIZATION = ["audio_tower", "audio_projector", "lm_head", "model.visual"]
PEFT_PREFIX = "base_model.model."
"""PEFT's files name tensors below the wrapper that its own loader puts around a model."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale and dropout of the adapters; with `encoder` the Whisper encoder gets some too."""

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    encoder: bool = False


def nf4_config(compute_dtype: torch.dtype) -> Any:
    """Describe QLoRA's base: NF4 with double quantization, everything but the language model's layers left as it is."""
    require("bitsandbytes", extra="train")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=KEPT_FROM_QUANTIZATION,
    )


def dequantized(model: GraftForConditionalGeneration, dtype: torch.dtype) -> GraftForConditionalGeneration:
    """Make plain matrices of an NF4 model's, with the weights that its rounding left."""
    return model.dequantize(dtype=dtype)


def add_adapters(model: GraftForConditionalGeneration, settings: LoraSettings) -> None:
    """Inject fresh LoRA layers (float32, B zero) and leave only them trainable."""
    _inject(model, _lora_config(settings))


def _lora_config(settings: LoraSettings) -> Any:
    peft = require("peft", extra="train")
    targets = f"{LORA_TARGETS}|{ENCODER_TARGETS}" if settings.encoder else LORA_TARGETS
    return peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets, bias="none")


def _inject(model: GraftForConditionalGeneration, config: Any) -> None:
    require("peft", extra="train").inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def save_adapters(state: Mapping[str, Tensor], settings: LoraSettings, folder: str | Path) -> None:
    """Write the adapters among a model's tensors, by parameter name, as PEFT does: adapter_config.json and adapter_model.safetensors."""
    tensors = {
        PEFT_PREFIX + name.replace(".default.", "."): tensor.detach().float().cpu().contiguous()
        for name, tensor in state.items()
        if ".lora_" in name
    }
    save_file(tensors, Path(folder) / ADAPTER_FILES[1], metadata={"format": "pt"})
    config = _lora_config(settings)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def has_adapters(folder: str | Path) -> bool:
    return all((Path(folder) / name).is_file() for name in ADAPTER_FILES)


def attach_adapters(model: GraftForConditionalGeneration, folder: str | Path) -> None:
    """Inject saved adapters into a graft, unmerged. Raises ModelError when the files are missing or do not fit."""
    if not has_adapters(folder):
        raise ModelError(f"{folder} holds no adapters ({', '.join(ADAPTER_FILES)}): give the output folder of stage 2")
    peft = require("peft", extra="train")
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(Path(folder) / ADAPTER_FILES[1]).items()}
    except (SafetensorError, TypeError, ValueError) as error:
        raise ModelError(f"the adapters in {folder} can't be read ({str(error).splitlines()[0]}): copy or train them again") from error
    _inject(model, config)
    expected = {name for name in peft.get_peft_model_state_dict(model)}
    if state.keys() != expected:
        raise ModelError(f"the adapters in {folder} do not fit this graft: {len(state.keys() ^ expected)} tensors differ, train them on it")
    try:
        peft.set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        raise ModelError(f"the adapters in {folder} do not fit this graft: {str(error).splitlines()[-1].strip()}") from error


def merge_adapters(model: GraftForConditionalGeneration) -> None:
    """Fold attached adapters into the full-precision weights they sit on. Raises ModelError on a quantized base: that loses precision."""
    if getattr(model, "quantization_method", None) is not None:
        raise ModelError("adapters are merged into full-precision weights, not into 4-bit ones: load the graft without quantization")
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    del model.peft_config
