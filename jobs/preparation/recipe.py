"""The recipe of graft prepare.

The module imports nothing heavy, so that commands read and check their recipes at once.
"""

from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from graft.config import Recipe
from graft.keys import DataKey, Location, MachineKey, OutputKey

from ..transcription import Auto

EXECUTION_KEYS = frozenset({"workers"})
"""Keys that change how a run works, not what it writes."""
SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FieldName = Literal["id", "audio", "text", "speaker", "sex", "language", "offset", "duration"]

MOST_TURNS = 10
"""Largest number of joined clips with the same row: hours made of minutes of speech would be learnt by heart."""

PauseS = Annotated[float, Field(ge=0, le=10)]


class JoinedRecipe(Recipe):
    """Longer clips that are made of clips of one speaker and added to the single clips."""

    share: float = Field(gt=0, le=MOST_TURNS)
    """Hours of joined clips, as a share of the hours of the split's labelled clips."""
    shortest_s: float = Field(default=10, gt=0)
    """Shortest joined clip in seconds."""
    longest_s: float = Field(default=28, gt=0)
    """Longest joined clip in seconds. Each clip is filled until it reaches a length drawn uniformly between the two."""
    pause_s: tuple[PauseS, PauseS] = (0.2, 0.8)
    """Shortest and longest silence between two clips in seconds, drawn uniformly."""
    splits: list[SplitName] | None = None
    """Splits that get joined clips; null is all."""

    @model_validator(mode="after")
    def _check_limits(self) -> "JoinedRecipe":
        lengths = (self.shortest_s, self.longest_s)
        for name, limits in (("shortest_s and longest_s are", lengths), ("pause_s is", self.pause_s)):
            if limits[0] > limits[1]:
                raise ValueError(f"{name} {list(limits)}: give the smaller number first")
        return self


class Manifest(Recipe):
    """A manifest, and how to read it."""

    manifest: Location
    """Path or URI of JSON lines or one JSON array, of CSV (*.csv, *.tsv or a given delimiter), of lhotse's cuts, of a
    tar file of WebDataset, or of a parquet or Arrow file; or a folder or glob of one kind, or names with {0..7} or
    _OP_0..7_CL_. Fields are audio and text and optionally id, speaker, sex, language, offset and duration."""
    split: SplitName | None = None
    """Split that every row of this manifest goes to; null draws splits by the shares of `splits`."""
    folder: str = "."
    """Folder that audio paths are relative to, itself relative to the manifest's folder; `clips` for Common Voice."""
    tars: list[str] = Field(default_factory=list)
    """Tar files with the audio of a NeMo manifest, relative to its folder; with none, lines with a shard_id are looked
    up in audio_ID.tar beside the manifest or one folder above it."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Delimiter of a CSV file; null takes the one of tab, comma, semicolon and bar that its header line holds most
    often. With a tab, quotes are part of the text."""
    columns: dict[FieldName, str] = Field(default_factory=dict)
    """Names of fields in this manifest where they differ from graft's, NeMo's and Common Voice's, as {audio: file}."""
    only: dict[str, str] = Field(default_factory=dict)
    """Patterns that select lines: a field by its name in this manifest and a glob, as {source: "LibriSpeech*"}. Other
    lines are passed over and not counted as dropped, so a manifest can be given once for each split that it holds."""
    unlabelled: Literal["drop", "keep"] = "drop"
    """Lines without a text are dropped, or kept with an empty text for graft label."""

    _given: str = PrivateAttr(default="")  # the source's location, where it names several files

    @property
    def place(self) -> str:
        """The manifest's location as messages show it."""
        from graft.storage.locations import redact_uri  # which imports pyarrow

        return redact_uri(self.manifest)

    def of_file(self, location: str) -> "Manifest":
        """Return this source with one of the files that it names."""
        copy = self.model_copy(update={"manifest": location})
        copy._given = self.place
        return copy


class PrepareRecipe(Recipe):
    """The manifests, the splits, and which rows are dropped."""

    sources: DataKey[list[Location | Manifest]] = Field(min_length=1)
    """Manifests: paths or URIs, or groups such as {manifest, split} to pin one to a split, {manifest, columns} for
    other names of its fields, {manifest, only} for some of its lines, and {manifest, unlabelled: keep} for lines
    without text."""
    out: OutputKey[str]
    """Folder that the splits are written to, which every machine of a cluster must see."""
    splits: DataKey[dict[SplitName, Annotated[float, Field(ge=0, le=1)]]] = Field(
        default_factory=lambda: {"train": 0.95, "dev": 0.05}
    )
    """Splits and their shares of the rows that no source pins; the shares add up to 1."""
    disjoint_speakers: DataKey[bool] = False
    """Keep every speaker within one split; rows without a speaker are dropped."""
    seed: DataKey[int] = 0
    """Random seed of the splits and of the order of rows."""
    min_duration_s: DataKey[float] = Field(default=0.1, ge=0)
    """Shortest clip in seconds; shorter ones are dropped."""
    max_duration_s: DataKey[float] = Field(default=30, gt=0)
    """Longest clip in seconds; longer ones are dropped, because a cut clip would keep its whole text."""
    min_text_chars: DataKey[int] = Field(default=2, ge=1)
    """Shortest text in characters, wide ones (Chinese, Japanese, Korean) counted twice; rows with a shorter one are
    dropped, but for unlabelled rows that are kept."""
    max_chars_per_s: DataKey[float] = Field(default=40, gt=0)
    """Highest number of such characters a second; rows with more are dropped, because their text belongs to other
    audio."""
    joined: DataKey[JoinedRecipe | None] = None
    """Add longer clips, joined from clips of one speaker: a model trained on single sentences alone does not learn to
    transcribe 30 s. null adds none."""
    workers: MachineKey[Annotated[int, Field(ge=1)] | Auto] = "auto"
    """Number of processes that read audio and write files; auto is one for each CPU of the machine or the cluster, and
    none but the command's own for few clips. The files that are written are the same with any number."""
    rows_per_file: OutputKey[int] = Field(default=1000, ge=1)
    """Rows of one parquet file."""
    rows_per_group: OutputKey[int] = Field(default=100, ge=1)
    """Rows of one row group, the unit in which files are read."""

    @model_validator(mode="after")
    def _check_splits(self) -> "PrepareRecipe":
        pinned = [source.split for source in self.long_sources()]
        if None in pinned and abs(sum(self.splits.values()) - 1) > 1e-6:
            raise ValueError(f"splits add up to {sum(self.splits.values()):g}, want 1")
        if self.joined and self.joined.longest_s > self.max_duration_s:
            raise ValueError(
                f"joined.longest_s is {self.joined.longest_s:g}, over max_duration_s {self.max_duration_s:g}: lower it"
            )
        known = {*filter(None, pinned), *(self.splits if None in pinned else [])}
        if self.joined and (unknown := set(self.joined.splits or []) - known):
            raise ValueError(
                f"joined.splits names {', '.join(sorted(unknown))}, the splits are {', '.join(sorted(known))}"
            )
        return self

    def long_sources(self) -> list[Manifest]:
        """Return all sources in the long form."""
        return [Manifest(manifest=source) if isinstance(source, str) else source for source in self.sources]
