"""GraftConfig: what travels with the weights, and the one function from audio frames to audio tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Qwen2VLConfig, WhisperConfig

AUDIO_POOLS = (1, 2, 4)
AUDIO_CONTEXTS = ("full", "trim", "valid")
AUDIO_PROJECTORS = ("linear", "mlp")
PROMPT_STYLES = ("graft", "reference")
TEXT_STYLES = ("raw", "lower", "formatted")
WINDOW_FRAMES = 3000
"""Mel frames of Whisper's 30 s window, 100 a second."""
TAIL_FRAMES = 2
"""Mel frames past a clip's last that still hear it: half an STFT window of 400 samples reaches them."""


@strict
class GraftConfig(Qwen2VLConfig):
    """A Qwen2-VL configuration plus an audio tower and how its states become tokens.

    `audio_pool` averages that many encoder frames (50 a second) into a token. `audio_context` says what is encoded: `full` the 30 s
    window, of which all tokens are kept; `trim` the window, of which the clip's own are kept; `valid` the clip's own frames and
    `audio_margin_s` seconds of silence, of which the clip's own are kept. `trained_styles` are the text styles that an
    instruction may ask for, `trained_context` tells whether lists of words are understood; training writes both. `base_digests` names the
    two checkpoints that were joined.
    """

    model_type = "graft"
    sub_configs = {**Qwen2VLConfig.sub_configs, "audio_config": WhisperConfig}  # noqa: RUF012 (transformers reads a plain dict here)

    audio_config: Any = None
    audio_token_id: int = 151657
    audio_start_token_id: int = 151658
    audio_end_token_id: int = 151659
    audio_pool: int = 2
    audio_context: str = "valid"
    audio_margin_s: float = 1.0
    audio_projector: str = "linear"
    prompt_style: str = "graft"
    text_style: str = "lower"
    trained_styles: list | None = None
    trained_context: bool = False
    base_digests: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.audio_config, dict):
            self.audio_config = WhisperConfig(**self.audio_config)
        elif self.audio_config is None:
            self.audio_config = WhisperConfig()
        self.trained_styles = list(self.trained_styles or [])
        super().__post_init__(**kwargs)
        for name, allowed in (
            ("audio_pool", AUDIO_POOLS),
            ("audio_context", AUDIO_CONTEXTS),
            ("audio_projector", AUDIO_PROJECTORS),
            ("prompt_style", PROMPT_STYLES),
            ("text_style", TEXT_STYLES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(map(str, allowed))}")
        if unknown := set(self.trained_styles) - set(TEXT_STYLES):
            raise ValueError(
                f"trained_styles holds {', '.join(map(str, unknown))}, not one of {', '.join(TEXT_STYLES)}"
            )
        if not 0 <= self.audio_margin_s <= 30:
            raise ValueError(f"audio_margin_s is {self.audio_margin_s}, not between 0 and 30 seconds")


def audio_token_count(frame_count: int, *, pool: int, context: str) -> int:
    """Count the tokens of a clip of `frame_count` mel frames (100 a second, at least 2 * pool, at most 3000).

    The convolution halves the frames, rounding up, and the pooling drops a remainder, as AudioFlamingo3 and Qwen2Audio do.
    Raises ValueError for a frame count outside those limits.
    """
    if not 2 * pool <= frame_count <= WINDOW_FRAMES:
        raise ValueError(
            f"a clip of {frame_count} mel frames; {2 * pool} to {WINDOW_FRAMES} make tokens at pool {pool}"
        )
    frames = WINDOW_FRAMES if context == "full" else frame_count
    return (frames + 1) // 2 // pool


AutoConfig.register("graft", GraftConfig)
