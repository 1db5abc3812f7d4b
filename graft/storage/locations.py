"""Where corpora lie: local folders, the Hugging Face hub (hf://), S3 (s3://) and single files of web servers (http://, https://).

A file, folder or glob -> the URIs of its parquet files -> open parquet files, read by ranges. A place over the network is asked again when
it fails for a moment; a lasting fault is a DataError of one line, in which a URI stands without its user, secret and query.
"""

import contextlib
import functools
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.utils import glob_translate, merge_offset_ranges

from graft.errors import DataError, require

_PINNED = re.compile("@[0-9a-f]{40}/")
_HIDDEN = re.compile(r"(?:^|/)\.")
_GAP_BYTES = 8_192  # what is fetched for nothing rather than asked for twice, as Arrow does


def list_parquet_files(places: Sequence[str]) -> list[str]:
    """The parquet files of files, folders (not their subfolders) and globs: sorted URIs or absolute local paths, each once.

    Raises DataError when a place is missing, or none of them holds a parquet file.
    """
    placed = (file for place in places for file in find_files(place, "*.parquet"))
    found = sorted({file.uri for file in placed if not PurePosixPath(file.name).name.startswith("_")})
    if not found:
        where = ", ".join(map(redact_uri, places)) or "(none)"
        raise DataError(
            f"corpus {where}: no *.parquet file found there (FOLDER/*/*.parquet takes those in its subfolders)"
        )
    return found


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a place holds."""

    uri: str
    """Or its absolute local path."""
    name: str
    """Its path below the place, or below a glob's fixed part."""
    size: int | None
    """In bytes, where that is told."""
    version: str
    """What changes when the file does: its size and time, or the commit in its URI; "" where none is told."""


def find_files(place: str, pattern: str = "**") -> list[StoredFile]:
    """Find a file, the files of a folder that match a pattern (`**` reaches into subfolders), or those of a glob, in no order.

    Hidden ones (.name) are left out, unless named themselves. Raises DataError when the place is missing.
    """
    return retry_read(place, functools.partial(_expand, place, pattern))


