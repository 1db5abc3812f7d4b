"""What training costs, by arithmetic alone: parameters and FLOPs from a GraftConfig; no weights are read and nothing runs.

A FLOP is one multiplication or one addition of a matrix product. The frozen parts have no weight gradients: the encoder runs forward only,
the language model forward and backward to its activations, which is two forwards and not three.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from graft.model.configuration import WINDOW_FRAMES, GraftConfig, audio_token_count
from graft.model.encoder import ENCODER_FRAMES_PER_S
from graft.model.modeling import GraftForConditionalGeneration

# Dense bf16 with float32 sums, TFLOP/s: an H200 as measured in large matrix products, the others as their makers state them. All words of a
# key must stand in the device's name; the first key that fits counts.
PEAKS: dict[tuple[str, ...], float | None] = {
    ("mig",): None,
    ("laptop",): None,
    ("b200",): 2250,
    ("gh200",): 989,
    ("h200",): 790,
    ("h100", "pcie"): 756,
    ("h100", "nvl"): 835,
    ("h100",): 989,
    ("a100",): 312,
    ("a40",): 150,
    ("a30",): 165,
    ("a10",): 125,
    ("a10g",): 70,
    ("a6000",): 155,
    ("l40s",): 362,
    ("l40",): 181,
    ("l4",): 121,
    ("6000", "ada"): 364,
    ("5090",): 210,
    ("4090",): 165,
    ("3090",): 71,
}


def device_peak_flops(name: str) -> float | None:
    """The bf16 FLOP/s of a GPU by what torch.cuda.get_device_name calls it, or by a word such as `h200`; None where unknown."""
    words = name_words(name)
    peak = next((peak for key, peak in PEAKS.items() if words.issuperset(key)), None)
    return None if peak is None else peak * 1e12


def name_words(name: str) -> frozenset[str]:
    """The words of a GPU's name, in lower case."""
    return frozenset(re.split(r"[^a-z0-9]+", name.lower()))


@dataclass(frozen=True)
class Parameters:
    """Parameters of a graft by part; `text` is the language model without its head, which has none of its own where it is tied."""

    audio_tower: int
    projector: int
    text: int
    lm_head: int
    vision: int
    lora: int = 0

    @property
    def total(self) -> int:
        """All but the adapters."""
        return self.audio_tower + self.projector + self.text + self.lm_head + self.vision

    @property
    def trained(self) -> int:
        return self.projector + self.lora


