"""Describe the base checkpoints of graft's recipes by their shapes, so that nothing has to be downloaded."""

from typing import Any

from graft.model.configuration import AnyGraftConfig, GraftConfig, TextGraftConfig

QWEN2_VL = {
    "num_hidden_layers": 28,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN2_VL_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
SMOLLM2 = {
    "vocab_size": 49160,  # with the five vision and three audio tokens
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [16, 8, 8]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
TEXT_BASES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-7B-Instruct": {
        "text_config": QWEN2_VL
        | {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "vision_config": QWEN2_VL_VISION | {"hidden_size": 3584},
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2-VL-2B-Instruct": {
        "text_config": QWEN2_VL
        | {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        "vision_config": QWEN2_VL_VISION | {"hidden_size": 1536},
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-0.6B": {
        "text_config": QWEN3
        | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": {
        "text_config": QWEN3
        | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B": {
        "text_config": QWEN3
        | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        "text_config": QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        "tie_word_embeddings": False,
    },
    "bundled": {
        "text_config": SMOLLM2,
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 14, "hidden_size": 576},
        "tie_word_embeddings": True,
    },
}
WHISPER_BASE = {
    "num_mel_bins": 80,
    "d_model": 512,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
}
WHISPER_TURBO = {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
}
AUDIO_BASES: dict[str, dict[str, Any]] = {
    "openai/whisper-large-v3-turbo": WHISPER_TURBO,
    "openai/whisper-base": WHISPER_BASE,
    "bundled": WHISPER_BASE,
}


def known_config(audio_base: str, text_base: str, **settings: Any) -> AnyGraftConfig:
    """Make the configuration of a graft of two known bases; `settings` are AudioSettings'.

    Its dtype is the one that the text base is stored in.

    Raises KeyError for a base that is not in AUDIO_BASES or TEXT_BASES.
    """
    dtype = "float32" if text_base == "bundled" else "bfloat16"
    base = {"audio_config": dict(AUDIO_BASES[audio_base]), **TEXT_BASES[text_base]}
    kind = GraftConfig if "vision_config" in base else TextGraftConfig
    return kind(**base, **{"dtype": dtype, **settings})
