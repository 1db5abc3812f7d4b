"""Import of the reference system's published checkpoints: the weights of github.com/kulsoom-abdullah/Qwen2-VL-Audio-Graft as a graft.

They are Qwen2-VL checkpoints with flat names and an `audio_encoder` and `audio_projector` beside; the projector may stand in a file of its
own, and matrices may be packed to 4 bits by bitsandbytes, which is undone here. Stock transformers loads them with the audio path left out.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2VLConfig, WhisperConfig, WhisperFeatureExtractor
from transformers.initialization import no_init_weights

from graft.checkpoints.build import add_audio_tokens, generate_words_only, read_image_processor, reading
from graft.checkpoints.projector_file import check_projector, state_digest
from graft.errors import ModelError
from graft.model.configuration import GraftConfig
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import GraftProcessor

SETTINGS: dict[str, Any] = {
    "audio_pool": 1,
    "audio_context": "full",
    "audio_projector": "linear",
    "prompt_style": "reference",
    "text_style": "raw",
}
"""How the published weights were trained to hear and to answer."""
PROJECTOR_FILE = "audio_projector.pt"
PREFIXES = {
    "model.": "model.language_model.",
    "visual.": "model.visual.",
    "lm_head.": "lm_head.",
    "audio_encoder.": "audio_tower.",
    "audio_projector.": "audio_projector.linear.",
}
"""Theirs -> a graft's."""
HEAD_WIDTH = 64
"""Of every Whisper; no tensor tells it."""
_PACKED = ".quant_state.bitsandbytes__"
_KEPT = (
    "text_config",
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)


def import_reference(
    checkpoint: str, *, tokenizer_base: str | None = None, dtype: torch.dtype | None = None
) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    """Turn a published checkpoint (folder or hub id) into a graft and its processor.

    Its tokenizer is that of `tokenizer_base` where it has none. The weights keep the embedding table's dtype unless `dtype` is given.
    Raises ModelError where anything is missing, left over or of another shape, naming it: nothing is made up.
    """
    folder = _folder(checkpoint)
    state = _renamed(_unpacked(_read_tensors(folder), source=checkpoint), source=checkpoint)
    words = str(folder) if (folder / "tokenizer_config.json").is_file() else tokenizer_base
    if words is None:
        raise ModelError(
            f"{checkpoint} has no tokenizer: give text_base=Qwen/Qwen2-VL-7B-Instruct, or the Qwen2-VL that it was made of"
        )
    with reading(words):
        tokenizer, image_processor = AutoTokenizer.from_pretrained(words), read_image_processor(words)
    config = _config(folder, state, tokenizer, source=checkpoint)
    table = state["model.language_model.embed_tokens.weight"]
    model = _model(config, {name: tensor.to(dtype or table.dtype) for name, tensor in state.items()}, source=checkpoint)
    generate_words_only(model, _generation(folder, tokenizer))
    check_projector(model, source=checkpoint)
    extractor = WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins)
    parts = {"feature_extractor": extractor, "image_processor": image_processor, "tokenizer": tokenizer}
    return model, GraftProcessor.for_config(config, **parts)


def _folder(checkpoint: str) -> Path:
    if Path(checkpoint).exists():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=["*.json", "*.safetensors", "*.txt", PROJECTOR_FILE]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"{checkpoint} is no folder, and no hub answers for it: give a folder or a hub id that answers"
        ) from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files; the projector may stand in two of them, but not with two contents."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    with reading(str(folder)):
        listed = set(json.loads(index.read_text()).get("weight_map", {}).values()) if index.is_file() else set()
        if missing := sorted(listed - {path.name for path in files}):
            raise ModelError(f"{folder} lacks {missing[0]}: copy or fetch it again")
        tensors: dict[str, Tensor] = {}
        for path in files:
            tensors |= load_file(path)
    if (path := folder / PROJECTOR_FILE).is_file():
        for name, tensor in _read_projector(path).items():
            there = tensors.setdefault(name, tensor)
            if there.shape != tensor.shape or not torch.equal(there, tensor.to(there.dtype)):
                raise ModelError(
                    f"{folder}: {PROJECTOR_FILE} and the safetensors differ in {name}: remove the one that is not wanted"
                )
    if not tensors:
        raise ModelError(f"{folder} holds no *.safetensors: give the folder of a published checkpoint")
    return tensors


def _read_projector(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {f"audio_projector.{name}": tensor for name, tensor in state.items()}
    except Exception as error:  # whatever broken bytes lead the unpickler to
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path} can't be read ({reason}): copy or fetch it again") from error


