"""Name the systems that an evaluation compares. The module imports nothing heavy: recipes are read with it."""

from typing import TypeGuard

from pydantic import Field

from graft.config import Recipe

FASTER_WHISPER = "faster-whisper:"
"""Beginning of the name of a Whisper that faster-whisper runs."""


class Service(Recipe):
    """A service that answers as OpenAI's transcriptions do."""

    url: str
    """Address of the interface, such as https://example.com/v1."""
    model: str
    """Name of the model there."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is written nowhere."""
    concurrency: int = Field(default=8, ge=1)
    """Most requests at a time."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Longest time of a request in seconds."""


SystemSpec = str | Service
"""A graft, an output of a stage or a Whisper; faster-whisper:NAME; or a service."""


def is_checkpoint(spec: SystemSpec) -> TypeGuard[str]:
    """Tell whether a system is a checkpoint that graft opens."""
    return isinstance(spec, str) and not spec.startswith(FASTER_WHISPER)
