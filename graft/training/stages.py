"""The two training stages: open a graft, freeze what a stage does not train, and choose the backend.

Stage 1 trains the projector between a frozen encoder and a frozen language model, or by CTC pre-alignment. Stage 2
trains LoRA adapters as well, on an NF4 base (QLoRA) or a full-precision one.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from graft.checkpoints.loading import DTYPES, open_graft
from graft.checkpoints.lora import LoraSettings, add_adapters, load_adapters, read_adapters
from graft.checkpoints.projector_file import load_projector
from graft.errors import ModelError, require
from graft.model.ctc import CtcPrealignment
from graft.model.modeling import AnyGraft
from graft.model.projector import AudioProjector
from graft.processor import GraftProcessor
from graft.training.backends import Backend, TorchBackend
from graft.training.zero import ZeroBackend, gathered_state, restore_rotary_frequencies, sharded_loading


@dataclass(frozen=True)
class Stage:
    """The parts that a stage trains and the weights that it starts from; paths are output folders of earlier stages."""

    number: int
    lora: LoraSettings | None = None
    """The adapters; None trains the projector alone."""
    nf4: bool = False
    projector: str | None = None
    """Projector to start from; None for the graft's own."""
    adapters: str | None = None
    """Adapters to start from; None for fresh ones."""
    letters: str | None = None
    """Symbols of CTC pre-alignment, "" before they are chosen by the texts; None trains by the language model's loss on
    transcripts."""


@dataclass(frozen=True)
class ComputeSettings:
    """How a stage computes; its results change by rounding only."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of the frozen weights and of the arithmetic; trained weights are float32."""
    backend: Literal["deepspeed", "torch"] = "torch"
    zero_stage: Literal[1, 2, 3] = 2
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether the frozen weights are sharded over the workers, too."""
        return self.backend == "deepspeed" and self.zero_stage == 3


def open_for_stage(
    stage: Stage, graft: str, computing: ComputeSettings, *, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[AnyGraft, GraftProcessor]:
    """Open a graft for a stage: the projector is loaded, and all is frozen except the trained weights, in float32.

    Raises ModelError for an NF4 base that would be sharded, and MissingExtra where FlashAttention is not installed.
    """
    if computing.is_sharded and stage.nf4:
        raise ModelError("ZeRO-3 can't shard an NF4 base: use quantize=none, or zero_stage 1 or 2")
    if computing.attention == "flash_attention_2":
        require("flash_attn", extra="flash")
    loading = sharded_loading(bf16=computing.dtype == "bf16") if computing.is_sharded else contextlib.nullcontext()
    with loading:
        model, processor = open_graft(
            graft, dtype=DTYPES[computing.dtype], device=device, nf4=stage.nf4, attention=computing.attention
        )
    if computing.is_sharded:
        restore_rotary_frequencies(model)
        # The projector is small, and is loaded and checked whole.
        projector = AudioProjector.from_config(model.config, text_width=model.lm_head.in_features)
        projector.load_state_dict(gathered_state(model.audio_projector))
        model.audio_projector = projector.to(device)
    return prepare_for_stage(model, stage, computing, seed=seed), processor


def prepare_for_stage(model: AnyGraft, stage: Stage, computing: ComputeSettings, *, seed: int = 0) -> AnyGraft:
    """Load an open graft's projector and adapters, freeze the other weights, and set it to train mode."""
    model.audio_projector.float()  # before loading, which would round it to `dtype`
    if stage.projector:
        load_projector(model, stage.projector)
    model.requires_grad_(False)
    if stage.lora:
        torch.manual_seed(seed)
        add_adapters(model, stage.lora)
        if stage.adapters:
            load_adapters(model, read_adapters(stage.adapters)[0], source=stage.adapters)
    model.audio_projector.requires_grad_(True)
    if computing.gradient_checkpointing:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if computing.compile:
        for layer in [*model.model.language_model.layers, *model.audio_tower.layers]:
            layer.compile(dynamic=True)
    return model.train()


def make_backend(
    model: AnyGraft | CtcPrealignment,
    computing: ComputeSettings,
    *,
    accumulation: int,
    weight_decay: float,
    max_grad_norm: float,
    lr_scales: Mapping[str, float] | None = None,
) -> Backend:
    """Make the backend that trains a stage's model; `lr_scales` are parameter_groups'."""
    bf16 = computing.dtype == "bf16"
    if computing.backend == "torch":
        return TorchBackend(
            model, weight_decay=weight_decay, max_grad_norm=max_grad_norm, bf16=bf16, lr_scales=lr_scales
        )
    return ZeroBackend(
        model,
        zero_stage=computing.zero_stage,
        accumulation=accumulation,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        lr_scales=lr_scales,
    )


def trainable_module(
    model: AnyGraft, stage: Stage, computing: ComputeSettings, processor: GraftProcessor
) -> AnyGraft | CtcPrealignment:
    """Return the module that a stage trains: the graft itself, or CtcPrealignment on its encoder and projector.

    Pre-alignment without a projector to start from begins at zero, so that no part of a random projection remains in
    the audio embeddings. Raises ModelError for letters that are not one token each, and for sharded weights.
    """
    if not stage.letters:
        return model
    if computing.is_sharded:
        raise ModelError(
            "ZeRO-3 has nothing to shard in CTC pre-alignment, which uses no language model: use zero_stage 1 or 2"
        )
    if not stage.projector and model.config.audio_projector != "conv":  # whose norm has no gradient at zero
        last = [module for module in model.audio_projector.modules() if isinstance(module, torch.nn.Linear)][-1]
        for parameter in last.parameters():
            torch.nn.init.zeros_(parameter)
    try:
        return CtcPrealignment(model, processor.tokenizer, stage.letters).train()
    except ValueError as error:
        raise ModelError(str(error)) from error
