"""Read the audio of many rows at once: each row group whole, several files together, or a large row group in slices.

Where the next call goes on in a row group, its file stays open, so that a slice costs no byte of those before it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from graft.audio.clip import AudioClip, read_audio
from graft.data.columns import iter_audio_column, read_audio_column
from graft.data.dataset import CorpusFile, FooterCache, RowTable, audio_file, read_parquet
from graft.errors import DataError
from graft.storage.locations import open_parquet, retry_read

READING_THREADS = 8  # The threads mostly wait for a network.
STREAMED_ROWS = 32
"""Number of rows that are decoded at a time from a row group that is read in slices."""

GroupKey = tuple[int, int]
"""A file, by its index, and a row group of it."""
Span = tuple[int, int, int, int]  # file, row group, first row, end of the rows


@dataclass(frozen=True, slots=True)
class StoredAudio:
    """An audio file as it is stored in a corpus."""

    content: bytes
    name: str
    fault: str | None = None
    """Reason why the corpus could not be read; None where it could."""

    def clip(self, *, max_s: float | None = None) -> AudioClip:
        """Decode the file. Raises AudioError, also beyond `max_s` seconds, and DataError for one that was not read."""
        if self.fault is not None:
            raise DataError(self.fault)
        return read_audio(self.content, name=self.name, max_s=max_s)


class ReadAudio:
    """The audio of the row groups that were read."""

    def __init__(self, files: Sequence[CorpusFile], groups: Mapping[GroupKey, tuple[int, pa.Table] | DataError]):
        self._files, self._groups = files, groups

    def stored(self, rows: RowTable, row: int) -> StoredAudio:
        """Return the audio of a row of the table, with its path, or else the row's id, as its name."""
        file, row_group = int(rows.file[row]), int(rows.row_group[row])
        found = self._groups[file, row_group]
        try:
            if isinstance(found, DataError):
                raise found
            first, audio = found
            content, path = audio_file(audio, int(rows.row[row]), self._files[file], row_group, first=first)
        except DataError as error:
            return StoredAudio(b"", rows.id(row), str(error))
        return StoredAudio(content, path or rows.id(row))

    def only(self, keys: AbstractSet[GroupKey]) -> "ReadAudio":
        """Drop the row groups that are not among these."""
        return ReadAudio(self._files, {key: found for key, found in self._groups.items() if key in keys})

    def __contains__(self, key: GroupKey) -> bool:
        return key in self._groups

    def __or__(self, other: "ReadAudio") -> "ReadAudio":
        return ReadAudio(self._files, {**self._groups, **other._groups})


class GroupReader:
    """Fetches the audio of rows, given by RowTable's columns. Use one for each process."""

    def __init__(self, files: Sequence[CorpusFile]) -> None:
        self.files = list(files)
        self._footers = FooterCache(self.files, most=256)
        self._streams: dict[GroupKey, _Stream] = {}
        self._pool = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="graft-reading")

    def read(
        self, file: np.ndarray, row_group: np.ndarray, row: np.ndarray, *, continued: frozenset[GroupKey] = frozenset()
    ) -> ReadAudio:
        """Read rows (rows,). Of the `continued` row groups only the span of the rows, as the next call goes on there.

        A file that cannot be read is a fault of its rows only.
        """
        spans = itertools.groupby(row_group_spans(file, row_group, row), key=lambda span: span[0])
        parts = self._pool.map(lambda of_file: self._read_file(of_file, continued), [list(part) for _, part in spans])
        return ReadAudio(self.files, {key: found for part in parts for key, found in part.items()})

    def _read_file(
        self, spans: Sequence[Span], continued: frozenset[GroupKey]
    ) -> dict[GroupKey, tuple[int, pa.Table] | DataError]:
        sliced = [span for span in spans if span[:2] in continued or span[:2] in self._streams]
        found = self._read_whole([span[:2] for span in spans if span not in sliced])
        for file, group, first, stop in sliced:
            try:
                found[file, group] = first, self._read_slice((file, group), first, stop, (file, group) in continued)
            except DataError as error:
                found[file, group] = error
        return found

    def _read_whole(self, keys: Sequence[GroupKey]) -> dict[GroupKey, tuple[int, pa.Table] | DataError]:
        if not keys:
            return {}
        opened, groups = self.files[keys[0][0]], [group for _, group in keys]
        try:
            footer = self._footers.get(keys[0][0])
            tables = read_parquet(
                opened.uri, lambda parquet: read_audio_column(parquet, opened.audio, groups), footer=footer
            )
        except DataError as error:
            return dict.fromkeys(keys, error)
        return {key: (0, table) for key, table in zip(keys, tables, strict=True)}

    def _read_slice(self, key: GroupKey, first: int, stop: int, is_continued: bool) -> pa.Table:
        def attempt() -> tuple[_Stream, pa.Table]:
            stream = self._streams.pop(key, None)
            if stream is None or stream.row > first:
                stream = _Stream(self._tables(key))
            return stream, stream.read(first, stop)

        stream, audio = retry_read(self.files[key[0]].uri, attempt)
        if is_continued:
            self._streams[key] = stream
        else:
            stream.tables.close()
        return audio

    def _tables(self, key: GroupKey) -> Any:
        opened, footer = self.files[key[0]], self._footers.get(key[0])
        with open_parquet(opened.uri, footer, is_streamed=True) as parquet:
            yield from iter_audio_column(parquet, opened.audio, key[1], STREAMED_ROWS)


class _Stream:
    """A row group that is read from its first row on; `tables` yields its rows."""

    def __init__(self, tables: Any) -> None:
        self.tables = tables
        self.row = 0
        self._left: pa.Table | None = None  # rows that were decoded and not asked for yet, from `row` on

    def read(self, first: int, stop: int) -> pa.Table:
        """Take the rows from `first`, which is not behind `row`, to `stop`."""
        parts = []
        while self.row < stop:
            table = next(self.tables, None) if self._left is None else self._left
            if table is None:
                raise DataError(f"a row group ends after {self.row} rows: the file was replaced while it was read")
            taken = table.slice(0, stop - self.row)
            self._left = table.slice(len(taken)) if len(taken) < len(table) else None
            parts.append(taken.slice(max(0, first - self.row)))  # empty for rows that are skipped
            self.row += len(taken)
        return pa.concat_tables(parts)


def row_group_spans(file: np.ndarray, row_group: np.ndarray, row: np.ndarray) -> Iterator[Span]:
    """Yield the first row and the end of the rows in each row group of each file, in order."""
    order = np.lexsort((row, row_group, file))
    file, row_group, row = file[order], row_group[order], row[order]
    is_first = (np.diff(file, prepend=-1) != 0) | (np.diff(row_group, prepend=-1) != 0)
    starts = np.flatnonzero(is_first)
    stops = np.append(starts, len(row))[1:]
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        yield int(file[start]), int(row_group[start]), int(row[start]), int(row[stop - 1]) + 1
