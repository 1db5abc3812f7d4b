"""Estimate parameters, FLOPs and device memory of training from a GraftConfig; no weights are read and nothing runs.

A FLOP is one multiplication or one addition of a matrix product. Frozen weights have no weight gradients: a frozen
encoder only runs forward, and the backward pass of a frozen language model costs one more forward pass instead of two.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from graft.model.configuration import WINDOW_FRAMES, AnyGraftConfig, GraftConfig, TextGraftConfig, audio_token_count
from graft.model.encoder import ENCODER_FRAMES_PER_S
from graft.model.modeling import graft_class
from graft.model.projector import KERNEL_SIZE

Counts = Sequence[int] | np.ndarray

PROMPT_TOKENS = {"graft": 16, "reference": 27}
"""Number of tokens of a prompt without its audio, by prompt style."""
LABELS_PER_S = {"raw": 4.0, "lower": 3.0, "formatted": 3.2}
"""Tokens of a transcript per second of speech, by text style: 2.7 words of English, of 1.45 (raw is in capitals), 1.09
and 1.16 tokens each in Qwen2's tokenizer."""
Layout = Literal["ddp", "zero 1", "zero 2", "zero 3"]
LAYOUTS: tuple[Layout, ...] = ("ddp", "zero 1", "zero 2", "zero 3")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: 4 bits, an 8-bit scale for every 64 weights, a float32 for every 256 scales."""
LOGIT_BYTES = 10
"""Bytes of a logit in training: bf16, float32, and the float32 gradient."""
SAVED_BYTES = {False: 4.0e6 / (28 * 3584), True: 5.7e6 / (28 * 3584)}
"""Bytes saved for the backward pass, per token, layer and unit of width, without and with LoRA.

4.0 and 5.7 MB per token were measured at 7B (28 layers, width 3584); other shapes are scaled from there.
"""


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of each part; `text` is the language model without `lm_head`, which counts 0 if tied."""

    audio_tower: int
    projector: int
    text: int
    lm_head: int
    vision: int
    lora: int = 0

    @property
    def total(self) -> int:
        """All parameters except the adapters'."""
        return self.audio_tower + self.projector + self.text + self.lm_head + self.vision

    @property
    def trained(self) -> int:
        return self.projector + self.lora


def count_parameters(config: AnyGraftConfig, *, lora_rank: int | None = None, lora_encoder: bool = False) -> Parameters:
    """Count a graft's parameters on torch's meta device; `lora_rank` and `lora_encoder` describe stage 2's adapters."""
    lora = lora_parameters(config, lora_rank) + (encoder_lora_parameters(config, lora_rank) if lora_encoder else 0)
    return replace(_count_parts(config.to_json_string()), lora=lora)


@cache
def _count_parts(config_json: str) -> Parameters:
    values = json.loads(config_json)
    config = (GraftConfig if values["model_type"] == GraftConfig.model_type else TextGraftConfig)(**values)
    with torch.device("meta"):
        model = graft_class(config)(config)
    inner: Any = model.model
    parts = {
        "audio_tower": model.audio_tower,
        "projector": model.audio_projector,
        "text": inner.language_model,
        "vision": getattr(inner, "visual", torch.nn.Module()),
    }
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    lm_head = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    return Parameters(**counts, lm_head=lm_head)


def batch_flops(
    config: AnyGraftConfig,
    *,
    token_counts: Counts,
    label_count: int,
    frame_counts: Counts,
    lora_rank: int | None,
    gradient_checkpointing: bool,
    lora_encoder: bool = False,
) -> float:
    """Count the FLOPs of training on a batch of clips, padding excluded.

    Args:
        token_counts: number of tokens of each clip: prompt, audio and answer.
        label_count: number of label tokens of all clips.
        frame_counts: number of mel frames of each clip, 100 per second.
        lora_rank: rank of the adapters on the language model; None for none.
        gradient_checkpointing: count the forward pass that is repeated, too.
        lora_encoder: whether the encoder has adapters of that rank, too.
    """
    return (
        encoder_flops(config, frame_counts, lora_rank=lora_rank if lora_encoder else None)
        + projector_flops(config, frame_counts, to_encoder=lora_encoder)
        + text_flops(config, token_counts, lora_rank=lora_rank, repeats_forward=gradient_checkpointing)
        + 4.0 * _text(config).vocab_size * _text(config).hidden_size * label_count  # logits, forward and backward
    )