@contextlib.contextmanager
def open_parquet(uri: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Open one file of `list_parquet_files`; with its metadata, its footer is not fetched again. Use it inside `again`."""
    with open_file(uri) as file:
        kept = (
            _OneThreadParquet(file, metadata)
            if isinstance(file, _Ranges)
            else pq.ParquetFile(file, metadata=metadata, pre_buffer=True)
        )
        with kept as parquet:
            yield parquet


def open_file(uri: str) -> Any:
    """Open any file to read ranges of it. Use it inside `again`."""
    if uri.startswith(("http://", "https://")):
        require("aiohttp", extra="jobs")
    if uri.startswith(("hf://", "http://", "https://")):
        filesystem, path = fsspec.url_to_fs(uri)
        return _Ranges(
            filesystem.open(path, "rb", cache_type="none")
        )  # by default it reads 5 MB ahead, for a footer of 10 kB
    filesystem, path = _connect(uri)
    return filesystem.open_input_file(path)


def file_version(uri: str) -> str | None:
    """What changes when the file does: the commit that its URI holds, or its size and time; None where neither is to be had."""
    if uri.startswith("hf://"):
        return uri if _PINNED.search(uri) else None
    if uri.startswith(("http://", "https://")):
        return None
    filesystem, path = _connect(uri)
    info = filesystem.get_file_info(path)
    return f"{uri} {info.size} {info.mtime_ns}" if info.mtime_ns else None


def _expand(place: str, pattern: str) -> list[StoredFile]:
    """The files that a file, folder or glob stands for, as URIs or absolute local paths (Ray's workers have other working folders)."""
    if place.startswith(("http://", "https://")):
        return [StoredFile(place, PurePosixPath(urlsplit(place).path).name, None, "")]
    place = _pinned(place) if "://" in place else os.path.abspath(os.path.expanduser(place))
    plain = "://" not in place or place.startswith(
        "hf://"
    )  # in other URIs names are quoted, and "?" begins the options
    base, options = (place, "") if plain else (place.partition("?")[0], "".join(place.partition("?")[1:]))
    base = base.rstrip("/")
    signs = "*[?" if plain else "*["
    if any(sign in base for sign in signs) and not os.path.exists(base):
        parts = base.split("/")
        first = next(index for index, part in enumerate(parts) if any(sign in part for sign in signs))
        base, pattern = "/".join(parts[:first]), "/".join(parts[first:])
    filesystem, root = _connect(base + options)
    found = filesystem.get_file_info(root)
    if found.type == pafs.FileType.File:
        return [_placed(base + options, PurePosixPath(base).name, found)]
    if found.type == pafs.FileType.NotFound:
        raise FileNotFoundError(base)
    is_deep = "/" in pattern or "**" in pattern
    if is_deep and isinstance(filesystem, pafs.LocalFileSystem):
        inside = _below(filesystem, root)
    else:
        inside = iter(filesystem.get_file_info(pafs.FileSelector(root, recursive=is_deep)))
    matches = re.compile(glob_translate(pattern)).match
    names = ((info.path[len(root) :].lstrip("/"), info) for info in inside if info.type == pafs.FileType.File)
    chosen = ((name, info) for name, info in names if matches(name) and not _HIDDEN.search(name))
    return [_placed(f"{base}/{name if plain else quote(name)}{options}", name, info) for name, info in chosen]


def _below(filesystem: pafs.LocalFileSystem, root: str) -> Iterator[pafs.FileInfo]:
    """What a local folder and those below it hold, but what is hidden. Links are followed, but not round in circles, as Arrow does."""
    waiting: list[tuple[str, tuple[str, ...]]] = [(root, ())]  # folders, and those from which links have led there
    while waiting:
        folder, trail = waiting.pop()
        for info in filesystem.get_file_info(pafs.FileSelector(folder)):
            if info.base_name.startswith("."):
                continue
            yield info
            if info.type == pafs.FileType.Directory:
                passed = (*trail, os.path.realpath(folder)) if os.path.islink(info.path) else trail
                if passed is trail or not _holds_any(os.path.realpath(info.path), passed):
                    waiting.append((info.path, passed))


def _holds_any(folder: str, others: Sequence[str]) -> bool:
    """Whether a folder is one of others, or above one."""
    return any(os.path.commonpath([folder, other]) == folder for other in others)


def _placed(uri: str, name: str, info: pafs.FileInfo) -> StoredFile:
    pinned = uri.startswith("hf://") and _PINNED.search(uri)
    version = uri if pinned else f"{info.size} {info.mtime_ns}" if info.mtime_ns else ""
    return StoredFile(uri, name, info.size, version)


def _pinned(uri: str) -> str:
    """A place on the hub at the commit that its branch or tag stands for now: workers must read what was planned."""
    if not uri.startswith("hf://"):
        return uri
    from huggingface_hub import HfApi

    try:
        place = fsspec.filesystem("hf").resolve_path(uri)
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"{uri}: wants hf://datasets/OWNER/NAME@REVISION/FOLDER: {one_line_error(error)}") from error
    if not getattr(place, "revision", None):
        return uri  # a bucket
    commit = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    return "hf://" + type(place)(place.repo_type, place.repo_id, commit, place.path_in_repo).unresolve()


def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri or "/"
    try:
        if uri.startswith("s3://"):
            parts = urlsplit(uri)
            if ":" in parts.netloc and "@" not in parts.netloc:
                raise ValueError("its user or secret holds a / or ?: write %2F, %3F")
            return _bucket(parts._replace(path="").geturl()), parts.netloc.rpartition("@")[2] + unquote(parts.path)
        if uri.startswith("hf://"):
            filesystem, path = fsspec.url_to_fs(uri)
            return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError, ImportError, ValueError) as error:
        raise DataError(f"{redact_uri(uri)}: not a location pyarrow can read: {one_line_error(error)}") from error


@functools.lru_cache(maxsize=16)
def _bucket(uri: str) -> pafs.FileSystem:
    """One client for each bucket: a new one asks for the bucket's region and opens new connections."""
    return pafs.FileSystem.from_uri(uri)[0]


