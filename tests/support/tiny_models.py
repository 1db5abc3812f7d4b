"""Tiny random models of the real classes, and inputs for them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from graft.model.configuration import GraftConfig, audio_token_count
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.tokens import AUDIO_TOKENS
from graft.processor import GraftProcessor
from tests.support.built_once import built_once

VOCABULARY = 120
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID, AUDIO_ID = 100, 101, 102, 103, 110


def qwen2vl_config() -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )


def whisper_config(mel_count: int = 80) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=60,
        num_mel_bins=mel_count,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def graft_config(**audio: object) -> GraftConfig:
    base = qwen2vl_config().to_dict()
    base.pop("model_type")
    return GraftConfig(
        **{
            **base,
            "audio_config": whisper_config().to_dict(),
            "audio_token_id": AUDIO_ID,
            "audio_start_token_id": 111,
            "audio_end_token_id": 112,
            **audio,
        }
    )


def graft_model(seed: int = 0, **audio: object) -> GraftForConditionalGeneration:
    torch.manual_seed(seed)
    model = GraftForConditionalGeneration(graft_config(**audio)).eval()
    for parameter in model.audio_tower.parameters():  # with initial weights of std 0.02 audio hardly has an effect
        parameter.data.normal_(std=0.2)
    return model


def pay_attention(model: GraftForConditionalGeneration) -> GraftForConditionalGeneration:
    """Give a language model random weights so large that every input token changes its output.

    With a standard deviation of 0.02 hardly more than the last token would.
    """
    for parameter in model.model.language_model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
    return model


def qwen2vl_model(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(qwen2vl_config()).eval()


def whisper_model(seed: int = 0) -> WhisperModel:
    torch.manual_seed(seed)
    model = WhisperModel(whisper_config()).eval()
    for parameter in model.encoder.parameters():
        parameter.data.normal_(std=0.2)
    return model


def whisper_for_generation(seed: int = 0) -> WhisperForConditionalGeneration:
    """Make a whole Whisper whose text depends on the audio and on all tokens before."""
    torch.manual_seed(seed)
    config = whisper_config()
    config.decoder_layers = 2
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.model.encoder.parameters():
        parameter.data.normal_(std=0.2)
    for parameter in model.model.decoder.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
    model.tie_weights()
    model.generation_config.suppress_tokens = [5, 11]
    model.generation_config.begin_suppress_tokens = [12]
    return model


def log_mels(frame_counts: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random features (clips, 80, longest + 2) with zeros after each clip's tail, and their frame counts."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(len(frame_counts), 80, max(frame_counts) + 2)
    for clip, count in enumerate(frame_counts):
        features[clip, :, : count + 2] = torch.rand(80, count + 2, generator=generator) * 2 - 0.7
    return features, torch.tensor(frame_counts)


def prompt(model: GraftForConditionalGeneration, frame_count: int, text: list[int] | None = None) -> list[int]:
    count = audio_token_count(frame_count, pool=model.config.audio_pool, context=model.config.audio_context)
    return [5, 6, 111, *[AUDIO_ID] * count, 112, *(text or [7, 8, 9])]


def pad_rows(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def tokenizer(*, audio: bool = True) -> PreTrainedTokenizerFast:
    """Make a tokenizer in which every byte is a token, followed by the special tokens: it round-trips any text."""
    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", *VISION_TOKENS, *(AUDIO_TOKENS if audio else ())],
    )


@built_once
def save_tiny_graft(folder: str | Path, *, seed: int = 0, width: int = 32, **audio: object) -> Path:
    """Write a whole tiny graft that open_graft and graft.load read: random model, byte tokenizer, processor.

    bitsandbytes infers on a CPU with NF4 matrices of a `width` of 64 at least.
    """
    words = tokenizer()
    base = qwen2vl_config().to_dict()
    base.pop("model_type")
    base["text_config"] |= {
        "vocab_size": len(words),
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    base["text_config"] |= {"hidden_size": width, "intermediate_size": 2 * width}
    base["text_config"]["rope_parameters"] |= {"mrope_section": [width // 16, width // 32, width // 32]}
    base["vision_config"] |= {"hidden_size": width}
    vision_names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    audio_names = ("audio_token_id", "audio_start_token_id", "audio_end_token_id")
    names = dict(
        zip((*vision_names, *audio_names), words.convert_tokens_to_ids([*VISION_TOKENS, *AUDIO_TOKENS]), strict=True)
    )
    torch.manual_seed(seed)
    model = GraftForConditionalGeneration(
        GraftConfig(**{**base, **names, "audio_config": whisper_config().to_dict(), **audio})
    )
    for parameter in model.audio_tower.parameters():
        parameter.data.normal_(std=0.2)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.generation_config.suppress_tokens = sorted(names.values())
    model.save_pretrained(folder)
    GraftProcessor.for_config(
        model.config,
        feature_extractor=WhisperFeatureExtractor(feature_size=80),
        image_processor=Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096}),
        tokenizer=words,
    ).save_pretrained(folder)
    return Path(folder)


@built_once
def save_text_base(folder: Path, *, spare_rows: int = 8, tied: bool = False, seed: int = 3, width: int = 32) -> str:
    """Make the text base; `width` is as in save_tiny_graft."""
    words = tokenizer(audio=False)
    config: dict[str, Any] = qwen2vl_config().to_dict()
    config["text_config"] |= {
        "vocab_size": len(words) + spare_rows,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    config["text_config"] |= {"hidden_size": width, "intermediate_size": 2 * width}
    config["text_config"]["rope_parameters"] |= {"mrope_section": [width // 16, width // 32, width // 32]}
    config["vision_config"] |= {"hidden_size": width}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config |= dict(zip(names, words.convert_tokens_to_ids(list(VISION_TOKENS)), strict=True))
    torch.manual_seed(seed)
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config | {"tie_word_embeddings": tied})).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


TEXT_DECODERS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},  # wider than the hidden states divided by the heads, as in Qwen3
    "llama": {"tie_word_embeddings": True},
}


@built_once
def save_text_decoder(folder: Path, *, kind: str, spare_rows: int = 8, **settings: Any) -> str:
    """Make a base for text alone, of a kind of TEXT_DECODERS, in whose text every token before has an effect."""
    words = tokenizer(audio=False)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    shape |= {"num_key_value_heads": 2, "vocab_size": len(words) + spare_rows, "max_position_embeddings": 4096}
    config = AutoConfig.for_model(kind, **shape | ids | TEXT_DECODERS[kind] | settings)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.model.layers.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@built_once
def save_audio_base(folder: Path) -> str:
    whisper_model().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return str(folder)
