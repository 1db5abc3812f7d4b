"""Split a graft into two models, for engines that run the language model themselves.

    encoder, projector, embedding table -> a graft that turns clips and prompts into embeddings, and no more
    language model                      -> its tensors renamed, shard by shard -> a plain Qwen2ForCausalLM in the cache

Qwen2-VL's language model equals Qwen2's where a token's positions in time, height and width are equal, as they are for
audio and text.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen2Config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from graft.checkpoints.build import reading
from graft.checkpoints.bundled.cache import write_once
from graft.checkpoints.loading import base_checkpoint, check_graft, open_processor, read_stage
from graft.checkpoints.lora import has_adapters
from graft.checkpoints.projector_file import check_projector, load_projector, weight_files
from graft.errors import ModelError
from graft.model.configuration import AnyGraftConfig, read_graft_config
from graft.model.modeling import AnyGraft, graft_class
from graft.processor import GraftProcessor
from graft.storage.user_cache import cache_path, file_digest

CONVERSION = 1  # version of the files that the conversion writes; a new one leaves old cache folders unused
LANGUAGE_MODEL = "model.language_model."
ENCODER_MODEL = ("audio_tower.", "audio_projector.", f"{LANGUAGE_MODEL}embed_tokens.")


def open_encoder_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[AnyGraft, GraftProcessor]:
    """Load what open_graft opens without the language model's layers, so that `embed` works and generation does not.

    `dtype` defaults to the checkpoint's own. Raises ModelError as open_graft does, and for a stage's output with
    adapters, which would have to be merged into the layers first.
    """
    check_graft(path)
    if has_adapters(path):
        raise ModelError(f"{path} holds adapters that are not merged: merge them (`graft merge`) and give the result")
    graft = base_checkpoint(path)
    config: Any = read_graft_config(graft)
    with torch.device("meta"):
        model = graft_class(config)(config)
    with reading(graft):
        model.generation_config = GenerationConfig.from_pretrained(graft)
        dtype = dtype or config.dtype or torch.float32
        for file in weight_files(graft):
            with safe_open(file, framework="pt") as shard:
                names = [name for name in list(shard.keys()) if name.startswith(ENCODER_MODEL)]
                state = {name: shard.get_tensor(name).to(device, dtype) for name in names}
            model.load_state_dict(state, strict=False, assign=True)
    if missing := [
        name for name, tensor in model.named_parameters() if name.startswith(ENCODER_MODEL) and tensor.is_meta
    ]:
        raise ModelError(f"{graft} lacks {len(missing)} tensors of a graft, {missing[0]} first: build it again")
    if read_stage(path):
        load_projector(model, path)
    check_projector(model.audio_projector.state_dict(), source=str(path))
    return model.eval(), open_processor(path)


def language_model_folder(path: str | Path, cache: Path | None = None) -> Path:
    """Write the language model of a graft, or of a stage's graft, as a Qwen2ForCausalLM folder without a tokenizer.

    The folder is written once, under the digest of the graft's weights, into `cache`, by default $GRAFT_CACHE or
    ~/.cache/graft. It takes as much disk space as the language model, and as much memory as one shard. Raises
    ModelError when it cannot be written.
    """
    graft = base_checkpoint(path)
    config = _qwen2_config(read_graft_config(graft))
    files = weight_files(graft)
    digest = hashlib.sha256(config.to_json_string().encode())
    for file in files:
        digest.update(bytes.fromhex(file_digest(file, cache)))

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        weight_map = {name: file.name for file in files for name in _write_shard(file, folder / file.name)}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")

    size = sum(file.stat().st_size for file in files) / 1e9
    folder = cache_path("language_models", f"qwen2-{digest.hexdigest()[:24]}-{CONVERSION}", cache)
    return write_once(folder, write, gigabytes=f"{size:.1f}")


def _qwen2_config(config: AnyGraftConfig) -> Qwen2Config:
    text = config.get_text_config().to_dict()
    own = {
        "model_type",
        "architectures",
        "transformers_version",
        "_name_or_path",
        "rope_parameters",
        "dtype",
        "tie_word_embeddings",
    }
    return Qwen2Config(
        **{key: text[key] for key in (Qwen2Config().to_dict().keys() & text.keys()) - own},
        rope_parameters={key: value for key, value in text["rope_parameters"].items() if key != "mrope_section"},
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
        architectures=["Qwen2ForCausalLM"],
    )


def _write_shard(source: Path, target: Path) -> list[str]:
    """Write the language model's tensors of a shard under Qwen2's names; returns the names."""
    with safe_open(source, framework="pt") as file:
        # model.language_model.layers.0... -> model.layers.0...; the head keeps its name
        names = [name for name in list(file.keys()) if name.startswith(LANGUAGE_MODEL) or name == "lm_head.weight"]
        state = {name.replace(LANGUAGE_MODEL, "model.", 1): file.get_tensor(name) for name in names}
    if state:
        save_file(state, target, metadata={"format": "pt"})
    return list(state)
