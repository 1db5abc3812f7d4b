"""Convert CTranslate2's Whisper base for transformers: model.bin -> variables -> state dict -> checkpoint folder."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from graft.errors import ModelError

CTRANSLATE2_MODULES: dict[str, tuple[str, ...]] = {  # fused projections are stacked along the first axis
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}


def write_whisper(data: bytes, decoding: dict[str, Any], tokenizer_path: Path, folder: Path) -> None:
    """Write CTranslate2's Whisper base as a WhisperForConditionalGeneration folder in float32.

    Args:
        data: the content of model.bin.
        decoding: the config.json beside it: suppressed tokens, languages, alignment heads.

    Raises ModelError for another version of the format.
    """
    state = whisper_state(read_ctranslate2(data))
    vocab_size, width = state["model.decoder.embed_tokens.weight"].shape
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
        begin_suppress_tokens=decoding["suppress_ids_begin"],
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, strict=True, assign=True)
    backend = Tokenizer.from_file(str(tokenizer_path))
    special = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    tokenizer = WhisperTokenizer(
        tokenizer_object=backend, pad_token=special[0], extra_special_tokens=special[1:], model_max_length=448
    )
    # The package's tokenizer lacks the timestamps; with them its size equals the embedding table's.
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", normalized=True, special=False) for i in range(1501)])
    model.generation_config = GenerationConfig(
        alignment_heads=decoding["alignment_heads"],
        suppress_tokens=decoding["suppress_ids"],
        begin_suppress_tokens=decoding["suppress_ids_begin"],
        lang_to_id={tokenizer.convert_ids_to_tokens(i): i for i in decoding["lang_ids"]},
        task_to_id={task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        task="transcribe",  # generate() gives the model no task without it, unless a language is given
        is_multilingual=True,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        return_timestamps=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """Read the variables of a CTranslate2 model.bin of binary version 6.

    The format is little-endian, see model_spec.py in OpenNMT/CTranslate2: u32 version, string spec, u32 revision, u32
    count; for each variable string name, u8 rank, u32 dimensions, u8 type, u32 byte count, bytes; then aliases, which
    are ignored. A string is a u16 length and that many bytes, the last one NUL.
    """
    types = [np.float32, np.int8, np.int16, np.int32, np.float16]
    file = io.BytesIO(data)

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "little")

    def string() -> str:
        return file.read(number(2))[:-1].decode()

    version, _, _ = number(4), string(), number(4)
    if version != 6:
        raise ModelError(f"CTranslate2 binary version {version}, expected 6: convert the model again")
    variables = {}
    for _ in range(number(4)):
        name = string()
        shape = [number(4) for _ in range(number(1))]
        dtype = np.dtype(types[number(1)])
        variables[name] = np.frombuffer(file.read(number(4)), dtype).reshape(shape)
    return variables


def whisper_state(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Rename CTranslate2's Whisper variables to a WhisperForConditionalGeneration state dict in float32.

    Scalar flags are left out.
    """
    leaves = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
    state = {}
    for name, value in variables.items():
        match = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
        if match is None:
            continue
        side, layer, module, leaf = match.groups()
        prefix = f"model.{side}." if layer is None else f"model.{side}.layers.{layer}."
        targets = CTRANSLATE2_MODULES.get(module, (module,))
        for target, part in zip(targets, np.split(value, len(targets)), strict=True):
            if target.endswith("k_proj") and leaf == "bias":
                continue  # Whisper's key projection has no bias; the fused bias is zero there
            state[f"{prefix}{target}.{leaves.get(leaf, leaf)}"] = torch.from_numpy(part.astype(np.float32))
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state
