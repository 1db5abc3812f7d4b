"""Find and open the audio that manifests name: files, members of tar files, and rows of parquet and Arrow files.

    path or URI in a manifest -> AudioPlace -> AudioReader.open -> a file to decode, read by ranges

Places are local paths or URIs that graft.storage reads (s3://, hf://, http(s)://, file://).
"""

import bisect
import contextlib
import functools
import itertools
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa

from graft.data.columns import read_audio_column
from graft.data.dataset import CorpusFile, FooterCache, audio_file, read_parquet
from graft.errors import AudioError, DataError
from graft.storage.local_paths import local_path
from graft.storage.locations import open_file, redact_uri, retry_read
from graft.storage.source import BUFFER_BYTES, ReadRange, SourceFile, open_source

PARQUET = ".parquet"
BLOCKS_HELD = 8
"""Blocks of 1 MB that are held of a file on a network: its header, and where it is read."""


@dataclass(frozen=True, slots=True)
class AudioPlace:
    """Where an audio file is stored: a file, a range of an uncompressed tar file, or a row of a parquet or Arrow file.

    Of the optional fields, either `start` and `size` are given, or `row` and `column`.
    """

    uri: str
    """The file's URI or local path; the tar, parquet or Arrow file's where the audio is a part of one."""
    name: str
    """The audio file's own name, with its suffix."""
    start: int = 0
    """The first byte in a tar file."""
    size: int | None = None
    """Bytes in a tar file; None goes to the end of the file."""
    row: int | None = None
    """The row of a parquet or Arrow file, counted from its start."""
    column: str | None = None
    """The column of that file: binary, or a struct with the binary field `bytes`."""

    @property
    def sort_key(self) -> tuple[list[str], int, int]:
        """The order of places: by folders, then by the place in a file."""
        return self.uri.split("/"), self.start, self.row or 0

    def __str__(self) -> str:
        """Name the place in messages."""
        where = redact_uri(self.uri)
        if self.row is not None:
            return f"{where} row {self.row}"
        return where if self.size is None else f"{where}/{self.name}"


def file_place(location: str) -> AudioPlace:
    """Return the place of a whole file by its path or URI."""
    path = local_path(location)
    if path is None:
        path = location if location.startswith("hf://") else unquote(urlsplit(location).path)
    return AudioPlace(location, PurePosixPath(path).name)


def location_below(manifest: str, path: str, *, folder: str = ".") -> str:
    """Return the location of a path in a manifest, relative to `folder`, which is relative to the manifest's folder.

    Absolute paths and URIs stay as they are. The options of an s3:// URI hold for all its files.
    """
    if "://" in path:
        return path
    home = local_path(manifest)
    if home is not None:
        return str(Path(home).parent / folder / path)
    below = os.path.join(folder, path)
    if os.path.isabs(below):
        return below
    if manifest.startswith("hf://"):
        return f"hf://{posixpath.normpath(posixpath.join(posixpath.dirname(manifest[5:]), below))}"
    parts = urlsplit(manifest)
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(parts.path), quote(below)))
    # A signature of a web server's URI is that of one file.
    query = "" if parts.scheme in ("http", "https") else parts.query
    return parts._replace(path=joined, query=query, fragment="").geturl()


class AudioReader:
    """Opens audio places, one after the other; use one for each thread, and close it.

    It holds the row group or record batch that was read last, and of a file on a network the last BLOCKS_HELD blocks,
    so that neighbours in a tar file are fetched once. `home` is the folder that relative paths begin at.
    """

    def __init__(self, home: str = "") -> None:
        self._home = home
        self._rows = functools.lru_cache(maxsize=1)(_open_rows)
        self._stack = contextlib.ExitStack()
        self._remote: tuple[str, SourceFile] | None = None

    def close(self) -> None:
        """Close the file that is open."""
        self._remote = None
        self._stack.close()

    @contextlib.contextmanager
    def open(self, place: AudioPlace) -> Iterator[SourceFile]:
        """Open a place's audio file, named by its place in messages.

        A local file is read where it is, in ranges, and so is a part of a tar file. Reads over a network that fail in
        a way that may pass are retried. Raises AudioError for a place that is missing, empty or cannot be opened.
        """
        path, name = local_path(place.uri), str(place)
        location = place.uri if path is None else os.path.join(self._home, path)
        if place.row is not None:
            try:
                content = self._rows(location, place.column or "").read(place.row)
            except DataError as error:
                raise AudioError(str(error)) from error
            with open_source(content, name=name) as file:
                yield file
        elif path is None:
            yield _range_of(self._open_remote(place.uri), place)
        else:
            with open_source(location, name=name) as file:
                yield _range_of(file, place)

    def _open_remote(self, uri: str) -> SourceFile:
        if self._remote is None or self._remote[0] != uri:
            self.close()
            file = self._stack.enter_context(open_source(uri))
            self._remote = uri, SourceFile(file.label, file.size, _BlockCache(file.read_range))
        return self._remote[1]


