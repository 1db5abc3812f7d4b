"""Bulk transcription on Ray Data: recordings become work items, chunks, results and transcripts."""

from dataclasses import dataclass
from typing import Literal

Auto = Literal["auto"]
"""A number of processes that is chosen by what the machine or the cluster has."""


@dataclass(frozen=True)
class ClipTranscript:
    """The transcript of a clip, or the error that says why it has none."""

    text: str = ""
    error: str | None = None
    duration_s: float = 0.0
    mean_logprob: float | None = None
    """Mean natural log-probability of the text's tokens; None where there are none."""
    flags: tuple[str, ...] = ()
    """Faults of the text and of the audio, as graft transcribe flags them."""
    started_at: float | None = None
    """When its transcription began (Unix time)."""
    transcription_s: float | None = None
    """Seconds that its transcription took, beside other clips; None where it was not transcribed."""
