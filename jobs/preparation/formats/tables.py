"""Read tables with audio: parquet, and the Arrow streams of Hugging Face `datasets`.

The audio is a column of bytes, a struct of bytes and path (`datasets` writes it), or paths of files. Its bytes are left
where they are: a record names the row.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from graft.data.dataset import read_parquet
from graft.errors import DataError
from graft.storage.local_paths import local_path
from graft.storage.locations import open_file, open_parquet, redact_uri, retry_read

from ..audio_places import PARQUET, AudioPlace, file_place
from .records import Record

Names = Mapping[str, Sequence[str]]
"""The columns that a field may be called, by fields."""

_BINARY = (pa.binary(), pa.large_binary())
_TEXT = (pa.string(), pa.large_string())
_SCANNED_ROWS = 16


def read_parquet_rows(location: str, names: Names, others: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of a parquet file: the columns that may be fields, and `others`, which must be there.

    Raises DataError where it cannot be read, or lacks a column, or none holds audio.
    """
    place = redact_uri(location)
    if PurePosixPath(file_place(location).name).suffix.lower() != PARQUET:
        raise DataError(f"manifest {place}: is a parquet file: name it *{PARQUET}")
    with _readable(place):
        metadata, schema = read_parquet(location, lambda parquet: (parquet.metadata, parquet.schema_arrow))
        layout = _Layout.of(schema, names, others, place)
        first = 0
        for group in range(metadata.num_row_groups):
            table = read_parquet(location, _group_reader(layout, group), footer=metadata)
            held = _held_bytes(location, metadata, layout, group)
            for batch in table.to_batches():
                yield from layout.records(batch, held[: len(batch)], location, first)
                first, held = first + len(batch), held[len(batch) :]