def _range_of(file: SourceFile, place: AudioPlace) -> SourceFile:
    """Open the bytes of a place in its file."""
    end = file.size if place.size is None else place.start + place.size
    if end > file.size:
        raise AudioError(f"{place}: its tar file ends at byte {file.size:,}: fetch it again")
    return SourceFile(str(place), end - place.start, lambda start, count: file.read_range(place.start + start, count))


class _BlockCache:
    """Reads ranges of a file by whole blocks, and holds the last ones."""

    def __init__(self, read_range: ReadRange) -> None:
        self._block = functools.lru_cache(BLOCKS_HELD)(lambda number: read_range(number * BUFFER_BYTES, BUFFER_BYTES))

    def __call__(self, start: int, count: int) -> bytes:
        number, skipped = divmod(start, BUFFER_BYTES)
        return self._block(number)[skipped : skipped + count]


class _ParquetRows:
    """Reads the audio of a parquet file's rows, a row group at a time."""

    def __init__(self, file: CorpusFile) -> None:
        self._file = file
        self._footer = FooterCache([file], most=1).get(0)
        groups = map(self._footer.row_group, range(self._footer.num_row_groups))
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self._group = functools.lru_cache(maxsize=1)(self._read_group)

    def read(self, row: int) -> bytes:
        """Return the audio of a row. Raises DataError."""
        if not 0 <= row < self._starts[-1]:
            raise DataError(f"{redact_uri(self._file.uri)}: has no row {row}, but {self._starts[-1]} rows")
        group = bisect.bisect_right(self._starts, row) - 1
        return audio_file(self._group(group), row - self._starts[group], self._file, group)[0]

    def _read_group(self, group: int) -> pa.Table:
        def read(parquet: Any) -> pa.Table:
            return read_audio_column(parquet, self._file.audio, [group])[0]

        return read_parquet(self._file.uri, read, footer=self._footer)


class _ArrowRows:
    """Reads the audio of an Arrow stream's rows in their order, a record batch at a time; going back begins anew.

    Such a stream (`datasets` writes them) has no list of its batches: those before a row are read as well, from a local
    file only their sizes.
    """

    def __init__(self, uri: str, column: str) -> None:
        self._uri, self._column = uri, column
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._batch: pa.RecordBatch | None = None
        self._start = 0  # the first row of the batch

    def read(self, row: int) -> bytes:
        """Return the audio of a row. Raises DataError."""
        return retry_read(self._uri, lambda: self._read(row))

    def _read(self, row: int) -> bytes:
        try:
            batch = self._batch_of(row)
        except Exception:
            self._batches = None  # a stream that failed in the middle is opened again
            raise
        name, *inner = self._column.split(".")
        index = batch.schema.get_field_index(name)
        value: Any = None if index < 0 else batch.column(index)[row - self._start].as_py()
        for part in inner or (["bytes"] if isinstance(value, dict) else []):
            value = (value or {}).get(part)
        if not isinstance(value, bytes):
            raise DataError(f"{redact_uri(self._uri)}: row {row} holds no audio bytes in column {self._column}")
        return value

    def _batch_of(self, row: int) -> pa.RecordBatch:
        if self._batches is None or row < self._start:
            path = local_path(self._uri)
            source = open_file(self._uri) if path is None else pa.memory_map(path)
            self._batches, self._batch, self._start = iter(pa.ipc.open_stream(source)), None, 0
        while self._batch is None or row >= self._start + len(self._batch):
            self._start += 0 if self._batch is None else len(self._batch)
            self._batch = next(self._batches, None)
            if self._batch is None:
                end, self._batches = self._start, None
                raise DataError(f"{redact_uri(self._uri)}: has no row {row}, but {end} rows")
        return self._batch


def _open_rows(uri: str, column: str) -> _ParquetRows | _ArrowRows:
    """Open a file of rows by its suffix; every file that is not parquet is taken for an Arrow stream."""
    if PurePosixPath(uri.partition("?")[0]).suffix.lower() == PARQUET:
        return _ParquetRows(CorpusFile(uri, column))
    return _ArrowRows(uri, column)