def count_parameters(config: GraftConfig, *, lora_rank: int | None = None, lora_encoder: bool = False) -> Parameters:
    """Count a graft's parameters on torch's meta device; the adapters are those of stage 2 at a rank."""
    with torch.device("meta"):
        model = GraftForConditionalGeneration(config)
    lm_head = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    language_model: Any = model.model.language_model
    return Parameters(
        audio_tower=_count(model.audio_tower),
        projector=_count(model.audio_projector),
        text=_count(language_model),
        lm_head=lm_head,
        vision=_count(model.model.visual),
        lora=lora_parameters(config, lora_rank) + (encoder_lora_parameters(config, lora_rank) if lora_encoder else 0),
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_matrices(config: GraftConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the seven matrices in one layer of the language model: those that LoRA adapts and NF4 quantizes."""
    text = _text(config)
    width, inner = text.hidden_size, text.intermediate_size
    heads = text.num_attention_heads * _head_width(config)
    keys = text.num_key_value_heads * _head_width(config)
    return [
        (width, heads),
        (width, keys),
        (width, keys),
        (heads, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]


def encoder_matrices(config: GraftConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the six matrices in one layer of the Whisper encoder."""
    width, inner = config.audio_config.d_model, config.audio_config.encoder_ffn_dim
    return [*[(width, width)] * 4, (width, inner), (inner, width)]


def matrix_parameters(config: GraftConfig) -> int:
    """Weights in the matrices of all layers of the language model."""
    return _text(config).num_hidden_layers * _weights(layer_matrices(config))


def lora_parameters(config: GraftConfig, rank: int | None) -> int:
    """Weights of adapters on all those matrices."""
    return (rank or 0) * _text(config).num_hidden_layers * sum(map(sum, layer_matrices(config)))


def encoder_lora_parameters(config: GraftConfig, rank: int | None) -> int:
    """Weights of adapters on the Whisper encoder."""
    return (rank or 0) * config.audio_config.encoder_layers * sum(map(sum, encoder_matrices(config)))


def _weights(matrices: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in matrices)


def batch_flops(
    config: GraftConfig,
    *,
    token_counts: Sequence[int] | np.ndarray,
    label_count: int,
    frame_counts: Sequence[int] | np.ndarray,
    lora_rank: int | None,
    gradient_checkpointing: bool,
    lora_encoder: bool = False,
) -> float:
    """FLOPs of training on a batch of clips, padding excluded.

    token_counts: prompt, audio and answer of each clip; label_count: label tokens of all clips; frame_counts: each clip's mel frames, 100 a
    second; lora_encoder: the encoder has adapters too. What gradient checkpointing computes again is counted again, whole layers at a time.
    """
    audio = encoder_flops(config, frame_counts, lora_rank=lora_rank if lora_encoder else None)
    audio += projector_flops(config, frame_counts, to_encoder=lora_encoder)
    return (
        audio
        + text_flops(config, token_counts, lora_rank=lora_rank, again=gradient_checkpointing)
        + head_flops(config, label_count)
    )


def encoder_flops(
    config: GraftConfig, frame_counts: Sequence[int] | np.ndarray, *, lora_rank: int | None = None
) -> float:
    """FLOPs of the Whisper encoder over what `audio_context` has it encode: forward, and with adapters of a rank backward too."""
    audio = config.audio_config
    frames = encoded_frames(config, frame_counts)
    convolutions = (
        2 * 3 * audio.d_model * (2 * audio.num_mel_bins + audio.d_model) * frames.sum()
    )  # two mel frames to an encoder frame
    matrices = 2 * audio.encoder_layers * _weights(encoder_matrices(config)) * frames.sum()
    attention = 4 * audio.encoder_layers * audio.d_model * (frames**2).sum()
    adapters = 2 * encoder_lora_parameters(config, lora_rank) * frames.sum()
    backward = matrices + 2 * attention + 2 * adapters if lora_rank else 0.0
    return float(convolutions + matrices + attention + adapters + backward)


def encoded_frames(config: GraftConfig, frame_counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Encoder frames, 50 a second, that each clip has encoded."""
    window = WINDOW_FRAMES // 2
    if config.audio_context != "valid":
        return np.full(len(frame_counts), window, dtype=np.float64)
    own = (np.asarray(frame_counts, dtype=np.float64) + 1) // 2
    return np.minimum(own + round(config.audio_margin_s * ENCODER_FRAMES_PER_S), window)


def projector_flops(
    config: GraftConfig, frame_counts: Sequence[int] | np.ndarray, *, to_encoder: bool = False
) -> float:
    """FLOPs of the projector, forward and backward; where the encoder is frozen nothing flows back into it."""
    kinds, clips = np.unique(np.asarray(frame_counts), return_counts=True)
    counts = [audio_token_count(int(kind), pool=config.audio_pool, context=config.audio_context) for kind in kinds]
    tokens = sum(int(number) * count for number, count in zip(clips, counts, strict=True))
    first = config.audio_config.d_model * _text(config).hidden_size
    second = _text(config).hidden_size ** 2 if config.audio_projector == "mlp" else 0
    return float(tokens * ((6 if to_encoder else 4) * first + 6 * second))


def text_flops(
    config: GraftConfig, token_counts: Sequence[int] | np.ndarray, *, lora_rank: int | None, again: bool
) -> float:
    """FLOPs of the language model's layers, forward and backward; `again` adds the forward pass that gradient checkpointing repeats."""
    lengths = np.asarray(token_counts, dtype=np.float64)
    text = _text(config)
    matrices = 2 * matrix_parameters(config) * lengths.sum()
    adapters = 2 * lora_parameters(config, lora_rank) * lengths.sum()
    # Scores and values, of which a causal token sees half.
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * _head_width(config) * (lengths**2).sum()
    forward = matrices + attention + adapters
    backward = matrices + 2 * attention + 2 * adapters
    return float(forward * (2 if again else 1) + backward)


def head_flops(config: GraftConfig, label_count: int) -> float:
    """FLOPs of the logits at label positions, forward and backward."""
    return 4.0 * _text(config).vocab_size * _text(config).hidden_size * label_count


def _head_width(config: GraftConfig) -> int:
    return _text(config).hidden_size // _text(config).num_attention_heads


def _text(config: GraftConfig) -> Any:
    return config.text_config


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
