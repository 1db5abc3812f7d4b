"""The recipe of jobs.evaluate."""

from typing import Literal

from pydantic import Field

from graft.config import Recipe
from graft.data.settings import Sources


class EvaluateRecipe(Recipe):
    """What to score, on what."""

    model: str
    """A graft, or the output folder of a stage."""
    data: dict[str, Sources]
    """Name of a test set -> its parquet files, folder or glob, or {files, columns}."""
    out: str
    """Folder for the report; sounds and recordings lie there while they are heard, where every machine of a cluster must find them."""
    baseline: str | None = "bundled"
    """A Whisper checkpoint to score beside the model; `bundled` is Whisper base, null none."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first clips of each set."""
    audio_check: str | None = None
    """A set that is also scored with every clip's audio swapped for another's: a model that listens fails."""
    instructions: list[str] = Field(default=[])
    """What the graft is asked for besides its default, as a text style or a phrasing that it was trained for: scored as further models."""
    sounds: bool = False
    """Count what is written on silence, noise, tones and ringing, which are made by the seed."""
    recordings_s: float | None = Field(default=None, gt=30)
    """Score each set also as recordings of about so many seconds, in which its clips follow one another with short pauses."""
    batch_clips: int = Field(default=16, ge=1)
    workers: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    dtype: Literal["fp32", "bf16"] = "fp32"
    gpu: bool = False
    seed: int = 0
    """Of the bootstrap and of the sounds."""
    expected: dict[str, dict[Literal["wer", "cer", "wer_raw", "cer_raw"], tuple[float, float]]] = Field(default={})
    """Set -> rate -> the least and the greatest value that agree with a published figure; else the job ends with exit code 1."""