def _unpacked(tensors: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Undo bitsandbytes' 4-bit packing: a weight of bytes and its statistics become one matrix."""
    tensors = dict(tensors)
    for key in [name for name in tensors if _PACKED in name]:
        name = key.partition(_PACKED)[0]
        try:
            tensors[name] = _unpack(tensors, name, json.loads(bytes(tensors.pop(key).tolist())))
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{source}: the 4-bit {name} can't be unpacked ({error}): copy or fetch it again"
            ) from error
    return tensors


def _unpack(tensors: dict[str, Tensor], name: str, state: dict[str, Any]) -> Tensor:
    """Look up each half byte, the higher first, and scale it by its block's absolute maximum, itself looked up where it is packed too.

    Source: Dettmers et al., QLoRA, 2023; the layout is bitsandbytes'.
    """
    scales = tensors.pop(f"{name}.absmax")
    if "nested_blocksize" in state:
        nested = tensors.pop(f"{name}.nested_quant_map")[scales.int()]
        block_scales = tensors.pop(f"{name}.nested_absmax").repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = nested * block_scales + state["nested_offset"]
    packed = tensors[name].view(torch.uint8).reshape(-1)
    halves = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
    values = tensors.pop(f"{name}.quant_map")[halves.int()]
    count = torch.Size(state["shape"]).numel()
    values = values[:count] * scales.repeat_interleave(state["blocksize"])[:count]
    return values.to(getattr(torch, state["dtype"])).reshape(state["shape"])


def _renamed(tensors: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise ModelError(f"{source}: {name} belongs to no part of a graft: is it one of the published checkpoints?")
        state[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return state


def _theirs(name: str) -> str:
    return next((theirs + name.removeprefix(ours) for theirs, ours in PREFIXES.items() if name.startswith(ours)), name)


def _config(folder: Path, state: dict[str, Tensor], tokenizer: Any, *, source: str) -> GraftConfig:
    with reading(source):
        found = json.loads((folder / "config.json").read_text())
        base = Qwen2VLConfig.from_dict({key: value for key, value in found.items() if key != "quantization_config"})
    try:
        audio = _audio_config(state)
        table = state["model.language_model.embed_tokens.weight"]
    except KeyError as error:
        raise ModelError(f"{source} lacks {_theirs(error.args[0])}: is it one of the published checkpoints?") from error
    ids = add_audio_tokens(tokenizer)
    if len(tokenizer) > len(table) or found.get("audio_token_id", ids["audio_token_id"]) != ids["audio_token_id"]:
        place = (
            f"audio_token_id {found.get('audio_token_id')} and {len(table)} rows, the tokenizer {ids['audio_token_id']}"
        )
        raise ModelError(f"{source} has {place}: give the text_base= that it was made of")
    parts = {
        "audio": {
            name.removeprefix("audio_tower."): tensor
            for name, tensor in state.items()
            if name.startswith("audio_tower.")
        },
        "text": {name: tensor for name, tensor in state.items() if not name.startswith("audio_")},
    }
    kept: dict[str, Any] = {key: value for key, value in base.to_dict().items() if key in _KEPT}
    return GraftConfig(
        **{**kept, **ids, **SETTINGS},
        tie_word_embeddings="lm_head.weight" not in state,
        audio_config=audio.to_dict(),
        base_digests={part: state_digest(tensors) for part, tensors in parts.items()},
    )


def _audio_config(state: dict[str, Tensor]) -> WhisperConfig:
    """The encoder's shape, told by its tensors."""
    width, mel_count, _ = state["audio_tower.conv1.weight"].shape
    layers = {name.split(".")[2] for name in state if name.startswith("audio_tower.layers.")}
    return WhisperConfig(
        num_mel_bins=mel_count,
        d_model=width,
        encoder_layers=len(layers),
        encoder_attention_heads=max(1, width // HEAD_WIDTH),
        encoder_ffn_dim=len(state["audio_tower.layers.0.fc1.weight"]),
        max_source_positions=len(state["audio_tower.embed_positions.weight"]),
    )


def _model(config: GraftConfig, state: dict[str, Tensor], *, source: str) -> GraftForConditionalGeneration:
    with no_init_weights():
        model = GraftForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    faults = [f"lacks {_theirs(name)}" for name in expected if name not in state]
    faults += [f"has {_theirs(name)}, which a graft has not" for name in state if name not in expected]
    faults += [
        f"has {_theirs(name)} of shape {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if faults:
        more = f" and {len(faults) - 1} tensors more that do not fit" if len(faults) > 1 else ""
        raise ModelError(f"{source} {faults[0]}{more}: is it one of the published checkpoints?")
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _generation(folder: Path, tokenizer: Any) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        with reading(str(folder)):
            return GenerationConfig.from_pretrained(folder)
    return GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