def read_arrow_rows(location: str, names: Names, others: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of an Arrow stream as read_parquet_rows does; over a network all of it is read through."""
    place, path = redact_uri(location), local_path(location)
    with _readable(place):
        source = pa.memory_map(path) if path is not None else retry_read(location, lambda: open_file(location))
        with contextlib.closing(source), pa.ipc.open_stream(source) as batches:
            layout = _Layout.of(batches.schema, names, others, place)
            first = 0
            for batch in batches:
                chosen = batch.select([column for column in layout.columns if column in batch.schema.names])
                chosen.validate(full=True)  # lengths in a damaged file may lead out of it
                yield from layout.records(chosen, layout.held_bytes(chosen), location, first)
                first += len(batch)


@dataclass(frozen=True)
class _Layout:
    """The columns of a table."""

    audio: str
    kind: Literal["bytes", "struct", "path"]
    has_path: bool
    scalars: list[str]
    labels: dict[str, list[str]]
    """Names of the numbers in a column of classes."""
    path_field: str
    """The name under which a record has the path of its audio."""

    @classmethod
    def of(cls, schema: pa.Schema, names: Names, others: Sequence[str], place: str) -> "_Layout":
        """Find the columns of a schema. Raises DataError where none holds audio."""
        if missing := [name for name in others if name not in schema.names]:
            raise DataError(
                f"manifest {place}: has no column {', '.join(missing)}, but {', '.join(schema.names):.300}: correct "
                "`columns` or `only`"
            )
        kinds = {name: _kind(schema.field(name).type) for name in schema.names}
        named = [name for name in names["audio"] if kinds.get(name)]
        structs = [name for name, kind in kinds.items() if kind == "struct"]
        # Of the columns that could be the audio, one that holds it comes before one that names its file.
        held = [name for name in named if kinds[name] != "path"] or (structs if len(structs) == 1 else [])
        audio = next(iter([*held, *named]), None)
        if audio is None or (kind := kinds[audio]) is None:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(
                f"manifest {place}: no column holds audio as bytes, as struct<bytes, path> or by its path, of "
                f"{columns:.300}: say `columns: {{audio: NAME}}`"
            )
        wanted = {name for field, columns in names.items() if field != "audio" for name in columns} | {*others}
        scalars = [name for name in schema.names if name in wanted and name != audio]
        has_path = kind == "struct" and "path" in {field.name for field in schema.field(audio).type}
        return cls(audio, kind, has_path, scalars, _class_labels(schema), names["audio"][0])

    @property
    def columns(self) -> list[str]:
        """The columns of an Arrow table that are read."""
        return [*self.scalars, self.audio]

    @property
    def leaves(self) -> list[str]:
        """The columns of a parquet file that are read, which are not those with audio bytes."""
        path = {"bytes": [], "struct": [f"{self.audio}.path"] if self.has_path else [], "path": [self.audio]}
        return [*self.scalars, *path[self.kind]]

    def held_bytes(self, batch: pa.RecordBatch) -> list[bool]:
        """Tell which rows of a batch hold audio bytes."""
        if self.kind == "path":
            return [False] * len(batch)
        column = batch.column(self.audio)
        content = column.field("bytes") if self.kind == "struct" else column
        return [bool(own and inner) for own, inner in zip(_valid(column), _valid(content), strict=True)]

    def records(self, batch: pa.RecordBatch, held: Sequence[bool], location: str, first: int) -> Iterator[Record]:
        """Yield the rows of a batch, which begins at row `first` of its file."""
        columns = {name: self._values(batch, name) for name in self.scalars}
        paths: list[str | None] = [None] * len(batch)
        if self.kind == "path":
            paths = batch.column(self.audio).to_pylist()
        elif self.has_path:
            paths = [(value or {}).get("path") for value in _path_structs(batch.column(self.audio))]
        stem = redact_uri(location).removesuffix(PARQUET).removesuffix(".arrow")
        for index, path in enumerate(paths):
            values = {name: column[index] for name, column in columns.items()}
            row, place = first + index, None
            if held[index]:
                name = PurePosixPath(path or "").name or str(row)
                place = AudioPlace(location, name, row=row, column=self.audio)
            elif path:
                values[self.path_field] = path
            yield Record(row + 1, values, place, f"{stem}:{row}")

    def _values(self, batch: pa.RecordBatch, name: str) -> list[Any]:
        values = batch.column(name).to_pylist()
        if labels := self.labels.get(name):
            known = range(len(labels))
            return [labels[value] if isinstance(value, int) and value in known else None for value in values]
        return values


def _kind(kind: pa.DataType) -> Literal["bytes", "struct", "path"] | None:
    if kind in _BINARY:
        return "bytes"
    if kind in _TEXT:
        return "path"
    is_audio = pa.types.is_struct(kind) and any(field.name == "bytes" and field.type in _BINARY for field in kind)
    return "struct" if is_audio else None


def _valid(column: pa.Array) -> list[bool]:
    return column.is_valid().to_pylist()


def _path_structs(column: pa.StructArray) -> list[dict[str, Any] | None]:
    """Return the structs of a column without their bytes."""
    paths = column.field("path").to_pylist()
    return [{"path": path} if valid else None for path, valid in zip(paths, _valid(column), strict=True)]


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of classes that `datasets` writes into a schema; other columns of numbers have none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _group_reader(layout: _Layout, group: int) -> Callable[[pq.ParquetFile], pa.Table]:
    def read(parquet: pq.ParquetFile) -> pa.Table:
        if layout.leaves:
            return parquet.read_row_groups([group], columns=layout.leaves)
        rows = parquet.metadata.row_group(group).num_rows
        return pa.table({"": pa.nulls(rows)})

    return read


def _held_bytes(location: str, metadata: pq.FileMetaData, layout: _Layout, group: int) -> list[bool]:
    """Tell which rows of a row group hold audio bytes: by its statistics, or where these tell of nulls by the bytes."""
    found = metadata.row_group(group)
    rows, leaf = found.num_rows, f"{layout.audio}.bytes" if layout.kind == "struct" else layout.audio
    if layout.kind == "path":
        return [False] * rows
    columns = map(found.column, range(found.num_columns))
    statistics = next((column.statistics for column in columns if column.path_in_schema == leaf), None)
    nulls = statistics.null_count if statistics is not None and statistics.has_null_count else 0
    if nulls in (0, rows):
        return [not nulls] * rows

    def scan() -> list[bool]:
        with open_parquet(location, metadata, is_streamed=True) as parquet:
            batches = parquet.iter_batches(_SCANNED_ROWS, [group], columns=[leaf], use_threads=False)
            return [held for batch in batches for held in layout.held_bytes(batch)]

    return retry_read(location, scan)


@contextlib.contextmanager
def _readable(place: str) -> Iterator[None]:
    """Raise DataError for what pyarrow says of damaged files."""
    try:
        yield
    except DataError as error:
        if str(error).startswith("manifest "):
            raise
        if not isinstance(error.__cause__, pa.ArrowException):
            raise DataError(f"manifest {error}") from error
        text = str(error).partition(": ")[2]
        raise DataError(f"manifest {place}: cannot be read as a table ({text}): fetch or save it again") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"manifest {place}: cannot be read as a table ({text:.200}): fetch or save it again") from error
