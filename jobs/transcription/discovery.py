"""Find what is to be transcribed: files, folders, globs, URIs, lists and parquet -> a table of named recordings.

A recording's name is its path below the place that named it. Only lists and the metadata of parquet files are opened.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graft.data.dataset import RowTable, read_rows
from graft.data.settings import Columns, Source
from graft.errors import DataError
from graft.storage.local_paths import local_path, utf8_location, utf8_name
from graft.storage.locations import StoredFile, find_files, redact_uri
from graft.storage.source import open_source
from graft.text.languages import language_code

AUDIO_SUFFIXES = (
    *(".3g2", ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".asf", ".au", ".avi", ".bwf", ".caf"),
    *(".dts", ".eac3", ".f4v", ".flac", ".flv", ".gsm", ".m2ts", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov"),
    *(".mp2", ".mp3", ".mp4", ".mpc", ".mpeg", ".mpg", ".mts", ".mxf", ".oga", ".ogg", ".ogm", ".ogv", ".opus"),
    *(".qt", ".ra", ".rf64", ".rm", ".snd", ".spx", ".tak", ".ts", ".tta", ".vob", ".voc", ".w64", ".wav", ".webm"),
    *(".wma", ".wmv", ".wv"),
)
"""Suffixes of the files that are taken from folders: those of sound and video that FFmpeg reads.

A file that is named itself may have any other.
"""
LIST_SUFFIXES = (".txt", ".lst")
PARQUET = ".parquet"
LOOKUPS = 32
"""Number of files of a list that are looked up at a time: over a network most of the time is waiting."""

RECORDINGS = pa.schema(
    [
        ("recording", pa.string()),  # its name
        ("uri", pa.string()),  # or absolute path; the parquet file's where it is a row of one
        ("version", pa.string()),  # changes when the file does
        ("size", pa.int64()),  # of the file in bytes; null if unknown
        ("duration_s", pa.float64()),  # null but for rows of parquet files that have it
        ("row_group", pa.int32()),  # null for files
        ("row", pa.int32()),  # within the row group
        ("audio_column", pa.string()),  # of the parquet file; null for files
        ("language", pa.string()),  # code (ISO 639-1); null where it is not known
    ]
)


class Discovery(NamedTuple):
    """What sources hold."""

    recordings: pa.Table
    """RECORDINGS, as find_recordings lists them."""
    skipped: list[str]
    """URIs or absolute paths of the files in folders that are left out, because their suffixes are no audio's."""


def find_recordings(sources: Sequence[str], columns: Columns | None = None) -> pa.Table:
    """Return the recordings that `discover` finds."""
    return discover(sources, columns).recordings


def discover(sources: Sequence[str], columns: Columns | None = None, *, results: str | None = None) -> Discovery:
    """List the recordings in files, folders (at any depth), globs, URIs, lists of them, and parquet files: RECORDINGS.

    Files are in the order of their names, followed by the rows of parquet files in their own order, so that each row
    group is read once. A list is a .txt or .lst file with a path or URI in each line, relative to its own folder, and
    optionally a tab and the language of the recording.
    `columns` names the columns of parquet files. What the folder `results` holds is neither a recording nor skipped: it
    may lie inside the folder that is transcribed. A file that does not exist is a recording too: the run reports it.
    Raises DataError when there are none, when two have the same name, and for lists that are not text and parquet
    files without the columns.
    """
    columns, skipped = columns or Columns(), list[str]()
    table = pa.concat_tables(
        [part for source in sources for part in _recordings_of(source, columns, skipped, results)]
        or [RECORDINGS.empty_table()]
    )
    if not len(table):
        left_out = sorted({suffix_of(uri) or "none" for uri in skipped})
        others = f" (only files with the suffixes {', '.join(left_out)})" if left_out else ""
        places = ", ".join(map(redact_uri, sources))
        raise DataError(f"no audio in {places}{others}: give audio or video files by name, or folders of them")
    return Discovery(_each_once(table), skipped)


def _recordings_of(source: str, columns: Columns, skipped: list[str], results: str | None) -> Iterator[pa.Table]:
    """Yield the recordings of one source, and append to `skipped` what its folder holds besides."""
    suffix = suffix_of(source)
    if suffix in LIST_SUFFIXES:
        yield _listed(source)
        return
    found = _found(source)
    if results:
        inside = f"{os.path.abspath(results)}/"
        found = [file for file in found if not (local_path(file.uri) or "").startswith(inside)]
    audio = [file for file in found if suffix_of(file.name) != PARQUET]
    corpora = [file for file in found if suffix_of(file.name) == PARQUET]
    is_named = any(sign in source for sign in "*?[") or [file.name for file in found] == [PurePosixPath(source).name]
    is_taken = [is_named or suffix_of(file.name) in AUDIO_SUFFIXES for file in audio]
    skipped += [file.uri for file, taken in zip(audio, is_taken, strict=True) if not taken]
    yield _files([file for file, taken in zip(audio, is_taken, strict=True) if taken])
    for file in corpora:
        rows = read_rows(Source(files=file.uri, columns=columns))
        yield recordings_of_rows(rows, versions=pa.repeat(file.version, len(rows)))


