"""Settings of recipes that describe data: where clips are, how their columns are named and how training varies them.

The module imports nothing heavy, so that commands read and check their recipes at once.
"""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from graft.config import Recipe

Range = tuple[float, float]


class Columns(Recipe):
    """What the columns of a parquet file are called; dots reach into structs (`audio.bytes`)."""

    id: str | None = "ID"
    """null: the file's stem and the row's number in it, `train-00003:17`."""
    duration: str | None = "duration"
    """In seconds. null: measured, for which the audio is read once while planning."""
    text: str | None = "text"
    """null: nobody wrote down what is said; jobs.label does."""
    audio: str = "wav"
    """Whole audio files: bytes, or a struct of `bytes` and, where it has one, `path`."""


class Source(Recipe):
    """Parquet files of one kind."""

    files: str | Annotated[list[str], Field(min_length=1)]
    """Files, folders or globs: local, hf://datasets/OWNER/NAME@REVISION/FOLDER, s3://BUCKET/KEY, or single files at http(s)://."""
    weight: float = Field(default=1.0, gt=0)
    """How often a row stands in an epoch: 2 is twice, 0.5 every other epoch."""
    columns: Columns = Columns()
    texts: str | None = None
    """Parquet with ID and text: these texts take the place of the corpus's own; a row that it lacks has none."""


Sources = str | Source | Sequence[str | Source]


class NoiseRecipe(Recipe):
    """Noise under part of the samples."""

    share: float = Field(default=0.3, ge=0, le=1)
    """Share of the samples that get noise."""
    snr_db: Range = (5.0, 25.0)
    """Least and greatest ratio of the clip's power to the noise's."""
    data: Sources | None = None
    """A corpus of noise clips in which nobody speaks; null: white, pink or speech-shaped noise is made."""


class SpecAugmentRecipe(Recipe):
    """Masks on the log-mels, filled with the clip's mean; each one's width is drawn, from nothing to the greatest."""

    time_masks: int = Field(default=2, ge=0)
    time_s: float = Field(default=0.5, ge=0)
    """Greatest length of a time mask; also never over a fifth of the clip."""
    freq_masks: int = Field(default=2, ge=0)
    freq_bins: int = Field(default=15, ge=0)
    """Greatest height of a frequency mask, of 80 or 128 mel bins."""


class AugmentRecipe(Recipe):
    """What is done to clips in training; nothing by default."""

    speed: list[Annotated[float, Field(ge=0.5, le=2)]] = Field(default=[1.0], min_length=1)
    """Factors, one of which is drawn: 1.1 is faster and higher."""
    gain_db: Range | None = None
    """Least and greatest amplification; none lifts a clip past full scale."""
    noise: NoiseRecipe | None = None
    specaugment: SpecAugmentRecipe | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, limits in (("gain_db", self.gain_db), ("noise.snr_db", self.noise and self.noise.snr_db)):
            if limits and limits[0] > limits[1]:
                raise ValueError(f"{name} is {list(limits)}: give the smaller number first")
        return self
