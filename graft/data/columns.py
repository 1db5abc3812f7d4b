"""The columns of one parquet file of speech: whatever they are called there -> ids, texts, durations, and a row group's audio."""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import feather

from graft.data.settings import Columns
from graft.errors import DataError
from graft.storage.atomic import atomic_file

_BINARY = (pa.binary(), pa.large_binary())


@dataclass(frozen=True, eq=False)
class Metadata:
    """The rows of one file without their audio, and how many each row group holds."""

    ids: pa.ChunkedArray  # large_string
    texts: pa.ChunkedArray  # large_string, "" for null
    duration_s: np.ndarray  # float64, NaN for null
    group_sizes: list[int]


def read_metadata(parquet: pq.ParquetFile, columns: Columns, *, name: str) -> Metadata:
    """Read a file's metadata columns; `name` is what ids and messages call it.

    Raises DataError for a column that is missing or of another type, and for rows without an id.
    """
    table = _read_columns(parquet, [columns.id, columns.duration, columns.text], name, also=[columns.audio])
    _audio_leaves(parquet, columns.audio, name)
    ids = _numbered(len(table), name) if columns.id is None else _strings(table, columns.id, name)
    if ids.null_count:
        raise DataError(f"corpus {name}: {ids.null_count} of {len(table)} rows have no {columns.id}")
    if columns.duration is None:
        duration_s = _measured_s(parquet, columns.audio, name)
    else:
        duration_s = _cast(table, columns.duration, pa.float64(), name).fill_null(np.nan).to_numpy()
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    texts = (
        _strings(table, columns.text, name)
        if columns.text
        else pa.chunked_array([pa.nulls(len(ids), pa.large_string())])
    )
    return Metadata(ids, texts.fill_null(""), duration_s, sizes)


def read_texts(parquet: pq.ParquetFile, *, name: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Read the IDs and texts of a file that replaces a corpus's texts."""
    table = _read_columns(parquet, ["ID", "text"], name)
    return _strings(table, "ID", name), _strings(table, "text", name)


def read_audio_column(
    parquet: pq.ParquetFile, audio: str, row_group: int
) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """A row group's audio files and, where the file has them, their names."""
    leaves = _audio_leaves(parquet, audio, "")
    table = parquet.read_row_group(row_group, columns=leaves)
    contents, *names = [_pick(table, leaf) for leaf in leaves]
    return contents, names[0] if names else None


def _read_columns(
    parquet: pq.ParquetFile, columns: Sequence[str | None], name: str, *, also: Sequence[str] = ()
) -> pa.Table:
    """Those of the columns that have a name; it and `also` must be there."""
    wanted = [column for column in columns if column is not None]
    missing = [column for column in [*wanted, *also] if _type_of(parquet.schema_arrow, column) is None]
    if missing:
        found = ", ".join(parquet.schema_arrow.names)
        raise DataError(
            f"corpus {name}: lacks {', '.join(missing)}, has {found}: say under `columns` what they are called"
        )
    return parquet.read(columns=wanted)


def _strings(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    return _cast(table, column, pa.large_string(), name)


def _cast(table: pa.Table, column: str, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    try:
        return _pick(table, column).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"corpus {name}: column {column}: {' '.join(str(error).split())}") from error


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column, or of the part of a struct that a dotted name reaches."""
    name, *inner = [column] if column in schema.names else column.split(".")
    found: Any = schema.field(name).type if name in schema.names else None
    for part in inner:
        fields = {field.name: field.type for field in found} if pa.types.is_struct(found or pa.null()) else {}
        found = fields.get(part)
    return found


def _pick(table: pa.Table, column: str) -> pa.ChunkedArray:
    name, *inner = [column] if column in table.column_names else column.split(".")
    return pc.struct_field(table[name], inner) if inner else table[name]


def _audio_leaves(parquet: pq.ParquetFile, audio: str, name: str) -> list[str]:
    """The columns to read for the audio: its bytes and, after them, its path."""
    kind = _type_of(parquet.schema_arrow, audio) or pa.null()
    if kind in _BINARY:
        return [audio]
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if fields.get("bytes", pa.null()) not in _BINARY:
        raise DataError(f"corpus {name}: column {audio} is {kind}, wants binary or struct<bytes: binary, path: string>")
    return [f"{audio}.bytes", *([f"{audio}.path"] if "path" in fields else [])]


def _numbered(count: int, name: str) -> pa.ChunkedArray:
    stem = name.rpartition("/")[2].removesuffix(".parquet")
    numbers = pc.cast(pa.array(np.arange(count)), pa.large_string())
    return pa.chunked_array(
        [pc.binary_join_element_wise(pa.scalar(stem, pa.large_string()), numbers, pa.scalar(":", pa.large_string()))]
    )


def _measured_s(parquet: pq.ParquetFile, audio: str, name: str) -> np.ndarray:
    """Seconds of each row's audio by its header, NaN where it has none."""
    logging.getLogger(__name__).warning(
        "corpus %s: no duration column is named: reading all of its audio to measure it", name
    )
    groups = (read_audio_column(parquet, audio, group)[0] for group in range(parquet.num_row_groups))
    return np.array([_header_s(content.as_py()) for contents in groups for content in contents], np.float64)


def _header_s(content: bytes | None) -> float:
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(content or b"")).duration)
    except soundfile.LibsndfileError:
        return float("nan")


_GROUP_SIZES = b"group_sizes"


def cached_metadata(folder: Path, key: str, read: Callable[[], Metadata]) -> Metadata:
    """What `read` returned when it was last asked under this key; a file that is not whole counts as none."""
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.arrow"
    try:
        table = feather.read_table(path, memory_map=False)
        sizes = json.loads(table.schema.metadata[_GROUP_SIZES])
        return Metadata(table["ids"], table["texts"], table["duration_s"].to_numpy(), sizes)
    except (OSError, pa.ArrowInvalid):
        metadata = read()
    columns = {"ids": metadata.ids, "texts": metadata.texts, "duration_s": pa.array(metadata.duration_s)}
    table = pa.table(columns).replace_schema_metadata({_GROUP_SIZES: json.dumps(metadata.group_sizes)})
    with atomic_file(path, sync=False) as temporary:
        feather.write_feather(table, temporary, compression="zstd")
    return metadata
