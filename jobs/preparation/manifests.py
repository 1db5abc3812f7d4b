"""Manifests of speech -> rows: JSON lines, NeMo's among them, and CSV or TSV with a header line (Common Voice's among them).

Every line becomes a Row or, with its reason, a Dropped. NeMo and Common Voice have names of their own for the fields, and no ids.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import soundfile
from pydantic import Field

from graft.config import Recipe
from graft.data.splits import comparable_text
from graft.errors import AudioError, DataError

SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FieldName = Literal["id", "audio", "text", "speaker", "sex", "offset", "duration"]

NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "audio": ("audio", "audio_filepath", "path"),
    "text": ("text", "sentence"),
    "speaker": ("speaker", "client_id"),
    "sex": ("sex", "gender"),
    "offset": ("offset",),
    "duration": ("duration",),
}
"""What a field is called: by graft first, then by NeMo or Common Voice."""

_DELIMITERS = "\t,;|"
_NO_FIELDS = ("not JSON", "not CSV")  # reasons of lines whose fields can't be told
_SLACK_S = 0.1  # between what a manifest says of a file's length and what the file says


class Manifest(Recipe):
    """A manifest, with or without a split of its own."""

    manifest: str
    """JSON lines, or CSV (*.csv, *.tsv or a given delimiter), with audio, text and optionally id, speaker, sex, offset and duration."""
    split: SplitName | None = None
    """Put every row of this manifest into this split."""
    folder: str = "."
    """What audio paths are relative to, itself relative to the manifest; `clips` for Common Voice."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Of a CSV; null: the one of tab, comma, semicolon and bar that its header line holds most often. With a tab, quotes are text."""
    columns: dict[FieldName, str] = Field(default_factory=dict)
    """Field -> what it is called in this manifest."""
    only: dict[str, str] = Field(default_factory=dict)
    """Field, by its name in this manifest -> glob, as {source: "LibriSpeech*"}. Lines that do not match all are no part of this source, and
    not counted as dropped: a manifest can be given once for each split that it holds."""
    unlabelled: Literal["drop", "keep"] = "drop"
    """Keep writes lines without a text, for jobs.label; they have an empty one."""


@dataclass(frozen=True)
class Row:
    """A clip of a manifest, and where it stands there."""

    id: str
    audio: Path
    text: str  # "" where it is unlabelled
    speaker: str | None
    sex: str | None
    pinned: str | None  # split
    source: str
    line: int
    offset_s: float = 0.0  # where the clip begins in its file
    length_s: float | None = None  # of the clip, None to the file's end
    duration_s: float = 0.0  # measured from the audio


@dataclass(frozen=True)
class Dropped:
    """A manifest line that goes into no split."""

    source: str
    line: int
    id: str | None
    reason: str
    detail: str = ""


def read_manifests(sources: Sequence[Manifest]) -> Iterator[Row | Dropped]:
    """Read every line of every manifest, in order; lines that a source's `only` leaves out are passed over, unless they can't be read.

    Raises DataError for a manifest that is missing or of another kind altogether, and where `only` matches none of its lines.
    """
    for source in sources:
        try:
            content = Path(source.manifest).read_bytes()
        except OSError as error:
            raise DataError(
                f"manifest {source.manifest}: {error.strerror}: give the path of a JSON-lines or CSV file"
            ) from error
        is_csv = source.delimiter or Path(source.manifest).suffix.lower() in (".csv", ".tsv")
        results = list(_read_csv(content, source) if is_csv else _read_json(content, source))
        if source.only and all(isinstance(result, Dropped) and result.reason in _NO_FIELDS for result in results):
            raise DataError(
                f"manifest {source.manifest}: no line matches only={source.only}: give a glob of a field's whole value"
            )
        yield from results


def header_s(row: Row) -> float:
    """Seconds of a row's clip by its file's header, 0 where there is none."""
    return max(0.0, _file_s(row.audio) - row.offset_s) if row.length_s is None else row.length_s


def clip_of(row: Row) -> Path | bytes:
    """The row's audio file or, where the row is but a part of it, this part as FLAC. Raises AudioError for times beyond the file's end."""
    past_s = 0.0 if row.length_s is None else _file_s(row.audio) - row.offset_s - row.length_s
    return _cut(row) if row.offset_s or past_s > _SLACK_S else row.audio


def _file_s(audio: Path) -> float:
    try:
        file_s = soundfile.info(str(audio)).duration
    except (soundfile.LibsndfileError, TypeError):  # TypeError: *.raw, which states no format
        return 0.0  # who decodes it says what is wrong
    return file_s if file_s < 1e6 else 0.0  # a header without a length: the same


