"""Say what the page of an evaluation holds. The module imports nothing heavy."""

from pydantic import Field

from graft.config import Recipe


class PageSettings(Recipe):
    """How much the page holds."""

    clips: int = Field(default=2000, ge=1)
    """Most clips that are listed, those with the most errors first."""
    audio_clips: int = Field(default=50, ge=0)
    """Number of clips with their audio: those with the most errors, those on which systems differ most, and those where
    the model is sure and wrong, in turn."""
    audit_clips: int = Field(default=100, ge=0)
    """Most clips of the label audit."""
