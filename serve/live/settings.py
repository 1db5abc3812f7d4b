"""Define what a client may set of a live session, in the form of OpenAI's transcription sessions."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .formats import AudioFormat, Pcm

BETA_FORMATS: dict[str, dict[str, Any]] = {
    "pcm16": {"type": "audio/pcm", "rate": 24_000},
    "g711_ulaw": {"type": "audio/pcmu"},
    "g711_alaw": {"type": "audio/pcma"},
}
"""Formats as the API named them before its first release -> as it names them now."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ServerVad(_Settings):
    """How the service finds the ends of utterances."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Score from 0 to 1 that speech reaches."""
    prefix_padding_ms: int = Field(default=300, ge=0, le=5_000)
    """Milliseconds of audio that are transcribed from before speech."""
    silence_duration_ms: int = Field(default=500, ge=100, le=10_000)
    """Milliseconds of silence that end an utterance."""


class TranscriptionSettings(_Settings):
    """What is transcribed: the model, the language of the speech, and words that may occur."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    keywords: tuple[str, ...] | None = None


class InputSettings(_Settings):
    """The audio that a client sends."""

    format: Annotated[AudioFormat, Field(discriminator="type")] = Pcm()
    transcription: TranscriptionSettings = TranscriptionSettings()
    turn_detection: ServerVad | None = ServerVad()
    """None leaves the ends of utterances to the client, which commits the audio."""


class AudioSettings(_Settings):
    """Audio, of which there is only that of the client."""

    input: InputSettings = InputSettings()


class SessionSettings(_Settings):
    """All that a client may set."""

    type: Literal["transcription"] = "transcription"
    audio: AudioSettings = AudioSettings()

    @property
    def input(self) -> InputSettings:
        """Return the settings of the client's audio."""
        return self.audio.input

    def changed(self, changes: Mapping[str, Any]) -> "SessionSettings":
        """Return these settings with the given ones in their place. Raises ValidationError."""
        return SessionSettings.model_validate(_merge(self.model_dump(), _from_beta(changes)))


def _from_beta(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return changes that may have the form from before the API's first release in the present form."""
    names = {
        "input_audio_format": "format",
        "input_audio_transcription": "transcription",
        "turn_detection": "turn_detection",
    }
    flat = {new: changes[old] for old, new in names.items() if old in changes}
    if not flat:
        return changes
    if isinstance(flat.get("format"), str):
        flat["format"] = BETA_FORMATS.get(flat["format"], {"type": flat["format"]})
    return {"audio": {"input": flat}}


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Put new values into the place of old ones, at every depth; a format is replaced as a whole."""
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        is_nested = isinstance(before, Mapping) and isinstance(value, Mapping) and name != "format"
        if name in ("transcription", "format", "audio", "input") and value is None:
            continue  # a transcription session has them
        merged[name] = _merge(before or {}, value) if is_nested else value
    return merged