def validation_flops(
    config: AnyGraftConfig,
    *,
    token_counts: Counts,
    label_count: int,
    frame_counts: Counts,
    lora_rank: int | None,
) -> float:
    """Count the FLOPs of the loss of clips, without its gradients; the arguments are those of batch_flops."""
    return (
        encoder_flops(config, frame_counts)
        + projector_flops(config, frame_counts, to_encoder=True) / 3  # a third is the forward pass
        + text_forward_flops(config, token_counts, lora_rank=lora_rank)
        + 2.0 * _text(config).vocab_size * _text(config).hidden_size * label_count
    )


def encoder_flops(config: AnyGraftConfig, frame_counts: Counts, *, lora_rank: int | None = None) -> float:
    """Count the encoder's FLOPs on the frames that it encodes; with adapters the backward pass, too."""
    audio = config.audio_config
    frames = encoded_frames(config, frame_counts)  # (clips,)
    # Kernels of 3; the first convolution runs on mel frames, of which there are two to an encoder frame.
    convolutions = 2 * 3 * audio.d_model * (2 * audio.num_mel_bins + audio.d_model) * frames.sum()
    matrices = 2 * audio.encoder_layers * sum(map(math.prod, encoder_matrices(config))) * frames.sum()
    attention = 4 * audio.encoder_layers * audio.d_model * (frames**2).sum()
    adapters = 2 * encoder_lora_parameters(config, lora_rank) * frames.sum()
    backward = matrices + 2 * attention + 2 * adapters if lora_rank else 0.0
    return float(convolutions + matrices + attention + adapters + backward)


def encoded_frames(config: AnyGraftConfig, frame_counts: Counts) -> np.ndarray:
    """Count the encoder frames (50 per second) that each clip is encoded with, as float64 (clips,)."""
    window = WINDOW_FRAMES // 2
    if config.audio_context != "valid":
        return np.full(len(frame_counts), window, dtype=np.float64)
    own = (np.asarray(frame_counts, dtype=np.float64) + 1) // 2
    return np.minimum(own + round(config.audio_margin_s * ENCODER_FRAMES_PER_S), window)


def projector_flops(config: AnyGraftConfig, frame_counts: Counts, *, to_encoder: bool = False) -> float:
    """Count the projector's FLOPs, forward and backward; `to_encoder` adds the gradient of its input."""
    lengths, clips = np.unique(np.asarray(frame_counts), return_counts=True)
    counts = [audio_token_count(int(one), pool=config.audio_pool, context=config.audio_context) for one in lengths]
    tokens = int(np.dot(clips, counts))
    width, text_width = config.audio_config.d_model, _text(config).hidden_size
    if config.audio_projector == "conv":  # norms are trained before each matrix, so every input has a gradient
        block = (KERNEL_SIZE + 4 * width) * width
        blocks = config.audio_projector_blocks * config.audio_pool * block
        return 6.0 * tokens * (blocks + (config.audio_pool * width + text_width) * text_width)
    second = text_width**2 if config.audio_projector == "mlp" else 0
    return float(tokens * ((6 if to_encoder else 4) * width * text_width + 6 * second))


def text_flops(config: AnyGraftConfig, token_counts: Counts, *, lora_rank: int | None, repeats_forward: bool) -> float:
    """Count the FLOPs of the language model's layers, forward and backward.

    `repeats_forward` adds the forward pass that gradient checkpointing repeats.
    """
    forward = text_forward_flops(config, token_counts, lora_rank=lora_rank)
    adapters = 2 * lora_parameters(config, lora_rank) * float(np.sum(token_counts))
    backward = forward + _attention_flops(config, token_counts) + adapters
    return forward * (2 if repeats_forward else 1) + backward


def text_forward_flops(config: AnyGraftConfig, token_counts: Counts, *, lora_rank: int | None = None) -> float:
    """Count the FLOPs of the language model's layers in a forward pass over clips of these lengths."""
    weights = matrix_parameters(config) + lora_parameters(config, lora_rank)
    return 2 * weights * float(np.sum(token_counts)) + _attention_flops(config, token_counts)


