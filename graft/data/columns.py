"""Read the columns of a parquet file of speech, whatever their names: ids, texts, durations and audio."""

import hashlib
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
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
from graft.storage.local_paths import utf8_name

_BINARY = (pa.binary(), pa.large_binary())
_STRING = pa.large_string()
_CODE = pa.dictionary(pa.int32(), pa.string())

METADATA = pa.schema(
    [
        ("id", _STRING),
        ("text", _STRING),  # in NFC; "" for null
        ("language", _CODE),  # as it is written; null where it is not known
        ("duration_s", pa.float64()),  # NaN for null
        ("row_group", pa.int32()),
        ("row", pa.int32()),  # within the row group
        ("group_bytes", pa.float32()),  # of the audio of the whole row group, as it is stored
    ]
)
"""Columns of a file's rows without their audio."""


def cached_metadata(folder: Path, key: str, read: Callable[[], pa.Table]) -> pa.Table:
    """Return the METADATA that `read` last returned under this key; a cache file that is not whole is replaced."""
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.arrow"
    try:
        table = feather.read_table(path, memory_map=False)
        if table.schema.equals(METADATA):
            return table
    except (OSError, pa.ArrowInvalid):
        pass
    table = read()
    with atomic_file(path, sync=False) as temporary:
        feather.write_feather(table, temporary, compression="zstd")
    return table


def read_metadata(parquet: pq.ParquetFile, columns: Columns, *, name: str) -> pa.Table:
    """Read a file's METADATA; `name` is what ids and messages call the file.

    Raises DataError for a column that is missing or of another type, and for rows without an id.
    """
    wanted = [columns.id, columns.duration, columns.text, columns.language]
    table = _read_columns(parquet, wanted, name, required=[columns.audio])
    leaves = _audio_leaves(parquet, columns.audio, name)
    count = parquet.metadata.num_rows
    if columns.id is None:
        stem = name.rpartition("/")[2].removesuffix(".parquet")
        ids = pa.array([f"{stem}:{row}" for row in range(count)], _STRING)
    else:
        ids = _utf8_ids(table, columns.id, name)
    if ids.null_count:
        raise DataError(f"corpus {name}: {ids.null_count} of {count} rows have no {columns.id}")
    if columns.duration is None:
        duration_s = _measure_durations(parquet, columns.audio, name)
    else:
        duration_s = _cast(table, columns.duration, name, pa.float64()).fill_null(np.nan)
    texts = pa.nulls(count, _STRING) if columns.text is None else _cast(table, columns.text, name)
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    row_groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # less the rows of earlier row groups
    group_bytes = np.array(_stored_bytes(parquet.metadata, leaves), np.float32)[row_groups]
    texts = pc.utf8_normalize(texts.fill_null(""), "NFC")
    languages = pa.nulls(count, _CODE)
    if columns.language is not None:
        languages = _cast(table, columns.language, name, pa.string()).dictionary_encode()
    numbers = [duration_s, row_groups, rows.astype(np.int32), group_bytes]
    return pa.table([ids, texts, languages, *numbers], schema=METADATA)


def read_texts(parquet: pq.ParquetFile, *, name: str) -> pa.Table:
    """Read the columns ID and text, both large_string, of a file that replaces a corpus's texts; texts are in NFC."""
    table = _read_columns(parquet, ["ID", "text"], name)
    return pa.table({"ID": _cast(table, "ID", name), "text": pc.utf8_normalize(_cast(table, "text", name), "NFC")})


def read_audio_column(parquet: pq.ParquetFile, audio: str, row_groups: Sequence[int]) -> list[pa.Table]:
    """Read the audio files of row groups and their names: for each the columns `content` and, where it is, `name`."""
    leaves = _audio_leaves(parquet, audio, "")
    table = _audio_table(parquet.read_row_groups(list(row_groups), columns=leaves), leaves)
    sizes = [parquet.metadata.row_group(group).num_rows for group in row_groups]
    ends = itertools.accumulate(sizes)
    return [table.slice(end - size, size) for end, size in zip(ends, sizes, strict=True)]


