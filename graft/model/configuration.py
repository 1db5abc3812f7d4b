"""The configurations that are saved with the weights, and the number of audio tokens that a clip takes."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Qwen2VLConfig, WhisperConfig

TEXT_STYLES = ("raw", "lower", "formatted")
ALLOWED_VALUES: dict[str, tuple[int | str, ...]] = {
    "audio_pool": (1, 2, 4),
    "audio_context": ("full", "trim", "valid"),
    "audio_projector": ("linear", "mlp", "conv"),
    "prompt_style": ("graft", "reference"),
    "text_style": TEXT_STYLES,
}
TEXT_MODEL_TYPES = ("qwen2", "qwen3", "llama", "smollm3")
"""Kinds of decoders for text alone that TextGraftConfig takes."""
WINDOW_FRAMES = 3000
"""Mel frames in Whisper's 30 s window, 100 per second."""
TAIL_FRAMES = 2
"""Mel frames after a clip's last one that still contain its sound: half an STFT window of 400 samples."""


@dataclass(kw_only=True)
class AudioSettings:
    """The audio tower of a graft's configuration, and how the tower's states become tokens of the language model.

    Args:
        audio_config: the WhisperConfig of the encoder.
        audio_token_id, audio_start_token_id, audio_end_token_id: ids of the placeholder and of the tokens around it.
        audio_pool: encoder states (50 per second) that make one audio token: 1, 2 or 4. They are averaged, or with the
            projector `conv` stacked.
        audio_context: which part of the window is encoded. `full` encodes the 30 s window and keeps all of its tokens;
            `trim` encodes the window and keeps the clip's own tokens; `valid` encodes the clip's own frames and
            `audio_margin_s` seconds of silence, and keeps the clip's own tokens.
        audio_margin_s: seconds of silence after the clip that `valid` encodes, 0 to 30.
        audio_projector: `linear`, `mlp` or `conv`, see AudioProjector.
        audio_projector_blocks: convolution blocks of `conv`, 1 to 12.
        prompt_style: `graft`, or `reference` for the fixed prompt of the reference system.
        text_style: how transcripts are written: `raw`, `lower` or `formatted`.
        trained_styles: text styles that an instruction may ask for; training writes it.
        tokens_per_s: tokens in a second of speech at most, in the texts that it was trained on; training writes it.
        trained_languages: languages (ISO 639-1) that a prompt may name; training writes it.
        trained_context: whether the model was trained with lists of context words; training writes it.
        base_digests: digests of the two checkpoints that were joined.
    """

    audio_config: Any = None
    audio_token_id: int = 151657
    audio_start_token_id: int = 151658
    audio_end_token_id: int = 151659
    audio_pool: int = 2
    audio_context: str = "valid"
    audio_margin_s: float = 1.0
    audio_projector: str = "linear"
    audio_projector_blocks: int = 4
    prompt_style: str = "graft"
    text_style: str = "lower"
    trained_styles: list | None = None
    trained_context: bool = False
    trained_languages: list | None = None
    tokens_per_s: float = 10.0
    base_digests: dict | None = None

    @property
    def averaged_states(self) -> int:
        """Encoder states that the encoder averages to one: those of an audio token, which `conv` stacks instead."""
        return 1 if self.audio_projector == "conv" else self.audio_pool

    def complete_audio(self) -> None:
        """Make the parts of what was read as JSON."""
        if not isinstance(self.audio_config, WhisperConfig):
            self.audio_config = WhisperConfig(**(self.audio_config or {}))
        self.trained_styles = list(self.trained_styles or [])
        self.trained_languages = list(self.trained_languages or [])

    def check_audio(self) -> None:
        """Raise ValueError for a setting that is not known."""
        for name, allowed in ALLOWED_VALUES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(map(str, allowed))}")
        if unknown := set(self.trained_styles or []) - set(TEXT_STYLES):
            raise ValueError(
                f"trained_styles holds {', '.join(map(str, unknown))}, not one of {', '.join(TEXT_STYLES)}"
            )
        if not 0 <= self.audio_margin_s <= 30:
            raise ValueError(f"audio_margin_s is {self.audio_margin_s}, not between 0 and 30 seconds")
        if not 1 <= self.audio_projector_blocks <= 12:
            raise ValueError(f"audio_projector_blocks is {self.audio_projector_blocks}, not between 1 and 12")


@strict
class GraftConfig(AudioSettings, Qwen2VLConfig):
    """The configuration of a graft on Qwen2-VL: Qwen2-VL's own and AudioSettings."""

    model_type = "graft"
    sub_configs = {**Qwen2VLConfig.sub_configs, "audio_config": WhisperConfig}  # noqa: RUF012 (transformers reads it)

    # With the annotation of Qwen2VLConfig, dict | PreTrainedConfig, each assignment costs a repr of the configuration.
    text_config: Any = None
    vision_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.complete_audio()
        super().__post_init__(**kwargs)
        self.check_audio()


@strict
class TextGraftConfig(AudioSettings, PreTrainedConfig):
    """The configuration of a graft on a decoder for text alone: AudioSettings, and the decoder's `text_config`.

    Its model type is one of TEXT_MODEL_TYPES.
    """

    model_type = "graft_text"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "audio_config": WhisperConfig}

    text_config: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.complete_audio()
        if not isinstance(self.text_config, PreTrainedConfig):
            text = dict(self.text_config or {"model_type": "llama"})
            kind = text.pop("model_type", None)
            if kind not in TEXT_MODEL_TYPES:
                raise ValueError(f"text_config is of {kind}, not of {', '.join(TEXT_MODEL_TYPES)}")
            self.text_config = AutoConfig.for_model(kind, **text)
        super().__post_init__(**kwargs)
        self.check_audio()


AnyGraftConfig: TypeAlias = GraftConfig | TextGraftConfig
GRAFT_MODEL_TYPES = (GraftConfig.model_type, TextGraftConfig.model_type)


def read_graft_config(checkpoint: str) -> AnyGraftConfig:
    """Read the configuration of a graft in a folder or on the hub. Raises OSError, ValueError for another model."""
    return AutoConfig.from_pretrained(checkpoint)


def audio_token_count(frame_count: int, *, pool: int, context: str) -> int:
    """Count the audio tokens of a clip of `frame_count` mel frames (100 per second).

    Whisper's second convolution halves the frames, rounding up, and pooling drops a remainder, as in AudioFlamingo3 and
    Qwen2Audio. Raises ValueError for fewer than 2 * pool frames and for more than WINDOW_FRAMES.
    """
    if not 2 * pool <= frame_count <= WINDOW_FRAMES:
        raise ValueError(
            f"the clip has {frame_count} mel frames, not between {2 * pool} and {WINDOW_FRAMES} (audio_pool={pool})"
        )
    encoded_frames = WINDOW_FRAMES if context == "full" else frame_count
    return (encoded_frames + 1) // 2 // pool


for graft_config in (GraftConfig, TextGraftConfig):
    AutoConfig.register(graft_config.model_type, graft_config)
