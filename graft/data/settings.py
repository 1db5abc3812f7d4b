"""Settings of recipes that describe data: where clips are, how their columns are named and how training varies them.

The module imports nothing heavy, so that commands read and check their recipes at once.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from graft.config import Recipe
from graft.keys import Location

Range = tuple[float, float]


class Columns(Recipe):
    """Names of a parquet file's columns; dots reach into structs (`audio.bytes`)."""

    id: str | None = "ID"
    """Column of the rows' names. null names a row by its file and its number in it, `train-00003:17`."""
    duration: str | None = "duration"
    """Column of durations in seconds. null measures them, for which all audio is read once while planning."""
    text: str | None = "text"
    """Column of transcripts. null is for audio without transcripts, for which graft label writes texts."""
    language: str | None = None
    """Column of the rows' languages, such as de (ISO 639-1), de-AT or German. null is for none."""
    audio: str = "wav"
    """Column of whole audio files: bytes, or a struct of `bytes` and, optionally, `path`."""


class Source(Recipe):
    """Parquet files of one kind."""

    files: Location | Annotated[list[Location], Field(min_length=1)]
    """Files, folders or globs: local, hf://datasets/OWNER/NAME@REVISION/FOLDER, s3://BUCKET/KEY, or files at
    http(s)://."""
    weight: float = Field(default=1.0, gt=0)
    """Times that a row occurs in an epoch: 2 is twice, 0.5 is in every other epoch."""
    columns: Columns = Columns()
    """Names of the files' columns."""
    language: str | None = None
    """Language of the rows of which columns.language names none, such as de (ISO 639-1)."""
    texts: Location | None = None
    """Parquet files with the columns ID and text, which replace the corpus's texts; a row that they lack has no
    text."""


Sources = Location | Source | Sequence[Location | Source]


def _sources_or_sets(value: Any) -> str:
    """Tell a group of Source's keys, or any other form of Sources, from several sets by their names."""
    is_sets = isinstance(value, Mapping) and not value.keys() & Source.model_fields.keys()
    return "[sets]" if is_sets else "[data]"


def _any_of(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that a group may look like a dict of sets: it has no discriminator of this kind."""
    schema["anyOf"] = schema.pop("oneOf")


SetName = Annotated[str, Field(pattern=r"^[^/\s]+$")]
"""Name of a set, which is also a part of its metrics' names."""
NamedSources = Annotated[
    Annotated[Sources, Tag("[data]")] | Annotated[dict[SetName, Sources], Field(min_length=1), Tag("[sets]")],
    Field(json_schema_extra=_any_of),
    Discriminator(_sources_or_sets),
]
"""Sources, or several sets of them by names of the user's own."""


class NoiseRecipe(Recipe):
    """Noise that is added to part of the samples."""

    share: float = Field(default=0.3, ge=0, le=1)
    """Share of the samples that get noise."""
    snr_db: Range = (5.0, 25.0)
    """Least and greatest signal-to-noise ratio in dB."""
    data: Sources | None = None
    """Corpus of noise clips without speech. null generates white, pink or speech-shaped noise."""


class RoomRecipe(Recipe):
    """Reverberation of part of the samples, by room responses that are generated."""

    share: float = Field(default=0.3, ge=0, le=1)
    """Share of the samples that are heard in a room."""
    rt60_s: Range = (0.15, 0.8)
    """Least and greatest reverberation time in seconds, in which sound falls by 60 dB."""
    direct_db: Range = (-3.0, 12.0)
    """Least and greatest ratio of direct to reverberated sound in dB; near speakers have the greater one."""


class BandRecipe(Recipe):
    """Loss of high frequencies in part of the samples, as by a cheap microphone or a strong codec."""

    share: float = Field(default=0.1, ge=0, le=1)
    """Share of the samples."""
    cutoff_hz: Range = (3000.0, 7000.0)
    """Least and greatest frequency above which nothing is left."""


class SpecAugmentRecipe(Recipe):
    """Masks on the log-mels, filled with the clip's mean; each width is drawn between zero and the greatest."""

    time_masks: int = Field(default=2, ge=0)
    """Number of time masks."""
    time_s: float = Field(default=0.5, ge=0)
    """Greatest length of a time mask in seconds; it is also never over a fifth of the clip."""
    freq_masks: int = Field(default=2, ge=0)
    """Number of frequency masks."""
    freq_bins: int = Field(default=15, ge=0)
    """Greatest height of a frequency mask, in mel bins, of which there are 80 or 128."""


class AugmentRecipe(Recipe):
    """Augmentation of clips in training; none by default."""

    speed: list[Annotated[float, Field(ge=0.5, le=2)]] = Field(default=[1.0], min_length=1)
    """Speed factors, one of which is drawn for each sample: 1.1 is faster and higher."""
    gain_db: Range | None = None
    """Least and greatest amplification in dB, which never lifts a clip past full scale. null leaves the level."""
    room: RoomRecipe | None = None
    """Reverberation of part of the samples; null adds none."""
    noise: NoiseRecipe | None = None
    """Noise added to part of the samples; null adds none."""
    band: BandRecipe | None = None
    """Loss of high frequencies in part of the samples; null keeps them."""
    telephone: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples that are heard by telephone: 300 to 3,400 Hz, in 8 bits at 8 kHz (G.711)."""
    specaugment: SpecAugmentRecipe | None = None
    """Masks on the log-mels (SpecAugment); null makes none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        ranges = {
            "gain_db": self.gain_db,
            "room.rt60_s": self.room and self.room.rt60_s,
            "room.direct_db": self.room and self.room.direct_db,
            "noise.snr_db": self.noise and self.noise.snr_db,
            "band.cutoff_hz": self.band and self.band.cutoff_hz,
        }
        for name, limits in ranges.items():
            if limits and limits[0] > limits[1]:
                raise ValueError(f"{name} is {list(limits)}: give the smaller number first")
        for name in ("room.rt60_s", "band.cutoff_hz"):
            if (limits := ranges[name]) and limits[0] <= 0:
                raise ValueError(f"{name} is {list(limits)}: give numbers over zero")
        return self