def _cut(row: Row) -> bytes:
    clip = io.BytesIO()
    try:
        with soundfile.SoundFile(row.audio) as file:
            start = round(row.offset_s * file.samplerate)
            count = file.frames - start if row.length_s is None else round(row.length_s * file.samplerate)
            if start >= file.frames or start + count > file.frames + _SLACK_S * file.samplerate:
                length_s = file.frames / file.samplerate
                raise AudioError(
                    f"{row.audio}: holds {length_s:.3f} s, the clip begins at {row.offset_s:g} s and lasts {row.length_s} s"
                )
            file.seek(start)
            samples = file.read(count, dtype="int32")
            subtype = "PCM_24" if file.subtype in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE") else "PCM_16"
            soundfile.write(clip, samples, file.samplerate, format="FLAC", subtype=subtype)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(
            f"{row.audio}: not readable as audio ({error}): convert it, e.g. `ffmpeg -i IN OUT.flac`"
        ) from error
    return clip.getvalue()


def _read_json(content: bytes, source: Manifest) -> Iterator[Row | Dropped]:
    lines = content.splitlines()
    results = [_parse_line(line, source, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if all(isinstance(result, Dropped) and result.reason == "not JSON" for result in results):
        raise DataError(
            f"manifest {source.manifest}: none of its {len(results)} lines is JSON: wants one object a line"
        )
    yield from (result for result in results if result)


def _parse_line(line: bytes, source: Manifest, number: int) -> Row | Dropped | None:
    try:
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except ValueError as error:
        return Dropped(source.manifest, number, None, "not JSON", str(error))
    if not isinstance(values, dict):
        return Dropped(source.manifest, number, None, "not JSON", f"a {type(values).__name__}, wants an object")
    return _row(values, source, number) if _matches(values, source) else None


def _read_csv(content: bytes, source: Manifest) -> Iterator[Row | Dropped]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"manifest {source.manifest}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    delimiter = source.delimiter or max(_DELIMITERS, key=text.partition("\n")[0].count)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    try:
        header = [name.strip() for name in next(lines, [])]
        wanted = [field for field in _needed(source, "audio", "text") if not set(_names(source, field)) & set(header)]
        if wanted:
            raise DataError(
                f"manifest {source.manifest}: its header {header} names no {' and no '.join(wanted)}: say `columns: {{...}}`"
            )
        for values in lines:
            if len(values) not in (0, len(header)):
                detail = f"{len(values)} fields, the header has {len(header)}"
                yield Dropped(source.manifest, lines.line_num, None, "not CSV", detail)
            elif values and _matches(fields := dict(zip(header, values, strict=True)), source):
                yield _row(fields, source, lines.line_num)
    except csv.Error as error:
        raise DataError(f"manifest {source.manifest}: line {lines.line_num}: {error}") from error


def _names(source: Manifest, field: str) -> tuple[str, ...]:
    return (source.columns[field],) if field in source.columns else NAMES[field]


def _matches(values: Mapping[str, Any], source: Manifest) -> bool:
    return all(fnmatchcase(_value(values, name), pattern) for name, pattern in source.only.items())


def _needed(source: Manifest, *fields: str) -> list[str]:
    return [field for field in fields if field != "text" or source.unlabelled == "drop"]


def _row(values: Mapping[str, Any], source: Manifest, number: int) -> Row | Dropped:
    found = {field: next((name for name in _names(source, field) if _value(values, name)), "") for field in NAMES}
    fields = {field: _value(values, name) for field, name in found.items()}
    if found["audio"] in NAMES["audio"][1:] and not fields["id"]:  # NeMo and Common Voice have no ids
        fields["id"] = fields["audio"] + (f"@{fields['offset']}" if fields["offset"] else "")
    if not comparable_text(fields["text"]):
        fields["text"] = ""  # nothing that could be said
    for field in _needed(source, "id", "audio", "text"):
        if not fields[field]:
            return Dropped(source.manifest, number, fields["id"] or None, f"no {field}")
    try:
        offset_s = float(fields["offset"] or 0)
        # A file's duration is measured; a clip's, which is a part of a file, is the manifest's to say.
        is_part = bool(fields["offset"]) or found["audio"] == "audio_filepath"
        length_s = float(fields["duration"]) if fields["duration"] and is_part else None
        if not (0 <= offset_s < 1e6 and (length_s is None or 0 < length_s < 1e6)):
            raise ValueError(f"offset {offset_s:g} s, duration {length_s} s")
    except ValueError as error:
        return Dropped(source.manifest, number, fields["id"], "no such time", str(error))
    audio = Path(source.manifest).parent / source.folder / fields["audio"]
    speaker, sex = fields["speaker"] or None, fields["sex"] or None
    return Row(
        fields["id"], audio, fields["text"], speaker, sex, source.split, source.manifest, number, offset_s, length_s
    )


def _value(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return str(value).strip() if isinstance(value, str | int | float) else ""