def _attention_flops(config: AnyGraftConfig, token_counts: Counts) -> float:
    # Scores and weighted values cost 4 FLOPs per pair of tokens and unit of width; causal attention has half the pairs.
    pairs, text = (np.asarray(token_counts, dtype=np.float64) ** 2).sum(), _text(config)
    return float(2 * text.num_hidden_layers * text.num_attention_heads * head_width(text) * pairs)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def device_memory(
    config: AnyGraftConfig,
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
    """Estimate the memory that training takes on each device.

    Args:
        layout: plain DDP, or the ZeRO stage. ZeRO 1 shards the optimizer's moments over the workers, 2 the gradients
            too, 3 all weights too, with the largest matrix gathered on each device.
        token_count: number of tokens in a batch, padding included.
        label_count: number of label tokens in a batch.
        trained_frame_count: number of encoder frames in a batch where the encoder has adapters; 0 where it is frozen.
        nf4: whether the language model's layers are quantized to NF4.
        dtype_bytes: bytes of a frozen weight. Trained weights are float32 with AdamW's two moments.

    The memory of CUDA's libraries and of the allocator's gaps is not included.
    """
    text, audio = _text(config), config.audio_config
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


def network_bytes(
    config: AnyGraftConfig,
    parameters: Parameters,
    *,
    layout: Layout,
    workers: int,
    accumulation: int,
    dtype_bytes: int = 2,
    gradient_checkpointing: bool = False,
) -> float:
    """Count the bytes that each worker sends to the others for one update of the weights.

    Around a ring of W workers an all-reduce sends 2 (W - 1) / W times its tensor from each, a gather or a scatter half
    of that (Patarasuk and Yuan 2009). DDP reduces gradients in float32 once. DeepSpeed uses the dtype of the
    arithmetic: ZeRO 1 reduces gradients once and ZeRO 2 after each batch, and both then gather the updated weights;
    ZeRO 3 gathers all weights in each forward pass and the language model's in each backward pass, and scatters
    gradients (Rajbhandari et al. 2020, section 7).

    Args:
        layout: plain DDP, or the ZeRO stage.
        workers: number of workers.
        accumulation: number of batches of each worker in one update.
        dtype_bytes: bytes of a weight in the dtype of the arithmetic.
        gradient_checkpointing: whether the backward pass repeats the forward pass of the language model's layers.
    """
    trained = parameters.trained * dtype_bytes
    if layout == "ddp":
        tensors = 2 * parameters.trained * 4.0
    elif layout == "zero 3":
        forward = parameters.total - parameters.vision + parameters.lora
        backward = matrix_parameters(config) * (2 if gradient_checkpointing else 1) + parameters.lm_head
        tensors = accumulation * ((forward + backward + parameters.trained) * dtype_bytes + trained)
    else:
        tensors = (2 * (accumulation if layout == "zero 2" else 1) + 1) * trained
    return tensors * (workers - 1) / workers


def activation_bytes(config: AnyGraftConfig, token_count: int, *, lora: bool, checkpointing: bool) -> float:
    """Estimate the bytes that the language model keeps for the backward pass.

    With gradient checkpointing these are each layer's input and one layer's activations.
    """
    text = _text(config)
    layer = SAVED_BYTES[lora] * text.hidden_size * token_count
    if not checkpointing:
        return layer * text.num_hidden_layers
    return layer + 2 * text.hidden_size * token_count * text.num_hidden_layers


def layer_matrices(config: AnyGraftConfig) -> list[tuple[int, int]]:
    """List inputs and outputs of the seven matrices of a language model layer, which LoRA adapts and NF4 quantizes."""
    text = _text(config)
    width, inner = text.hidden_size, text.intermediate_size
    queries, keys = (heads * head_width(text) for heads in (text.num_attention_heads, text.num_key_value_heads))
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def head_width(text: Any) -> int:
    """Return the width of an attention head by a language model's configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def encoder_matrices(config: AnyGraftConfig) -> list[tuple[int, int]]:
    """List inputs and outputs of the six matrices of a Whisper encoder layer."""
    width, inner = config.audio_config.d_model, config.audio_config.encoder_ffn_dim
    return [*[(width, width)] * 4, (width, inner), (inner, width)]


def matrix_parameters(config: AnyGraftConfig) -> int:
    """Count the weights in the matrices of all layers of the language model."""
    return _text(config).num_hidden_layers * sum(map(math.prod, layer_matrices(config)))


def lora_parameters(config: AnyGraftConfig, rank: int | None) -> int:
    """Count the weights of adapters of this rank on all layers of the language model; None counts 0."""
    return (rank or 0) * _text(config).num_hidden_layers * sum(map(sum, layer_matrices(config)))


def encoder_lora_parameters(config: AnyGraftConfig, rank: int | None) -> int:
    """Count the weights of adapters of this rank on all layers of the encoder; None counts 0."""
    return (rank or 0) * config.audio_config.encoder_layers * sum(map(sum, encoder_matrices(config)))


def _text(config: AnyGraftConfig) -> Any:
    return config.text_config
