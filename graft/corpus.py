"""Speech corpora in SpeechBrain's LargeScaleASR schema: parquet files of whole, undecoded audio files with their transcripts.

Planning reads the metadata columns of all files (RowTable); training and evaluation fetch the audio of single rows (RowReader).
Source: https://huggingface.co/datasets/speechbrain/LoquaciousSet
"""

import functools
import itertools
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from graft.errors import DataError

SCHEMA = pa.schema(
    [
        ("ID", pa.string()),
        ("duration", pa.float32()),  # seconds
        ("wav", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("spk_id", pa.string()),
        ("sex", pa.string()),
        ("text", pa.string()),
    ]
)
METADATA_COLUMNS = ["ID", "duration", "text"]
_GLOB = "*["  # "?" begins a URI's options


@dataclass(frozen=True)
class RowTable:
    """Every row of a corpus without its audio: columns of equal length (rows,), in the order of the files."""

    ids: list[str]
    duration_s: np.ndarray  # float64
    texts: list[str]  # "" where the corpus has none
    file: np.ndarray  # int32, index into uris
    row_group: np.ndarray  # int32, within the file
    row: np.ndarray  # int32, within the row group
    uris: list[str]

    def __len__(self) -> int:
        return len(self.ids)


def read_rows(uris: str | Sequence[str]) -> RowTable:
    """Read the metadata columns of a corpus: parquet files, folders of them (not their subfolders) or globs, local or by URI.

    Files are sorted by URI, each taken once. Raises DataError when nothing is found, a file is not parquet or lacks a column, all files are
    empty, or a row has no ID or no positive duration.
    """
    files = _list_files([uris] if isinstance(uris, str) else uris)
    with ThreadPoolExecutor(max_workers=16) as pool:
        tables = list(pool.map(_read_metadata, files))
    sizes = [sizes for _, sizes in tables]
    if not any(map(sum, sizes)):
        raise DataError(f"corpus {uris}: no rows in {len(files)} files")
    groups = [(file, group, size) for file, group_sizes in enumerate(sizes) for group, size in enumerate(group_sizes)]
    repeats = [size for _, _, size in groups]
    return RowTable(
        ids=[value for table, _ in tables for value in table["ID"].to_pylist()],
        duration_s=np.concatenate([table["duration"].to_numpy() for table, _ in tables]).astype(np.float64),
        texts=[value or "" for table, _ in tables for value in table["text"].to_pylist()],
        file=np.repeat([file for file, _, _ in groups], repeats).astype(np.int32),
        row_group=np.repeat([group for _, group, _ in groups], repeats).astype(np.int32),
        row=np.concatenate([np.arange(size, dtype=np.int32) for size in repeats]),
        uris=files,
    )


class RowReader:
    """Fetches the audio of single rows by RowTable's (file, row_group, row); keeps the row groups read last. One for each process."""

    def __init__(self, uris: Sequence[str], cache_row_groups: int = 4) -> None:
        self.uris = list(uris)
        self._wav_column = functools.lru_cache(maxsize=cache_row_groups)(self._read_wav_column)

    def wav(self, file: int, row_group: int, row: int) -> tuple[bytes, str]:
        """The audio file's bytes and its name. Raises DataError when the file is gone or the row holds no audio."""
        value = self._wav_column(int(file), int(row_group))[int(row)].as_py()
        if value is None or value["bytes"] is None:
            raise DataError(f"corpus {self.uris[file]}: row {row} of row group {row_group} holds no audio bytes")
        return value["bytes"], value["path"] or ""

    def _read_wav_column(self, file: int, row_group: int) -> pa.ChunkedArray:
        with _open_parquet(self.uris[file]) as parquet:
            return parquet.read_row_group(row_group, columns=["wav"])["wav"]


def write_corpus(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], *, rows_per_group: int = 100) -> int:
    """Write rows (dicts with exactly SCHEMA's keys) as one local parquet file, whole or not at all; returns how many.

    Same rows, same bytes. Raises DataError for no rows, other keys or values of another type.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    count, waiting = 0, iter(rows)
    try:
        # Audio is compressed already and never repeats: no dictionary for it.
        with pq.ParquetWriter(temporary, SCHEMA, use_dictionary=["spk_id", "sex"], write_statistics=["duration"]) as writer:
            while group := list(itertools.islice(waiting, rows_per_group)):
                writer.write_table(_group_table(group), row_group_size=rows_per_group)
                count += len(group)
        if not count:
            raise DataError(f"corpus {path}: no rows to write")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _group_table(group: list[Mapping[str, Any]]) -> pa.Table:
    for row in group:
        if row.keys() != set(SCHEMA.names):
            raise DataError(f"corpus row {row.get('ID')!r} has keys {sorted(row)}, wants {sorted(SCHEMA.names)}")
    try:
        return pa.Table.from_pylist(group, schema=SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"corpus rows {group[0]['ID']!r} to {group[-1]['ID']!r}: {error}") from error


def _list_files(uris: Sequence[str]) -> list[str]:
    found = sorted({file for uri in uris for file in _expand(uri)})
    if not found:
        raise DataError(f"corpus {', '.join(uris) or '(none)'}: no *.parquet file found there")
    return found


def _expand(uri: str) -> list[str]:
    """The files that a file, folder or glob stands for, as URIs or absolute local paths (Ray's workers have other working folders)."""
    uri = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
    base, options = (uri, "") if "://" not in uri else (uri.partition("?")[0], "".join(uri.partition("?")[1:]))
    base, pattern = base.rstrip("/"), "*.parquet"
    if any(character in base for character in _GLOB) and not os.path.exists(base):
        parts = base.split("/")
        first = next(index for index, part in enumerate(parts) if any(character in part for character in _GLOB))
        base, pattern = "/".join(parts[:first]), "/".join(parts[first:])
    filesystem, root = _filesystem(base + options)
    try:
        kind = filesystem.get_file_info(root).type
        if kind == pafs.FileType.File:
            return [base + options]
        if kind == pafs.FileType.NotFound:
            raise DataError(f"corpus {uri}: no such file or folder")
        inside = filesystem.get_file_info(pafs.FileSelector(root, recursive="/" in pattern))
    except OSError as error:
        raise DataError(f"corpus {uri}: {_one_line(error)}") from error
    names = [info.path[len(root) :].lstrip("/") for info in inside if info.type == pafs.FileType.File]
    chosen = [name for name in names if _matches(name, pattern) and not PurePosixPath(name).name.startswith((".", "_"))]
    return [f"{base}/{quote(name) if '://' in base else name}{options}" for name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri or "/"
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError, ImportError, ValueError) as error:
        raise DataError(f"corpus {uri}: not a location pyarrow can read: {_one_line(error)}") from error


def _open_parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = _filesystem(uri)
    try:
        return pq.ParquetFile(path, filesystem=filesystem)
    except FileNotFoundError as error:
        raise DataError(f"corpus {uri}: no such file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"corpus {uri}: not a parquet file: {_one_line(error)}") from error


def _read_metadata(uri: str) -> tuple[pa.Table, list[int]]:
    """The metadata columns of one file and the rows of each of its row groups."""
    with _open_parquet(uri) as parquet:
        schema = parquet.schema_arrow
        missing = [name for name in [*METADATA_COLUMNS, "wav"] if name not in schema.names]
        if missing:
            raise DataError(f"corpus {uri}: lacks {', '.join(missing)}; wants the columns {', '.join(SCHEMA.names)}")
        wav = schema.field("wav").type
        if not pa.types.is_struct(wav) or {"bytes", "path"} - {field.name for field in wav}:
            raise DataError(f"corpus {uri}: column wav is {wav}, wants struct<bytes: binary, path: string>")
        try:
            table = parquet.read(columns=METADATA_COLUMNS)
            table = table.cast(pa.schema([SCHEMA.field(name) for name in table.column_names]))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError(f"corpus {uri}: {_one_line(error)}") from error
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    if table["ID"].null_count:
        raise DataError(f"corpus {uri}: {table['ID'].null_count} of {len(table)} rows have no ID")
    wrong = np.flatnonzero(~(table["duration"].to_numpy() > 0))  # NaN and null too
    if len(wrong):
        first = table["ID"][int(wrong[0])]
        raise DataError(f"corpus {uri}: {len(wrong)} rows without a positive duration, the first is {first}")
    return table, sizes


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
