"""The two stages: what each trains of a graft, opened and frozen accordingly, on the backend that shares it between workers.

Stage 1 trains the projector between a frozen encoder and a frozen language model, or by CTC against its letters; stage 2 LoRA adapters as
well, on an NF4 base (QLoRA) or a plain one.
"""

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from graft.checkpoints.loading import DTYPES, open_graft
from graft.checkpoints.lora import LoraSettings, add_adapters, load_adapters, read_adapters
from graft.checkpoints.projector_file import load_projector
from graft.errors import ModelError, require
from graft.model.ctc import CtcPrealignment
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.projector import AudioProjector
from graft.processor import GraftProcessor
from graft.training.backends import Backend, TorchBackend
from graft.training.zero import ZeroBackend, gathered_state, sharded_loading


@dataclass(frozen=True)
class Stage:
    """What sets a stage apart: adapters or none, a quantized base or not, and the projector it starts from."""

    number: int
    lora: LoraSettings | None = None
    nf4: bool = False
    projector: str | None = None
    adapters: str | None = None
    """Folder of those to start from; None for fresh ones."""
    letters: str | None = None
    """What the projector learns to spell by CTC; None for transcripts by the language model."""


@dataclass(frozen=True)
class ComputeSettings:
    """How a stage computes, which changes its results by rounding at most."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the frozen weights and of the arithmetic; trained weights are kept in float32."""
    backend: Literal["deepspeed", "torch"] = "torch"
    zero_stage: Literal[1, 2, 3] = 2
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether the frozen weights too are shared out between the workers."""
        return self.backend == "deepspeed" and self.zero_stage == 3


def stage_model(
    stage: Stage, graft: str, computing: ComputeSettings, *, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    """Open the graft for a stage: its projector in place, everything frozen but what the stage trains, which is in float32.

    Raises ModelError for an NF4 base that is to be sharded, MissingExtra for FlashAttention where it is not installed.
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
        model.audio_projector = _whole_projector(model).to(device)
    return prepared(model, stage, computing, seed=seed), processor


def prepared(
    model: GraftForConditionalGeneration, stage: Stage, computing: ComputeSettings, *, seed: int = 0
) -> GraftForConditionalGeneration:
    """Make an open graft ready for a stage, in train mode."""
    model.audio_projector.float()  # before it is loaded, lest `dtype` round it
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
    model: GraftForConditionalGeneration | CtcPrealignment,
    computing: ComputeSettings,
    *,
    accumulation: int,
    weight_decay: float,
    max_grad_norm: float,
) -> Backend:
    """Put a stage's model under its backend."""
    bf16 = computing.dtype == "bf16"
    if computing.backend == "torch":
        return TorchBackend(model, weight_decay=weight_decay, max_grad_norm=max_grad_norm, bf16=bf16)
    return ZeroBackend(
        model,
        zero_stage=computing.zero_stage,
        accumulation=accumulation,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
    )


def trainable_module(
    model: GraftForConditionalGeneration, stage: Stage, computing: ComputeSettings, processor: GraftProcessor
) -> GraftForConditionalGeneration | CtcPrealignment:
    """What learns of a graft that is prepared for a stage: itself, or, where it is to spell, what is left of it without its language model.

    A projector that is given none to start from spells from silence on: nothing of a random one remains in what the language model reads.
    Raises ModelError for letters that are not one token each, and where weights are sharded.
    """
    if not stage.letters:
        return model
    if computing.is_sharded:
        raise ModelError(
            "ZeRO-3 has nothing to shard in CTC pre-alignment, which uses no language model: use zero_stage 1 or 2"
        )
    if not stage.projector:
        last = [module for module in model.audio_projector.modules() if isinstance(module, torch.nn.Linear)][-1]
        for parameter in last.parameters():
            torch.nn.init.zeros_(parameter)
    try:
        return CtcPrealignment(model, processor.tokenizer, stage.letters).train()
    except ValueError as error:
        raise ModelError(str(error)) from error


def _whole_projector(model: GraftForConditionalGeneration) -> AudioProjector:
    """What is trained is small, and is loaded, checked and counted whole."""
    config = model.config
    whole = AudioProjector(
        config.audio_projector, audio_width=config.audio_config.d_model, text_width=model.lm_head.in_features
    )
    whole.load_state_dict(gathered_state(model.audio_projector))
    return whole