def _found(place: str) -> list[StoredFile]:
    try:
        return find_files(place)
    except DataError:
        if suffix_of(place) not in AUDIO_SUFFIXES:
            raise  # it may be a folder; a missing recording gets a row that says so
    path = local_path(place)
    uri = place if path is None else utf8_location(os.path.abspath(os.path.expanduser(path)))
    return [StoredFile(uri, utf8_name(PurePosixPath(path or place).name), None, "")]


def _listed(source: str) -> pa.Table:
    """Look up the files in a list; their names are their paths without the folders that all share."""
    with open_source(source) as file:
        data = file.read()
    if b"\0" in data:
        raise DataError(f"{redact_uri(source)}: a list holds a path or URI in each line: byte {data.index(0)} is zero")
    # Only these end a line or surround a name; names hold the other ends of lines and spaces of Unicode.
    lines = [line.strip(" \t\r") for line in os.fsdecode(data).split("\n")]
    path = local_path(source)
    home = (source if path is None else os.path.abspath(path)).rpartition("/")[0]
    named, languages = [], []
    for line in lines:
        if line and not line.startswith("#"):
            place, language = _parted(line)
            named.append(local_path(place) or place)
            languages.append(language)
    places = [line if "://" in line or os.path.isabs(line) else f"{home}/{line}" for line in named]
    folders = zip(*(place.split("/")[:-1] for place in places), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, folders))
    with ThreadPoolExecutor(LOOKUPS) as pool:
        files = [
            StoredFile(file.uri, utf8_name("/".join(place.split("/")[shared:])), file.size, file.version)
            for file, place in zip(pool.map(_looked_up, places), places, strict=True)
        ]
    return _files(files, languages)


def _parted(line: str) -> tuple[str, str | None]:
    """Part a line of a list into its place and, behind a tab, the code of its language.

    Names of files may hold tabs, too. Raises DataError for what looks like a language, but is none.
    """
    place, tab, language = line.rpartition("\t")
    if not tab or "." in language or "/" in language:
        return line, None
    return place.strip(" \t"), language_code(language)


def _looked_up(place: str) -> StoredFile:
    """Look up one file; one that is not there, or cannot be reached, fails when it is read."""
    try:
        (file,) = find_files(place)
    except (DataError, ValueError):
        return StoredFile(place if "://" in place else utf8_location(os.path.abspath(place)), "", None, "")
    return file


def _files(files: Sequence[StoredFile], languages: Sequence[str | None] = ()) -> pa.Table:
    """List files as RECORDINGS. A file whose language changes is a new version: its transcript does, too."""
    versions = (file.version for file in files)
    if any(languages):
        versions = (f"{file.version} {code or ''}".strip() for file, code in zip(files, languages, strict=True))
    values = {
        "recording": pa.array((file.name for file in files), pa.string()),
        "uri": pa.array((file.uri for file in files), pa.string()),
        "version": pa.array(versions, pa.string()),
        "size": pa.array((file.size for file in files), pa.int64()),
        "language": pa.array(languages or [None] * len(files), pa.string()),
    }
    return _table(values, len(files))


def recordings_of_rows(rows: RowTable, versions: pa.Array) -> pa.Table:
    """List the rows of a corpus as RECORDINGS that are named by their IDs."""
    file = pa.array(rows.file)
    values = {
        "recording": rows.ids.cast(pa.string()),
        "uri": pa.array([one.uri for one in rows.files]).take(file),
        "version": versions,
        "duration_s": pa.array(rows.duration_s, from_pandas=True),
        "row_group": pa.array(rows.row_group),
        "row": pa.array(rows.row),
        "audio_column": pa.array([one.audio for one in rows.files]).take(file),
        "language": pa.array([code or None for code in rows.languages], pa.string()).take(pa.array(rows.language)),
    }
    return _table(values, len(rows))


def _table(values: dict[str, pa.Array], count: int) -> pa.Table:
    return pa.table([values.get(field.name, pa.nulls(count, field.type)) for field in RECORDINGS], schema=RECORDINGS)


def _each_once(table: pa.Table) -> pa.Table:
    """Sort files by their names and rows by their places; a recording that is named twice counts once.

    Raises DataError for two recordings with one name.
    """
    keys = ["recording", "uri", "row_group", "row"]
    table = table.take(pc.sort_indices(table, [(key, "ascending") for key in keys]))
    names = table["recording"].combine_chunks()
    same_name = pc.equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    for place in np.flatnonzero(same_name).tolist():
        one, other = table.select(keys[1:]).slice(place, 2).to_pylist()
        if one != other:
            raise DataError(
                f"{redact_uri(one['uri'])} and {redact_uri(other['uri'])} would both be called {names[place]}: "
                "give a folder that holds both, or two runs"
            )
    # A filter copies the table, so an archive of files without repetitions is left as it is.
    if same_name.any():
        table = table.filter(pa.array(np.concatenate([[True], ~same_name])))
    is_row = table["row"].is_valid()
    if not pc.any(is_row).as_py():
        return table
    rows = table.filter(is_row).sort_by([(key, "ascending") for key in keys[1:]])
    return pa.concat_tables([table.filter(pc.invert(is_row)), rows])


def suffix_of(name: str) -> str:
    """Return the suffix of a path, or of a URI without its query, in lower case."""
    return PurePosixPath(name.partition("?")[0] if "://" in name else name).suffix.lower()
