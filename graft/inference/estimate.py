"""Estimate speed and memory of transcription from a model's configuration; no weights are read and nothing runs.

    chunk -> encoder, projector and prompt (arithmetic) -> decode steps, shared by the rows that decode together: each
    reads all weights of the language model and the rows' keys and values (memory), or computes for longer than that

The estimate is of the transformers engine. A GPU reaches a share of its peaks: an H200 transcribed 821 and 702 s of
audio a second at 7B in clips of 10 and 30 s, where its peaks would allow twice as much.
"""

from dataclasses import dataclass

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from graft.inference.engines.kv_cache import COLUMNS, round_up_columns
from graft.inference.engines.scheduler import ENCODER_ROWS
from graft.inference.int8 import quantized_bytes
from graft.inference.transcriber import BATCH_TOKENS, PREFILL_TOKENS
from graft.model.configuration import WINDOW_FRAMES, AnyGraftConfig, GraftConfig, audio_token_count
from graft.model.modeling import graft_class
from graft.processor import max_new_tokens
from graft.training.devices import Device
from graft.training.estimate import (
    LABELS_PER_S,
    PROMPT_TOKENS,
    count_parameters,
    encoded_frames,
    encoder_flops,
    matrix_parameters,
    projector_flops,
    text_forward_flops,
)

FRAMES_PER_S = WINDOW_FRAMES // 30
GPU_SHARE = 0.5
"""Share of a GPU's peaks that is reached: with it, the estimate for an H200 is within 6 % of both measurements."""
THREAD_FLOPS = 50e9
"""FLOP/s of a CPU thread, all work together, measured with the small graft: 4.5 s of audio a second in clips of 3.7 s
and 5.3 in clips of 7.4 s on one thread of an AMD EPYC (AVX-512 with BF16, fp32, 2026-11-27)."""
INT8_THREAD_FLOPS = 110e9
"""The same with int8 weights, which oneDNN multiplies with VNNI."""
WHISPER_PROMPT_TOKENS = 4


