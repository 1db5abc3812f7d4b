"""The assumptions of --plan for the commands that transcribe."""

from pydantic import Field

from graft.config import Recipe


class TranscriptionPlanOptions(Recipe):
    """Assumptions of --plan about the devices, their speed and the audio."""

    device: str | None = None
    """GPU to plan for, such as h200, h100, a100, l40s or 4090. By default it is an h200 where the recipe gives its
    workers GPUs or leaves them to a machine that has some, and else the CPU."""
    hours: float | None = Field(default=None, gt=0)
    """Hours of audio to plan for; by default those of the audio that the recipe names."""
    chunk_s: float = Field(default=20.0, ge=1, le=30)
    """Mean length of a chunk of speech in seconds, which shorter recordings lower."""
    speech_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the audio in which somebody speaks; the rest is skipped."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Share of the device's peaks that transcription reaches. By default it is 0.5 on a GPU, as an H200 was measured at
    7B; for CPU threads the measured speed counts."""
    rtfx: float | None = Field(default=None, gt=0)
    """Seconds of audio that one worker transcribes in a second, if you have measured it; by default it is derived from
    the model's shape and the device."""


class EvaluationPlanOptions(TranscriptionPlanOptions):
    """Assumptions of --plan about the devices, their speed and price, and the audio."""

    price: float | None = Field(default=None, ge=0)
    """Price of an hour of the whole cluster in your currency; without it the plan states no cost."""
