"""Join the encoder of a Whisper checkpoint to a Qwen2-VL checkpoint, with an untrained projector between them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2VLForConditionalGeneration,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from graft.checkpoints.projector_file import state_digest
from graft.checkpoints.quiet import no_loading_bars
from graft.errors import ModelError
from graft.model.configuration import GraftConfig
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.tokens import AUDIO_TOKENS
from graft.processor import GraftProcessor


def build_graft(
    audio_base: str, text_base: str, *, dtype: torch.dtype | None = None, seed: int = 0, **settings: Any
) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    """Join a Whisper and a Qwen2-VL checkpoint (hub ids or folders) into a graft and its processor.

    Args:
        dtype: of all weights; by default the text base's.
        seed: of the projector's initial weights and of embedding rows that are added.
        settings: GraftConfig's audio_pool, audio_context and so on.

    The audio tokens take spare rows of the embedding table, which grows only where it has too few. Raises ModelError
    for a base of another kind and for wrong settings.
    """
    check_kind(audio_base, "whisper")
    check_kind(text_base, "qwen2_vl")
    encoder = load_whole(WhisperModel, audio_base).encoder
    text = load_whole(Qwen2VLForConditionalGeneration, text_base)
    digests = {"audio": state_digest(encoder.state_dict()), "text": state_digest(text.state_dict())}
    with reading(text_base):
        tokenizer, image_processor = AutoTokenizer.from_pretrained(text_base), read_image_processor(text_base)
    with reading(audio_base):
        feature_extractor = WhisperFeatureExtractor.from_pretrained(audio_base)
    ids = add_audio_tokens(tokenizer)
    if len(tokenizer) > text.get_input_embeddings().num_embeddings:
        torch.manual_seed(seed)
        text.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    base = {key: value for key, value in text.config.to_dict().items() if key not in ("model_type", "architectures")}
    try:
        config = GraftConfig(**base, **ids, **settings, audio_config=encoder.config.to_dict(), base_digests=digests)
    except ValueError as error:
        raise ModelError(str(error)) from error
    model = _join_parts(config, text, encoder, dtype=dtype or text.dtype, seed=seed)
    parts = {"feature_extractor": feature_extractor, "image_processor": image_processor, "tokenizer": tokenizer}
    return model, GraftProcessor.for_config(config, **parts)


def check_kind(checkpoint: str, *kinds: str, remedy: str = "give a folder or a hub id that answers") -> str:
    """Return the model_type that a checkpoint's config.json names. Raises ModelError unless it is one of `kinds`.

    `remedy` ends the message where there is no such checkpoint.
    """
    folder, kind = Path(checkpoint), " or ".join(kinds)
    if not folder.exists() and "/" not in checkpoint:  # hub ids have an owner, so that the hub need not be asked
        raise ModelError(f"{checkpoint} can't be read as a {kind} checkpoint: {remedy}")
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(f"{checkpoint} has no config.json: give the folder of a {kind} checkpoint")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except (OSError, ValueError) as error:
        reason = f" ({_first_line(error)})" if folder.exists() else ""
        raise ModelError(f"{checkpoint} can't be read as a {kind} checkpoint{reason}: {remedy}") from error
    found = settings.get("model_type", "nameless")
    if found not in kinds:
        raise ModelError(f"{checkpoint} is a {found} checkpoint, not {kind}: give another one")
    return found


@contextlib.contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Turn the errors with which transformers reports missing or broken files of a checkpoint into ModelError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{checkpoint} can't be read ({_first_line(error)}): copy or fetch it again") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(":. ")


def load_whole(model_class: Any, checkpoint: str, *, dtype: torch.dtype | None = None) -> Any:
    """Load a folder or hub id into a class of transformers, by default in the dtype of its weights.

    Raises ModelError where files are broken or tensors are missing.
    """
    with reading(checkpoint), no_loading_bars():
        model, found = model_class.from_pretrained(checkpoint, dtype=dtype or "auto", output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise ModelError(f"{checkpoint} lacks {len(missing)} tensors, {missing[0]} first: copy or fetch it again")
    return model


def add_audio_tokens(tokenizer: Any) -> dict[str, Any]:
    """Add the audio tokens to a tokenizer; returns their ids by the names of GraftConfig's fields."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(AUDIO_TOKENS)}, replace_extra_special_tokens=False)
    names = ("audio_token_id", "audio_start_token_id", "audio_end_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(AUDIO_TOKENS)), strict=True))


def _join_parts(
    config: GraftConfig, text: Qwen2VLForConditionalGeneration, encoder: Any, *, dtype: torch.dtype, seed: int
) -> GraftForConditionalGeneration:
    with no_init_weights():
        model = GraftForConditionalGeneration(config)
    for parameter in model.parameters():  # buffers are left out: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    state = {**text.state_dict(), **{f"audio_tower.{name}": tensor for name, tensor in encoder.state_dict().items()}}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unmatched := [name for name in missing if not name.startswith("audio_projector.")] + unexpected:
        raise ModelError(
            f"the bases do not fit a graft: {len(unmatched)} tensors have no match, {unmatched[0]} first: "
            "use Whisper and Qwen2-VL"
        )
    torch.manual_seed(seed)
    model._init_weights(model.audio_projector)
    embeddings: Any = model.get_input_embeddings()
    model.audio_projector.match_scale(embeddings.weight)
    set_generation_config(model, text.generation_config)
    return model.eval()


def set_generation_config(model: GraftForConditionalGeneration, settings: Any) -> None:
    """Give a graft its base's generation settings, and forbid it to generate placeholder tokens."""
    names = ("audio", "audio_start", "audio_end", "image", "video", "vision_start", "vision_end")
    settings.suppress_tokens = sorted(getattr(model.config, f"{name}_token_id") for name in names)
    model.generation_config = settings


def read_image_processor(text_base: str) -> Any:
    """Read a Qwen2-VL checkpoint's image processor, or make one of Qwen2-VL's published values where it has none."""
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(text_base)
    except OSError:
        return Qwen2VLImageProcessorPil()