def iter_audio_column(parquet: pq.ParquetFile, audio: str, row_group: int, rows: int) -> Iterator[pa.Table]:
    """Read a row group's audio files and their names, a few `rows` at a time, in the caller's thread."""
    leaves = _audio_leaves(parquet, audio, "")
    for batch in parquet.iter_batches(rows, [row_group], columns=leaves, use_threads=False):
        yield _audio_table(pa.Table.from_batches([batch]), leaves)


def _stored_bytes(metadata: pq.FileMetaData, leaves: Sequence[str]) -> list[int]:
    """Add up the stored bytes of these columns in each row group."""
    if not metadata.num_row_groups:
        return []
    first = metadata.row_group(0)
    columns = [index for index in range(first.num_columns) if first.column(index).path_in_schema in leaves]
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [sum(group.column(index).total_compressed_size for index in columns) for group in groups]


def _read_columns(
    parquet: pq.ParquetFile, columns: Sequence[str | None], name: str, *, required: Sequence[str] = ()
) -> pa.Table:
    """Read the columns that are not None.

    Raises DataError unless they and the `required` ones, which are not read, exist.
    """
    wanted = [column for column in columns if column is not None]
    missing = [column for column in [*wanted, *required] if _type_of(parquet.schema_arrow, column) is None]
    if missing:
        found = ", ".join(parquet.schema_arrow.names)
        raise DataError(
            f"corpus {name}: lacks {', '.join(missing)}, has {found}: say under `columns` what they are called"
        )
    return parquet.read_row_groups(list(range(parquet.num_row_groups)), columns=wanted)


def _cast(table: pa.Table, column: str, name: str, kind: pa.DataType = _STRING) -> pa.ChunkedArray:
    try:
        return _pick(table, column).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"corpus {name}: column {column}: {' '.join(str(error).split())}") from error


def _utf8_ids(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    """Read ids as strings; one that is not UTF-8 is percent-encoded, as names of files are."""
    ids = _pick(table, column)
    if ids.type in (pa.string(), *_BINARY, _STRING):
        data = ids.cast(pa.large_binary())
        try:
            data.cast(_STRING).validate(full=True)
        except pa.ArrowInvalid:
            names = (None if one is None else utf8_name(os.fsdecode(one)) for one in data.to_pylist())
            return pa.chunked_array([pa.array(names, _STRING)])
    return _cast(table, column, name)


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Return the type of a column, or of the part of a struct that a dotted name reaches; None where there is none."""
    name, *inner = [column] if column in schema.names else column.split(".")
    found: Any = schema.field(name).type if name in schema.names else None
    for part in inner:
        found = _struct_fields(found).get(part)
    return found


def _struct_fields(kind: pa.DataType | None) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in kind} if kind is not None and pa.types.is_struct(kind) else {}


def _pick(table: pa.Table, column: str) -> pa.ChunkedArray:
    name, *inner = [column] if column in table.column_names else column.split(".")
    return pc.struct_field(table[name], inner) if inner else table[name]


def _audio_leaves(parquet: pq.ParquetFile, audio: str, name: str) -> list[str]:
    """Name the columns to read for the audio: its bytes and, after them, its path where there is one."""
    kind = _type_of(parquet.schema_arrow, audio)
    if kind in _BINARY:
        return [audio]
    fields = _struct_fields(kind)
    if fields.get("bytes") not in _BINARY:
        raise DataError(f"corpus {name}: column {audio} is {kind}, wants binary or struct<bytes: binary, path: string>")
    return [f"{audio}.bytes", *([f"{audio}.path"] if "path" in fields else [])]


def _audio_table(table: pa.Table, leaves: Sequence[str]) -> pa.Table:
    return pa.table(dict(zip(("content", "name"), (_pick(table, leaf) for leaf in leaves), strict=False)))


def _measure_durations(parquet: pq.ParquetFile, audio: str, name: str) -> np.ndarray:
    """Read the seconds of each row's audio from its header, NaN where it has none."""
    logging.getLogger(__name__).warning(
        "corpus %s: no duration column is named: reading all of its audio to measure it", name
    )
    groups = (read_audio_column(parquet, audio, [group])[0] for group in range(parquet.num_row_groups))
    contents = (content for group in groups for content in group["content"])
    return np.array([_header_duration(content.as_py()) for content in contents], np.float64)


def _header_duration(content: bytes | None) -> float:
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(content or b"")).duration)
    except soundfile.LibsndfileError:
        return float("nan")
