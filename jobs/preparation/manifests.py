"""Read manifests of speech in the formats of the field: text, tar files and tables.

    a source -> its files -> records (by a reader of `formats`, or CSV) -> Row, or with its reason DroppedLine

Every line, sample and row of a table becomes one of the two. NeMo and Common Voice name fields differently and have no
ids.
"""

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, Literal

from graft.data.splits import comparable_text
from graft.errors import DataError
from graft.storage.locations import redact_uri
from graft.text.characters import compose
from graft.text.languages import language_code

from .audio_places import AudioPlace, file_place, location_below
from .formats.json_records import NOT_JSON, read_json
from .formats.lhotse_cuts import SHAR, is_lhotse, read_cut
from .formats.opening import OpenManifest, open_manifest
from .formats.records import BadRecord, Record
from .formats.sources import list_files
from .formats.tables import read_arrow_rows, read_parquet_rows
from .formats.tarred_audio import TarredAudio
from .formats.webdataset import DAMAGED, read_samples
from .recipe import Manifest

FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "ID"),
    "audio": ("audio", "audio_filepath", "path", "wav"),
    "text": ("text", "sentence", "transcription", "transcript"),
    "speaker": ("speaker", "client_id", "speaker_id", "spk_id"),
    "sex": ("sex", "gender"),
    "language": ("language", "lang", "locale"),
    "offset": ("offset",),
    "duration": ("duration",),
}
"""Names of a field in manifests: graft's name first, then those of NeMo, Common Voice, and usual data sets."""

DELIMITERS = "\t,;|"
NOT_CSV = "not CSV"
SYNTAX_REASONS = (NOT_JSON, NOT_CSV, DAMAGED)
"""Reasons of lines that cannot be parsed, so that their fields are not known."""
LONGEST_S = 1e6
"""Times beyond this are taken for errors: some headers give no length but the largest number."""

_QWEN_TEXT = re.compile(r"\s*language\s+([^<]+?)\s*<asr_text>(.*)", re.DOTALL)
"""A text for the fine-tuning of Qwen3-ASR, which names its language, or None."""


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


def list_manifests(sources: Sequence[Manifest]) -> list[Manifest]:
    """Name each file of sources that are folders, globs or have braces, and those on the hub by their present commits.

    The audio beside a manifest on the hub is then read at that commit, too. Raises DataError for a source that is
    missing, and for a folder that does not tell what is to be read.
    """
    return [source.of_file(file) for source in sources for file in list_files(source.manifest)]


def read_manifests(sources: Sequence[Manifest]) -> Iterator[Row | DroppedLine]:
    """Read every line of every manifest in order, one after the other, without those that a source's `only` leaves out.

    A source is one file. Raises DataError for a manifest that is missing or of another format, and where `only` matches
    none of the lines of the files that were given together.
    """
    for given, files in itertools.groupby(sources, key=lambda source: (source._given or source.place, source.only)):
        is_matched = False
        for source in files:
            with open_manifest(source.manifest, has_delimiter=source.delimiter is not None) as manifest:
                for result in _read_rows(manifest, source):
                    # Lines that cannot be parsed are reported whether `only` would match them or not.
                    is_matched |= not (isinstance(result, DroppedLine) and result.reason in SYNTAX_REASONS)
                    yield result
        place, only = given
        if only and not is_matched:
            raise DataError(f"manifest {place}: no line matches only={only}: give a glob of a field's whole value")


def _read_rows(manifest: OpenManifest, source: Manifest) -> Iterator[Row | DroppedLine]:
    """Make rows of a manifest's records, but for those that `only` leaves out."""
    for record in _read_records(manifest, source):
        if isinstance(record, BadRecord):
            yield DroppedLine(source.place, record.number, record.id, record.reason, record.detail)
        elif _is_selected(record.values, source):
            yield _parse_fields(record, source)


def _read_records(manifest: OpenManifest, source: Manifest) -> Iterator[Record | BadRecord]:
    names, named = {field: _names_of(field, source) for field in FIELD_NAMES}, [*source.columns.values(), *source.only]
    match manifest.format:
        case "csv":
            return _read_csv(manifest.file, source)
        case "tar":
            return read_samples(manifest.file, source.manifest, source.place)
        case "parquet":
            return read_parquet_rows(source.manifest, names, named)
        case "arrow":
            return read_arrow_rows(source.manifest, names, named)
    return _read_json(manifest.file, source)


def _read_json(file: BinaryIO, source: Manifest) -> Iterator[Record | BadRecord]:
    tars = TarredAudio(source.manifest, source.tars)
    for record in read_json(file, source.place):
        clips: Iterable[Record | BadRecord] = [record]
        if isinstance(record, Record) and is_lhotse(record.values):
            clips = read_cut(record.values, record.number)
        for clip in clips:
            yield _with_tarred_audio(clip, source, tars) if isinstance(clip, Record) else clip


def _with_tarred_audio(record: Record, source: Manifest, tars: TarredAudio) -> Record | BadRecord:
    """Give a record the place of its audio, where that is in a tar file beside the manifest."""
    values, place = record.values, None
    if SHAR in values:
        place = tars.find_recording(str(values[SHAR]), record.number)
    elif tars.holds(values):
        path = next(filter(None, (_text_of(values, name) for name in _names_of("audio", source))), "")
        # NeMo writes the names of members without folders.
        if path and (source.tars or "/" not in path):
            place = tars.find(values, path, record.number)
    return place if isinstance(place, BadRecord) else replace(record, audio=place)


def _read_csv(file: BinaryIO, source: Manifest) -> Iterator[Record | BadRecord]:
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
                yield BadRecord(number, NOT_CSV, detail)
            elif values:
                yield Record(number, dict(zip(header, values, strict=True)))
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


def _parse_fields(record: Record, source: Manifest) -> Row | DroppedLine:
    """Make a row of a record's values, or the reason why there is none."""
    values, number = record.values, record.number
    found = {
        field: next((name for name in _names_of(field, source) if _text_of(values, name)), "") for field in FIELD_NAMES
    }
    fields = {field: _text_of(values, name) for field, name in found.items()}
    if record.is_whole:
        fields["offset"] = fields["duration"] = ""
    if not fields["id"] and not any(name in values for name in _names_of("id", source)):
        path = record.id or redact_uri(fields["audio"])
        fields["id"] = path + (f"@{fields['offset']}" if path and fields["offset"] else "")
    if prefix := _QWEN_TEXT.fullmatch(fields["text"]):
        named = "" if prefix[1].lower() == "none" else prefix[1]
        fields |= {"language": fields["language"] or named, "text": prefix[2].strip()}
    # Punctuation alone is nothing that could be said.
    fields["text"] = compose(fields["text"]) if comparable_text(fields["text"]) else ""
    for field in _required_fields(source, "id", "audio", "text"):
        if not fields[field] and not (field == "audio" and record.audio):
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
        record.audio or file_place(location_below(source.manifest, fields["audio"], folder=source.folder)),
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