@dataclass(frozen=True)
class ChunkWork:
    """What a model computes for a chunk of speech, and the memory that it takes."""

    chunk_s: float
    prompt_flops: float
    """FLOPs to encode the chunk and to read its prompt."""
    token_flops: float
    """FLOPs for each token of the answer."""
    answer_tokens: float
    step_bytes: float
    """Bytes of the weights that a decode step reads, whatever the number of rows."""
    row_bytes: float
    """Bytes of keys and values that a decode step reads for each row."""
    rows: int
    """Number of chunks that decode together where there are enough of them."""


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes on one device in transcription."""

    weights: float
    cache: float
    """Keys and values of the rows that decode together."""
    activations: float

    @property
    def total(self) -> float:
        """All of them. The memory of CUDA's libraries and of the allocator's gaps is not included."""
        return self.weights + self.cache + self.activations


def graft_work(config: AnyGraftConfig, *, chunk_s: float, dtype_bytes: int, kind: str = "cuda") -> ChunkWork:
    """Count a graft's work for chunks that last `chunk_s`; `kind` is cpu or cuda."""
    frames = round(chunk_s * FRAMES_PER_S)
    prompt, answer = _prompt_tokens(config, chunk_s), LABELS_PER_S[config.text_style] * chunk_s + 1
    text = config.text_config
    projector = projector_flops(config, [frames], to_encoder=True) / 3  # of which two thirds are the backward pass
    step_weights = matrix_parameters(config) + text.vocab_size * text.hidden_size  # the head reads its table, too
    return ChunkWork(
        chunk_s=chunk_s,
        prompt_flops=encoder_flops(config, [frames]) + projector + text_forward_flops(config, [prompt]),
        token_flops=2.0 * step_weights,
        answer_tokens=answer,
        step_bytes=step_weights * dtype_bytes,
        row_bytes=(prompt + answer / 2) * token_cache_bytes(config, dtype_bytes),
        rows=max(1, BATCH_TOKENS[kind] // round_up_columns(prompt + max_new_tokens(chunk_s))),
    )


def whisper_work(config: WhisperConfig, *, chunk_s: float, dtype_bytes: int, kind: str = "cuda") -> ChunkWork:
    """Count plain Whisper's work for chunks that last `chunk_s`, of which it encodes the whole 30 s window."""
    width, layers = config.d_model, config.decoder_layers
    window = WINDOW_FRAMES // 2
    as_graft = GraftConfig(audio_config=config.to_dict(), audio_context="full")
    layer = 6 * width**2 + 2 * width * config.decoder_ffn_dim  # without the keys and values of the encoder's states
    weights = layers * layer + config.vocab_size * width
    states = 2 * layers * width * window  # keys and values of the encoder's states
    answer = LABELS_PER_S["formatted"] * chunk_s + 1
    token = 2.0 * weights + 4 * layers * width * (window + answer / 2)
    prompt = encoder_flops(as_graft, [WINDOW_FRAMES]) + 2 * width * states + WHISPER_PROMPT_TOKENS * token
    cache = (states + layers * width * answer) * dtype_bytes
    return ChunkWork(chunk_s, prompt, token, answer, weights * dtype_bytes, cache, _whisper_rows(config, kind))


def audio_rate(work: ChunkWork, device: Device, share: float) -> float:
    """Return the seconds of audio that a device transcribes in a second, at a share of its peaks."""
    # A step takes as long as the memory needs to deliver its bytes, or the arithmetic units for its FLOPs.
    step_bytes = work.step_bytes + work.rows * work.row_bytes
    step_s = max(step_bytes / device.bytes_per_s, work.rows * work.token_flops / device.flops)
    chunk_s = work.prompt_flops / device.flops + work.answer_tokens * step_s / work.rows
    return share * work.chunk_s / chunk_s


def cpu(threads: int, *, int8: bool = False) -> Device:
    """Describe CPU threads as a device, by what they reach: their share is 1, and memory does not limit them."""
    return Device(threads * (INT8_THREAD_FLOPS if int8 else THREAD_FLOPS), float("inf"), float("inf"))


def graft_memory(
    config: AnyGraftConfig, *, chunk_s: float, dtype_bytes: int, kind: str = "cuda", int8: bool = False
) -> InferenceMemory:
    """Estimate the memory of the transformers engine with chunks of up to `chunk_s`, full batches and one prefill.

    With `int8`, linear layers have int8 weights; all else takes `dtype_bytes`.
    """
    text, audio = config.text_config, config.audio_config
    prompt = _prompt_tokens(config, chunk_s)
    slot = round_up_columns(prompt + max_new_tokens(chunk_s))
    tokens = max(BATCH_TOKENS[kind], slot)
    cache = tokens * token_cache_bytes(config, dtype_bytes)
    spare = cache / (2 * text.num_hidden_layers)  # the slots keep the room of one layer's keys to move rows
    # One prefill: its prompts' hidden states in a layer, their keys and values, the clips in an encoder layer, logits.
    rows = max(1, min(ENCODER_ROWS, PREFILL_TOKENS[kind] // prompt))
    frames = encoded_frames(config, [round(chunk_s * FRAMES_PER_S)])[0]
    hidden = rows * prompt * (4 * text.hidden_size + 3 * text.intermediate_size) * dtype_bytes
    encoded = rows * frames * (4 * audio.d_model + 2 * audio.encoder_ffn_dim) * dtype_bytes
    read = rows * prompt * token_cache_bytes(config, dtype_bytes)
    logits = max(rows, tokens // slot) * text.vocab_size * (4 + dtype_bytes)
    weights: float = count_parameters(config).total * dtype_bytes
    if int8:
        with torch.device("meta"):
            weights = quantized_bytes(graft_class(config)(config))
    return InferenceMemory(weights, cache + spare, max(hidden, encoded) + read + logits)


def whisper_memory(
    config: WhisperConfig, *, dtype_bytes: int, kind: str = "cuda", int8: bool = False
) -> InferenceMemory:
    """Estimate the memory of the transformers engine with plain Whisper, full batches and one prefill.

    `int8` is as in graft_memory.
    """
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    weights: float = sum(parameter.numel() for parameter in model.parameters()) * dtype_bytes
    if int8:
        weights = quantized_bytes(model)
    rows, width, window = _whisper_rows(config, kind), config.d_model, config.max_source_positions
    columns = round_up_columns(config.max_target_positions)
    layer = rows * width * dtype_bytes  # keys of one position of all rows in one layer
    cache = layer * (2 * config.decoder_layers * (columns + window) + columns)  # the slots keep room to move rows
    read = min(rows, ENCODER_ROWS)
    encoded = read * window * (4 * width + 2 * config.encoder_ffn_dim) * dtype_bytes
    states = 2 * config.decoder_layers * read * window * width * dtype_bytes
    return InferenceMemory(weights, cache, encoded + states + rows * config.vocab_size * (4 + dtype_bytes))


def _whisper_rows(config: WhisperConfig, kind: str) -> int:
    return max(1, BATCH_TOKENS[kind] // (config.max_source_positions + COLUMNS))


def token_cache_bytes(config: AnyGraftConfig, dtype_bytes: int) -> int:
    """Count the bytes of a token's keys and values in all layers of the language model."""
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * width * dtype_bytes


def _prompt_tokens(config: AnyGraftConfig, chunk_s: float) -> int:
    frames = round(chunk_s * FRAMES_PER_S)
    audio = audio_token_count(frames, pool=config.audio_pool, context=config.audio_context)
    return PROMPT_TOKENS[config.prompt_style] + audio
