"""Join the encoder of a Whisper checkpoint to a language model, with an untrained projector between them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from graft.checkpoints.projector_file import state_digest
from graft.checkpoints.quiet import no_loading_bars
from graft.errors import ModelError
from graft.model.configuration import TEXT_MODEL_TYPES, AnyGraftConfig, GraftConfig, TextGraftConfig
from graft.model.modeling import AnyGraft, graft_class
from graft.model.tokens import AUDIO_TOKENS
from graft.processor import GraftProcessor
from graft.text.prompts import CHAT_FORMATS, find_chat_format

VISION_MODEL_TYPE = "qwen2_vl"
OWN_TO_CLASS = ("model_type", "architectures")
"""Entries of a configuration that name its class."""


def build_graft(
    audio_base: str, text_base: str, *, dtype: torch.dtype | None = None, seed: int = 0, **settings: Any
) -> tuple[AnyGraft, GraftProcessor]:
    """Join a Whisper checkpoint and a language model's (hub ids or folders) into a graft and its processor.

    The language model is a Qwen2-VL, or a decoder for text alone of one of TEXT_MODEL_TYPES.

    Args:
        dtype: of all weights; by default the text base's.
        seed: of the projector's initial weights and of embedding rows that are added.
        settings: AnyGraftConfig's audio_pool, audio_context and so on.

    The audio tokens take spare rows of the embedding table, which grows only where it has too few. Raises ModelError
    for a base of another kind and for wrong settings.
    """
    check_kind(audio_base, "whisper")
    is_vision = check_kind(text_base, VISION_MODEL_TYPE, *TEXT_MODEL_TYPES) == VISION_MODEL_TYPE
    encoder = load_whole(WhisperModel, audio_base).encoder
    text = load_whole(Qwen2VLForConditionalGeneration if is_vision else AutoModelForCausalLM, text_base)
    check_attention(text.config, text_base)
    digests = {"audio": state_digest(encoder.state_dict()), "text": state_digest(text.state_dict())}
    with reading(text_base):
        tokenizer = AutoTokenizer.from_pretrained(text_base)
        image_processor = read_image_processor(text_base) if is_vision else None
    check_chat_tokens(tokenizer, text_base)
    with reading(audio_base):
        feature_extractor = WhisperFeatureExtractor.from_pretrained(audio_base)
    ids = add_audio_tokens(tokenizer)
    if len(tokenizer) > text.get_input_embeddings().num_embeddings:
        torch.manual_seed(seed)
        text.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    settings |= ids | {"audio_config": encoder.config.to_dict(), "base_digests": digests}
    config: AnyGraftConfig
    try:
        if is_vision:
            own = {name: value for name, value in text.config.to_dict().items() if name not in OWN_TO_CLASS}
            config = GraftConfig(**own, **settings)
        else:
            tied = text.config.tie_word_embeddings
            config = TextGraftConfig(text_config=text.config.to_dict(), tie_word_embeddings=tied, **settings)
            config.dtype = text.dtype
    except ValueError as error:
        raise ModelError(str(error)) from error
    model = _join_parts(config, text, encoder, dtype=dtype or text.dtype, seed=seed)
    parts = {"feature_extractor": feature_extractor, "image_processor": image_processor, "tokenizer": tokenizer}
    return model, GraftProcessor.for_config(config, **parts)


def check_attention(config: PreTrainedConfig, text_base: str) -> None:
    """Raise ModelError for a language model of which a layer sees the last tokens alone: engines keep them all."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    if "sliding_attention" in kinds:
        raise ModelError(f"{text_base} has layers with a sliding window: give a model whose layers see the whole text")


def check_chat_tokens(tokenizer: Any, text_base: str) -> None:
    """Raise ModelError for a tokenizer without the tokens of a chat, in whose form prompts are written."""
    if find_chat_format(tokenizer.get_added_vocab()) is None:
        raise ModelError(
            f"{text_base} has neither the chat token {' nor '.join(CHAT_FORMATS)}: "
            "give a model that was trained for chats (Instruct)"
        )


def check_kind(
    checkpoint: str, *kinds: str, name: str = "", remedy: str = "give a folder or a hub id that answers"
) -> str:
    """Return the model_type that a checkpoint's config.json names. Raises ModelError unless it is one of `kinds`.

    `name` names them in messages, and `remedy` ends the message where there is no such checkpoint.
    """
    folder, kind = Path(checkpoint), name or " or ".join(kinds)
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
    config: AnyGraftConfig, text: PreTrainedModel, encoder: Any, *, dtype: torch.dtype, seed: int
) -> AnyGraft:
    with no_init_weights():
        model = graft_class(config)(config)
    for parameter in model.parameters():  # buffers are left out: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    state = text.state_dict()
    if isinstance(config, TextGraftConfig):  # whose decoder has the name that it has in Qwen2-VL
        state = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in state.items()}
    state = {**state, **{f"audio_tower.{name}": tensor for name, tensor in encoder.state_dict().items()}}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unmatched := [name for name in missing if not name.startswith("audio_projector.")] + unexpected:
        raise ModelError(
            f"the bases do not fit a graft: {len(unmatched)} tensors have no match, {unmatched[0]} first: "
            "use Whisper and a language model as transformers saves it"
        )
    torch.manual_seed(seed)
    model._init_weights(model.audio_projector)
    embeddings: Any = model.get_input_embeddings()
    model.audio_projector.match_scale(embeddings.weight)
    set_generation_config(model, text.generation_config)
    return model.eval()


def set_generation_config(model: AnyGraft, settings: Any) -> None:
    """Give a graft its base's generation settings, and forbid it to generate placeholder tokens."""
    names = ("audio", "audio_start", "audio_end", "image", "video", "vision_start", "vision_end")
    ids = (getattr(model.config, f"{name}_token_id", None) for name in names)
    settings.suppress_tokens = sorted(one for one in ids if one is not None)
    model.generation_config = settings


def read_image_processor(text_base: str) -> Any:
    """Read a Qwen2-VL checkpoint's image processor, or make one of Qwen2-VL's published values where it has none."""
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(text_base)
    except OSError:
        return Qwen2VLImageProcessorPil()
