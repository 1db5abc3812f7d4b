"""Import the reference system's published checkpoints: the weights of github.com/kulsoom-abdullah/Qwen2-VL-Audio-Graft.

They are Qwen2-VL checkpoints with flat tensor names, and with `audio_encoder` and `audio_projector` besides. The
projector may be in a file of its own, and bitsandbytes may have packed matrices to 4 bits, which are dequantized here.
transformers alone loads such a checkpoint without its audio path.
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

from graft.checkpoints.build import add_audio_tokens, read_image_processor, reading, set_generation_config
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
"""GraftConfig's values with which the published weights were trained."""
PROJECTOR_FILE = "audio_projector.pt"
PREFIXES = {
    "model.": "model.language_model.",
    "visual.": "model.visual.",
    "lm_head.": "lm_head.",
    "audio_encoder.": "audio_tower.",
    "audio_projector.": "audio_projector.linear.",
}
"""Published prefix of a tensor's name -> a graft's prefix."""
HEAD_WIDTH = 64
"""Width of an attention head in every Whisper; the tensors' shapes do not show it."""
_PACKED = ".quant_state.bitsandbytes__"
_BASE_KEYS = (
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

    Args:
        tokenizer_base: checkpoint whose tokenizer is used where the published one has none.
        dtype: of all weights; by default the embedding table's.

    Raises ModelError that names the tensor or file where anything is missing, unknown or of another shape.
    """
    folder = _local_folder(checkpoint)
    tensors = _read_tensors(folder)
    _dequantize_all(tensors, source=checkpoint)
    state = _rename_tensors(tensors, source=checkpoint)
    tokenizer_source = str(folder) if (folder / "tokenizer_config.json").is_file() else tokenizer_base
    if tokenizer_source is None:
        raise ModelError(
            f"{checkpoint} has no tokenizer: give text_base=Qwen/Qwen2-VL-7B-Instruct, "
            "or the Qwen2-VL that it was made of"
        )
    with reading(tokenizer_source):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
        image_processor = read_image_processor(tokenizer_source)
    config = _graft_config(folder, state, tokenizer, source=checkpoint)
    dtype = dtype or state["model.language_model.embed_tokens.weight"].dtype
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model = _load_model(config, state, source=checkpoint)
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if (folder / "generation_config.json").is_file():
        with reading(checkpoint):
            generation = GenerationConfig.from_pretrained(folder)
    set_generation_config(model, generation)
    check_projector(model.audio_projector.state_dict(), source=checkpoint)
    processor = GraftProcessor.for_config(
        config,
        feature_extractor=WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins),
        image_processor=image_processor,
        tokenizer=tokenizer,
    )
    return model, processor


def _local_folder(checkpoint: str) -> Path:
    if Path(checkpoint).exists():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=["*.json", "*.safetensors", "*.txt", PROJECTOR_FILE]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"{checkpoint} is no folder, and no hub answers for it: give a folder or a hub id that answers"
        ) from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of all files; a projector that is in two files must have the same values in both."""
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
        try:
            projector = torch.load(path, map_location="cpu", weights_only=True)
            projector = {f"audio_projector.{name}": tensor for name, tensor in projector.items()}
        except Exception as error:  # the unpickler may raise anything on broken bytes
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{path} can't be read ({reason}): copy or fetch it again") from error
        for name, tensor in projector.items():
            there = tensors.setdefault(name, tensor)
            if there.shape != tensor.shape or not torch.equal(there, tensor.to(there.dtype)):
                raise ModelError(
                    f"{folder}: {PROJECTOR_FILE} and the safetensors differ in {name}: "
                    "remove the one that is not wanted"
                )
    if not tensors:
        raise ModelError(f"{folder} holds no *.safetensors: give the folder of a published checkpoint")
    return tensors


def _dequantize_all(tensors: dict[str, Tensor], *, source: str) -> None:
    """Replace each 4-bit weight of bitsandbytes and its statistics by one matrix."""
    for key in [name for name in tensors if _PACKED in name]:
        name = key.partition(_PACKED)[0]
        try:
            tensors[name] = _dequantize(tensors, name, json.loads(bytes(tensors.pop(key).tolist())))
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{source}: the 4-bit {name} can't be unpacked ({error}): copy or fetch it again"
            ) from error


