"""What training takes on each device, by arithmetic alone: weights, gradients, moments and activations by ZeRO stage."""

from dataclasses import dataclass
from typing import Any, Literal

from graft.model.configuration import GraftConfig
from graft.training.estimate import Parameters, matrix_parameters

Layout = Literal["ddp", "zero 1", "zero 2", "zero 3"]
LAYOUTS: tuple[Layout, ...] = ("ddp", "zero 1", "zero 2", "zero 3")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, an 8-bit scale for every 64 of them, a float32 for every 256 scales."""
LOGIT_BYTES = 10
"""Of a logit: bf16, float32, and the float32 gradient."""
SAVED_BYTES = {False: 4.0e6 / (28 * 3584), True: 5.7e6 / (28 * 3584)}
"""Activations kept for the backward pass, of a token in one layer and one unit of width, without and with LoRA: 4.0 and 5.7 MB a token
were measured at 7B (28 layers, width 3584); other shapes are scaled from there."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def device_memory(
    config: GraftConfig,
    parameters: Parameters,
    *,
    layout: Layout,
    workers: int,
    token_count: int,
    label_count: int,
    trained_frame_count: int = 0,
    nf4: bool = False,
    dtype_bytes: int = 2,
    gradient_checkpointing: bool = False,
) -> Memory:
    """Estimate what training takes on each device, for a batch of `token_count` padded tokens with `label_count` labels.

    trained_frame_count: frames that go through the encoder where it has adapters, 0 where it is frozen and keeps nothing.
    Frozen weights take `dtype_bytes`, trained ones are float32 with AdamW's two moments. ZeRO 1 shares out the moments, 2 the gradients
    too, 3 all weights, of which the largest matrix then stands gathered. The allocator's and the libraries' own memory is not counted.
    """
    text: Any = config.text_config
    audio = config.audio_config
    stage = LAYOUTS.index(layout)
    moments, gradients, weights = (1 / workers if stage > kind else 1.0 for kind in range(3))
    frozen = float((parameters.total - parameters.projector) * dtype_bytes)
    if nf4:
        frozen -= matrix_parameters(config) * (dtype_bytes - NF4_BYTES)
    gathered = text.vocab_size * text.hidden_size * dtype_bytes if weights < 1 else 0
    saved = activation_bytes(config, token_count, lora=parameters.lora > 0, checkpointing=gradient_checkpointing)
    saved += SAVED_BYTES[True] * audio.d_model * audio.encoder_layers * trained_frame_count
    return Memory(
        weights=(frozen + 4 * parameters.trained) * weights + gathered,
        gradients=4 * parameters.trained * gradients,
        optimizer=8 * parameters.trained * moments,
        activations=saved + label_count * text.vocab_size * LOGIT_BYTES,
    )


def activation_bytes(config: GraftConfig, token_count: int, *, lora: bool, checkpointing: bool) -> float:
    """Bytes that the language model keeps for the backward pass; with checkpointing each layer's input and one layer's activations."""
    text: Any = config.text_config
    layer = SAVED_BYTES[lora] * text.hidden_size * token_count
    if not checkpointing:
        return layer * text.num_hidden_layers
    return layer + 2 * text.hidden_size * token_count * text.num_hidden_layers
