"""Read manifests of speech: JSON lines and CSV or TSV with a header line, also those of NeMo and Common Voice.

Every line becomes a Row or, with its reason, a DroppedLine. NeMo and Common Voice name fields differently and have no
ids.
"""

import contextlib
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field

from graft.config import Recipe
from graft.data.splits import comparable_text
from graft.errors import AudioError, DataError
from graft.keys import Location
from graft.storage.local_paths import local_path
from graft.storage.locations import pin_revision, redact_uri
from graft.storage.source import open_source
from graft.text.characters import compose
from graft.text.languages import language_code

from .audio_places import AudioPlace, file_place, location_below

SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FieldName = Literal["id", "audio", "text", "speaker", "sex", "language", "offset", "duration"]

FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "audio": ("audio", "audio_filepath", "path"),
    "text": ("text", "sentence"),
    "speaker": ("speaker", "client_id"),
    "sex": ("sex", "gender"),
    "language": ("language", "lang", "locale"),
    "offset": ("offset",),
    "duration": ("duration",),
}
"""Names of a field in manifests: graft's name first, then NeMo's or Common Voice's."""

DELIMITERS = "\t,;|"
SYNTAX_REASONS = ("not JSON", "not CSV")
"""Reasons of lines that cannot be parsed, so that their fields are not known."""
LONGEST_S = 1e6
"""Times beyond this are taken for errors: some headers give no length but the largest number."""


class Manifest(Recipe):
    """A manifest, and how to read it."""

    manifest: Location
    """Path or URI of JSON lines, or of CSV (*.csv, *.tsv or a given delimiter), with the fields audio and text and
    optionally id, speaker, sex, language, offset and duration."""
    split: SplitName | None = None
    """Split that every row of this manifest goes to; null draws splits by the shares of `splits`."""
    folder: str = "."
    """Folder that audio paths are relative to, itself relative to the manifest's folder; `clips` for Common Voice."""
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

    @property
    def place(self) -> str:
        """The manifest's location as messages show it."""
        return redact_uri(self.manifest)


@dataclass(frozen=True, slots=True)
class Row:
    """A clip of a manifest, and its line there."""

    id: str
    audio: AudioPlace
    text: str  # "" where it is unlabelled
    speaker: str | None
    sex: str | None
    pinned: str | None  # the split that its manifest is pinned to
    source: str  # location of the manifest, as messages show it
    line: int
    offset_s: float = 0.0  # start of the clip in its file
    length_s: float | None = None  # of the clip; None: to the file's end
    duration_s: float = 0.0  # measured from the audio
    language: str | None = None  # its code
    copy: AudioPlace | None = None  # the clip, where it was copied out of its file or from a network

    def dropped(self, reason: str, detail: str = "") -> "DroppedLine":
        """Say why this row is in no split."""
        return DroppedLine(self.source, self.line, self.id, reason, detail)


@dataclass(frozen=True, slots=True)
class DroppedLine:
    """A line of a manifest that is in no split, and the reason."""

    source: str
    line: int
    id: str | None
    reason: str
    detail: str = ""


def pin_revisions(sources: Sequence[Manifest]) -> list[Manifest]:
    """Name manifests on the hub by their present commits, at which the audio beside them is then read, too.

    Raises DataError for one that is missing.
    """
    return [source.model_copy(update={"manifest": pin_revision(source.manifest)}) for source in sources]


def read_manifests(sources: Sequence[Manifest]) -> Iterator[Row | DroppedLine]:
    """Read every line of every manifest in order, one after the other, without those that a source's `only` leaves out.

    Raises DataError for a manifest that is missing or of another format, and where `only` matches none of its lines.
    """
    for source in sources:
        is_csv = source.delimiter or _suffix(source.manifest) in (".csv", ".tsv")
        is_matched = False
        with _open_manifest(source.manifest) as file:
            for result in _read_csv(file, source) if is_csv else _read_json(file, source):
                # Lines that cannot be parsed are reported whether `only` would match them or not.
                is_matched |= not (isinstance(result, DroppedLine) and result.reason in SYNTAX_REASONS)
                yield result
        if source.only and not is_matched:
            raise DataError(
                f"manifest {source.place}: no line matches only={source.only}: give a glob of a field's whole value"
            )