class _Ranges(io.RawIOBase):
    """An fsspec file whose reads are whole: fewer bytes than the file must hold are a fault."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self._fetched: list[tuple[int, bytes]] = []  # where in the file, and what stands there

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch byte ranges (start, end) ahead, near ones together, for the reads that follow; those of the last call are forgotten."""
        self._fetched = []
        starts, ends = map(list, zip(*ranges, strict=True)) if ranges else ([], [])
        merged = merge_offset_ranges([""] * len(starts), starts, ends, max_gap=_GAP_BYTES)
        self._fetched = [(start, self._whole(start, end - start)) for _, start, end in zip(*merged, strict=True)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        position = self.file.tell()
        left = self.file.size - position
        wanted = left if size < 0 else min(size, left)
        for start, data in self._fetched:
            if start <= position and position + wanted <= start + len(data):
                self.file.seek(position + wanted)
                return data[position - start : position - start + wanted]
        return self._whole(position, wanted)

    def _whole(self, start: int, size: int) -> bytes:
        self.file.seek(start)
        data = self.file.read(size) if size else b""
        if len(data) != size:
            raise ConnectionError(f"got {len(data)} of {size} bytes")
        return data


class _OneThreadParquet(pq.ParquetFile):
    """A parquet file behind a Python object, read in the caller's thread alone.

    Arrow's threads would drop the object when they come to it; at the interpreter's end that aborts the process (apache/arrow#34314).
    """

    def __init__(self, file: _Ranges, metadata: pq.FileMetaData | None) -> None:
        super().__init__(file, metadata=metadata, pre_buffer=False)
        self._file = file

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self._of(list(range(self.num_row_groups)), columns)

    def read_row_group(self, i: int, columns: Sequence[str]) -> pa.Table:
        return self._of([i], columns)

    def _of(self, row_groups: list[int], columns: Sequence[str]) -> pa.Table:
        groups = (self.metadata.row_group(group) for group in row_groups)
        chunks = (group.column(column) for group in groups for column in range(group.num_columns))
        self._file.fetch(
            [
                _extent(chunk)
                for chunk in chunks
                if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns)
            ]
        )
        return self.read_row_groups(row_groups, columns=list(columns), use_threads=False)


def _extent(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Where in its file a column chunk lies."""
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    return start, start + chunk.total_compressed_size


T = TypeVar("T")

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Before each further try; the hub's client and S3's own have tried several times by then."""

_HTTP_CLIENTS = {"httpx", "httpx2", "aiohttp", "requests"}
_LASTING = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH|INVALID|RESOURCE_NOT_FOUND|SIGNATURE|UNRECOGNIZED|MISSING|.*HTTP status 4\d\d)"
)


def retry_read(uri: str, action: Callable[[], T]) -> T:
    """Do what reads from a place, over again after faults that may pass. Raises DataError for one that lasts."""
    waits_s = iter(RETRY_WAITS_S)
    while True:
        try:
            return action()
        except Exception as error:
            fault, wait_s = _fault(error), next(waits_s, None)
            if fault is None:
                raise
            if isinstance(fault, FileNotFoundError):
                hint = " (a private or gated one wants HF_TOKEN)" if uri.startswith("hf://") else ""
                raise DataError(f"{redact_uri(uri)}: no such file or folder{hint}") from error
            if wait_s is None or not _may_pass(uri, fault):
                raise DataError(f"{redact_uri(uri)}: {one_line_error(fault)}") from error
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # not all workers at once


def redact_uri(uri: str) -> str:
    """A URI as messages may show it: without user, secret and query."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "hf":  # whose @ stands before a revision
        return uri
    return f"{scheme}://{rest.rpartition('@')[2]}".partition("?")[0]


def one_line_error(error: BaseException) -> str:
    """What happened, in one line, without the secrets of the URIs in it."""
    text = re.sub(r"\b(?!hf:|https?:)(\w+://)[^'\"]*@", r"\1", str(error))
    text = re.sub(r"(https?://)[^/\s'\"]*@", r"\1", text)
    return " ".join(re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text).split()) or type(error).__name__


def _fault(error: BaseException | None) -> BaseException | None:
    """What is wrong with the place, None where it is a fault of the program."""
    if isinstance(error, FileNotFoundError) and _status(error.__cause__) not in (401, 404, 410):
        return _fault(error.__cause__) or error  # fsspec calls a file "not found" where a web server does not answer
    known = isinstance(error, OSError | pa.ArrowException) or type(error).__module__.partition(".")[0] in _HTTP_CLIENTS
    return error if known else None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that a client's error carries."""
    found = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return found if isinstance(found, int) else None


def _may_pass(uri: str, error: BaseException) -> bool:
    near = "://" not in uri or uri.startswith("file:")
    if near or isinstance(error, PermissionError | pa.ArrowException) or _LASTING.search(str(error)):
        return False
    status = _status(error)
    return type(error).__name__ != "OfflineModeIsEnabled" and (status is None or status in (408, 429) or status >= 500)