def _dequantize(tensors: dict[str, Tensor], name: str, state: dict[str, Any]) -> Tensor:
    """Dequantize a 4-bit matrix.

    Each half byte, the higher first, is an index into a table of values, which its block's absolute maximum scales.
    With double quantization the maxima are 8-bit themselves. Source: Dettmers et al., QLoRA, 2023; the layout is
    bitsandbytes'.
    """
    scales = tensors.pop(f"{name}.absmax")  # (blocks,)
    if "nested_blocksize" in state:
        nested = tensors.pop(f"{name}.nested_quant_map")[scales.int()]
        block_scales = tensors.pop(f"{name}.nested_absmax").repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = nested * block_scales + state["nested_offset"]
    packed = tensors[name].view(torch.uint8).reshape(-1)  # (bytes,)
    halves = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)  # (2 * bytes,)
    values = tensors.pop(f"{name}.quant_map")[halves.int()]
    count = torch.Size(state["shape"]).numel()
    values = values[:count] * scales.repeat_interleave(state["blocksize"])[:count]
    return values.to(getattr(torch, state["dtype"])).reshape(state["shape"])


def _rename_tensors(tensors: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise ModelError(f"{source}: {name} belongs to no part of a graft: is it one of the published checkpoints?")
        state[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return state


def _published_name(name: str) -> str:
    return next(
        (published + name.removeprefix(ours) for published, ours in PREFIXES.items() if name.startswith(ours)), name
    )


def _graft_config(folder: Path, state: dict[str, Tensor], tokenizer: Any, *, source: str) -> GraftConfig:
    with reading(source):
        found = json.loads((folder / "config.json").read_text())
        base = Qwen2VLConfig.from_dict({key: value for key, value in found.items() if key != "quantization_config"})
    try:
        audio = _audio_config(state)
        table = state["model.language_model.embed_tokens.weight"]
    except KeyError as error:
        raise ModelError(
            f"{source} lacks {_published_name(error.args[0])}: is it one of the published checkpoints?"
        ) from error
    ids = add_audio_tokens(tokenizer)
    if len(tokenizer) > len(table) or found.get("audio_token_id", ids["audio_token_id"]) != ids["audio_token_id"]:
        published = f"audio_token_id {found.get('audio_token_id')} and {len(table)} rows"
        raise ModelError(
            f"{source} has {published}, the tokenizer {ids['audio_token_id']}: give the text_base= that it was made of"
        )
    tower = "audio_tower."
    parts = {
        "audio": {name.removeprefix(tower): tensor for name, tensor in state.items() if name.startswith(tower)},
        "text": {name: tensor for name, tensor in state.items() if not name.startswith("audio_")},
    }
    return GraftConfig(
        **{key: value for key, value in base.to_dict().items() if key in _BASE_KEYS},
        **ids,
        **SETTINGS,
        tie_word_embeddings="lm_head.weight" not in state,
        audio_config=audio.to_dict(),
        base_digests={part: state_digest(tensors) for part, tensors in parts.items()},
    )


def _audio_config(state: dict[str, Tensor]) -> WhisperConfig:
    """Read the encoder's configuration off its tensors' shapes."""
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


def _load_model(config: GraftConfig, state: dict[str, Tensor], *, source: str) -> GraftForConditionalGeneration:
    with no_init_weights():
        model = GraftForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    faults = [f"lacks {_published_name(name)}" for name in expected if name not in state]
    faults += [f"has {_published_name(name)}, which a graft does not have" for name in state if name not in expected]
    faults += [
        f"has {_published_name(name)} of shape {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if faults:
        more = f" and {len(faults) - 1} tensors more that do not fit" if len(faults) > 1 else ""
        raise ModelError(f"{source} {faults[0]}{more}: is it one of the published checkpoints?")
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()