@contextlib.contextmanager
def _open_manifest(location: str) -> Iterator[BinaryIO]:
    """Open a manifest, which is read by ranges. Raises DataError where it is missing, or where reading it failed."""
    try:
        path = local_path(location)
        if path is not None:
            with open(path, "rb") as local:
                yield local
            return
        with open_source(location) as file:
            yield file
            file.check()
    except (OSError, AudioError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition(": ")[2].rpartition(": ")[0]
        raise DataError(
            f"manifest {redact_uri(location)}: {reason}: give the path or URI of a JSON-lines or CSV file"
        ) from error


def _suffix(location: str) -> str:
    return PurePosixPath(file_place(location).name).suffix.lower()


def _read_json(file: BinaryIO, source: Manifest) -> Iterator[Row | DroppedLine]:
    count, is_json = 0, False
    lines = (line for block in file for line in block.splitlines())
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        count += 1
        result = _parse_json(line, source, number)
        is_json |= not (isinstance(result, DroppedLine) and result.reason == "not JSON")
        if result:
            yield result
    if not is_json:
        raise DataError(f"manifest {source.place}: none of its {count} lines is JSON: wants one object a line")


def _parse_json(line: bytes, source: Manifest, number: int) -> Row | DroppedLine | None:
    """Parse one line; None where `only` leaves it out."""
    try:
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which is no text
    except ValueError as error:
        return DroppedLine(source.place, number, None, "not JSON", str(error))
    if not isinstance(values, dict):
        return DroppedLine(source.place, number, None, "not JSON", f"a {type(values).__name__}, wants an object")
    return _parse_fields(values, source, number) if _is_selected(values, source) else None


def _read_csv(file: BinaryIO, source: Manifest) -> Iterator[Row | DroppedLine]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    number = 0
    try:
        first = text.readline()
        delimiter = source.delimiter or max(DELIMITERS, key=first.count)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        lines = csv.reader(itertools.chain([first], text), delimiter=delimiter, quoting=quoting, strict=True)
        header = [name.strip() for name in next(lines, [])]
        required = _required_fields(source, "audio", "text")
        if missing := [field for field in required if not set(_names_of(field, source)) & set(header)]:
            raise DataError(
                f"manifest {source.place}: its header {header} names no {' and no '.join(missing)}: "
                "say `columns: {...}`"
            )
        for values in lines:
            number = lines.line_num
            if len(values) not in (0, len(header)):
                detail = f"{len(values)} fields, the header has {len(header)}"
                yield DroppedLine(source.place, number, None, "not CSV", detail)
            elif values and _is_selected(fields := dict(zip(header, values, strict=True)), source):
                yield _parse_fields(fields, source, number)
    except csv.Error as error:
        raise DataError(f"manifest {source.place}: line {lines.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"manifest {source.place}: not UTF-8 ({error.reason}, after line {number}): save it as UTF-8"
        ) from error
    finally:
        text.detach()


def _names_of(field: str, source: Manifest) -> tuple[str, ...]:
    return (source.columns[field],) if field in source.columns else FIELD_NAMES[field]


def _required_fields(source: Manifest, *fields: str) -> list[str]:
    return [field for field in fields if field != "text" or source.unlabelled == "drop"]


def _is_selected(values: Mapping[str, Any], source: Manifest) -> bool:
    return all(fnmatchcase(_text_of(values, name), pattern) for name, pattern in source.only.items())


def _parse_fields(values: Mapping[str, Any], source: Manifest, number: int) -> Row | DroppedLine:
    """Make a row of a line's values, or the reason why there is none."""
    found = {
        field: next((name for name in _names_of(field, source) if _text_of(values, name)), "") for field in FIELD_NAMES
    }
    fields = {field: _text_of(values, name) for field, name in found.items()}
    if found["audio"] in FIELD_NAMES["audio"][1:] and not fields["id"]:  # NeMo and Common Voice have no ids
        fields["id"] = redact_uri(fields["audio"]) + (f"@{fields['offset']}" if fields["offset"] else "")
    # Punctuation alone is nothing that could be said.
    fields["text"] = compose(fields["text"]) if comparable_text(fields["text"]) else ""
    for field in _required_fields(source, "id", "audio", "text"):
        if not fields[field]:
            return DroppedLine(source.place, number, fields["id"] or None, f"no {field}")
    try:
        language = language_code(fields["language"]) if fields["language"] else None
    except DataError:
        return DroppedLine(source.place, number, fields["id"], "no such language", fields["language"])
    try:
        offset_s = float(fields["offset"] or 0)
        # The duration of a whole file is measured; that of a part of a file is for the manifest to say.
        is_part = bool(fields["offset"]) or found["audio"] == "audio_filepath"
        length_s = float(fields["duration"]) if fields["duration"] and is_part else None
        if not (0 <= offset_s < LONGEST_S and (length_s is None or 0 < length_s < LONGEST_S)):
            raise ValueError(f"offset {offset_s:g} s, duration {length_s} s")
    except ValueError as error:
        return DroppedLine(source.place, number, fields["id"], "no such time", str(error))
    return Row(
        fields["id"],
        file_place(location_below(source.manifest, fields["audio"], folder=source.folder)),
        fields["text"],
        sys.intern(fields["speaker"]) or None,
        sys.intern(fields["sex"]) or None,
        source.split,
        source.place,
        number,
        offset_s,
        length_s,
        language=language,
    )


def _text_of(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return str(value).strip() if isinstance(value, str | int | float) else ""
