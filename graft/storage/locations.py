"""Find and read files in local folders, on the Hugging Face hub, in S3 and on web servers (hf://, s3://, http(s)://).

    file, folder or glob -> URIs of its files -> open files, read by byte ranges

Reads over a network are retried when they fail in a way that may pass. A fault that lasts is a DataError of one line,
in which URIs stand without user, secret and query.
"""

import contextlib
import functools
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.caching import BaseCache
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import glob_translate, merge_offset_ranges

from graft.errors import DataError, UnreachableError, require

from .local_paths import is_utf8, local_path, utf8_location, utf8_name

T = TypeVar("T")

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds to wait before each retry. The clients of the hub and of S3 have retried several times themselves by then."""

STREAM_BUFFER_BYTES = 4 * 2**20
"""Bytes of a column that are fetched at a time from a file that is streamed."""

_from_uri = functools.lru_cache(maxsize=16)(pafs.FileSystem.from_uri)
"""Makes one client for each bucket: every new one asks for the bucket's region and opens new connections."""

_PINNED = re.compile("@[0-9a-f]{40}/")
_HIDDEN = re.compile(r"(?:^|/)\.")
_MERGED_GAP_BYTES = 8_192  # Ranges closer than this are fetched in one request, as Arrow does.
_HTTP_CLIENTS = {"httpx", "httpx2", "aiohttp", "requests"}
_LASTING_S3_ERROR = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH|INVALID|RESOURCE_NOT_FOUND|SIGNATURE|UNRECOGNIZED|MISSING|.*HTTP status 4\d\d)"
)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file at a location."""

    uri: str
    """The URI of the file, or its absolute local path."""
    name: str
    """The path of the file below the location, or below the fixed part of a glob."""
    size: int | None
    """Size in bytes; None where the server does not state it."""
    version: str
    """A text that changes when the file does: size and time of change, or the commit in the URI; "" where neither is
    known."""


def list_parquet_files(locations: Sequence[str]) -> list[StoredFile]:
    """List the parquet files of files, folders and globs, each once, in the order of their URIs.

    Subfolders of a folder are not searched. Raises DataError when a location is missing, or none of them holds a
    parquet file.
    """
    stored = (file for location in locations for file in find_files(location, "*.parquet"))
    found = {file.uri: file for file in stored if not PurePosixPath(file.name).name.startswith("_")}
    if not found:
        where = ", ".join(map(redact_uri, locations)) or "(none)"
        raise DataError(
            f"corpus {where}: no *.parquet file found there (FOLDER/*/*.parquet takes those in its subfolders)"
        )
    return [found[uri] for uri in sorted(found)]


def find_files(location: str, pattern: str = "**") -> list[StoredFile]:
    """Find a file, the files of a folder that match a pattern, or those of a glob, in no order.

    `**` in the pattern reaches into subfolders. Hidden files (.name) are left out, unless they are named themselves.
    Raises DataError when the location is missing.
    """
    return retry_read(location, functools.partial(_expand, location, pattern))


def pin_revision(uri: str) -> str:
    """Return an hf:// URI with the present commit in the place of its branch or tag, and any other location as it is.

    Raises DataError when it is missing, or the hub does not answer.
    """
    return retry_read(uri, functools.partial(_pin_revision, uri)) if uri.startswith("hf://") else uri


@contextlib.contextmanager
def open_parquet(
    uri: str, metadata: pq.FileMetaData | None = None, *, is_streamed: bool = False
) -> Iterator[pq.ParquetFile]:
    """Open a parquet file; with its metadata given, its footer is not fetched again. Use it inside `retry_read`.

    Read it by `read_row_groups`, or where it `is_streamed` by `iter_batches`, which then holds STREAM_BUFFER_BYTES of
    each column, and a page, instead of a whole row group.
    """
    with open_file(uri) as file:
        if is_streamed:
            opened = pq.ParquetFile(file, metadata=metadata, pre_buffer=False, buffer_size=STREAM_BUFFER_BYTES)
        elif isinstance(file, AbstractBufferedFile):
            opened = _SingleThreadParquet(file, metadata)
        else:
            opened = pq.ParquetFile(file, metadata=metadata, pre_buffer=True)
        with opened as parquet:
            yield parquet


def open_file(uri: str) -> Any:
    """Open any file to read ranges of it. Use it inside `retry_read`."""
    if uri.startswith(("http://", "https://")):
        require("aiohttp", extra="jobs")
    if uri.startswith(("hf://", "http://", "https://")):
        filesystem, path = fsspec.url_to_fs(uri)
        file = filesystem.open(path, "rb", cache_type="none")
        file.cache = _ExactCache(file.blocksize, file._fetch_range, file.size)  # The default reads 5 MB ahead.
        return file
    path = local_path(uri)
    if path is not None:
        return pafs.LocalFileSystem().open_input_file(os.fsencode(path))
    filesystem, path = _connect(uri)
    return filesystem.open_input_file(path)


def retry_read(uri: str, action: Callable[[], T]) -> T:
    """Call an action that reads from a URI, and call it again after faults that may pass.

    Raises DataError for a fault that lasts, its subclass UnreachableError for one that may still pass.
    """
    waits_s = iter(RETRY_WAITS_S)
    while True:
        try:
            return action()
        except Exception as error:
            fault, wait_s = _storage_fault(error), next(waits_s, None)
            if fault is None:
                raise
            if isinstance(fault, FileNotFoundError):
                hint = " (a private or gated one wants HF_TOKEN)" if uri.startswith("hf://") else ""
                raise DataError(f"{redact_uri(uri)}: no such file or folder{hint}") from error
            if wait_s is None or not _may_pass(uri, fault):
                kind = UnreachableError if _may_pass(uri, fault) else DataError
                raise kind(f"{redact_uri(uri)}: {one_line_error(fault)}") from error
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # The jitter keeps workers from retrying all at once.


def is_unreachable(error: BaseException | None) -> bool:
    """Tell whether an error comes from an UnreachableError."""
    while error is not None and not isinstance(error, UnreachableError):
        error = error.__cause__
    return error is not None


def redact_uri(uri: str) -> str:
    """Remove user, secret and query from a URI, so that messages may show it."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "hf":  # An @ in hf:// URIs stands before a revision.
        return uri
    return f"{scheme}://{rest.rpartition('@')[2]}".partition("?")[0]


def one_line_error(error: BaseException) -> str:
    """Describe an error in one line, with the secrets of the URIs in it removed."""
    text = re.sub(r"\b(?!hf:|https?:)(\w+://)[^'\"]*@", r"\1", str(error))
    text = re.sub(r"(https?://)[^/\s'\"]*@", r"\1", text)
    return " ".join(re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text).split()) or type(error).__name__


# Locations


def _expand(location: str, pattern: str) -> list[StoredFile]:
    """List the files of a location; local paths become absolute, as Ray's workers have other working folders."""
    if location.startswith(("http://", "https://")):
        return [StoredFile(location, PurePosixPath(urlsplit(location).path).name, None, "")]
    path = local_path(location)
    if path is not None:
        return _expand_local(os.path.abspath(os.path.expanduser(path)), pattern)
    location = _pin_revision(location)
    # In URIs other than hf:// names are quoted, and "?" begins the options.
    is_plain = location.startswith("hf://")
    base, separator, query = (location, "", "") if is_plain else location.partition("?")
    base, options = base.rstrip("/"), separator + query
    base, pattern = _split_glob(base, pattern, "*[?" if is_plain else "*[")
    filesystem, root = _connect(base + options)
    found = filesystem.get_file_info(root)
    if found.type in (pafs.FileType.File, pafs.FileType.Unknown):  # Unknown is a pipe or a socket.
        return [_stored_file(base + options, PurePosixPath(base).name, found)]
    if found.type == pafs.FileType.NotFound:
        raise FileNotFoundError(base)
    infos = filesystem.get_file_info(pafs.FileSelector(root, recursive="/" in pattern or "**" in pattern))
    matches, files = re.compile(glob_translate(pattern)).match, []
    for info in infos:
        name = info.path[len(root) :].lstrip("/")
        # Links that lead nowhere, and pipes, are found too: who reads them says what is wrong.
        if info.type != pafs.FileType.Directory and matches(name) and not _HIDDEN.search(name):
            files.append(_stored_file(f"{base}/{name if is_plain else quote(name)}{options}", name, info))
    return files


def _expand_local(path: str, pattern: str) -> list[StoredFile]:
    """List the files of a local path. Names that are not UTF-8 are percent-encoded, and their paths file:// URIs."""
    if not os.path.exists(path):
        path, pattern = _split_glob(path, pattern, "*[?")
    if not os.path.isdir(path):
        os.stat(path)  # raises an error where it is missing
        return [_local_file(path, os.path.basename(path))]
    matches = re.compile(glob_translate(pattern)).match
    names = (name for name in _walk(path, is_deep="/" in pattern or "**" in pattern) if matches(name))
    found, odd = list[StoredFile](), list[StoredFile]()
    for name in names:
        # Links that lead nowhere, and pipes, are found too: who reads them says what is wrong.
        if not _HIDDEN.search(name):
            (found if is_utf8(name) else odd).append(_local_file(os.path.join(path, name), name))
    taken = {file.name for file in found} if odd else set()
    # Another file may really be called like an encoded name.
    return found + [replace(file, name=f"~{file.name}") if file.name in taken else file for file in odd]


def _local_file(path: str, name: str) -> StoredFile:
    size, version = None, ""
    with contextlib.suppress(OSError):  # a link that leads nowhere
        status = os.stat(path)
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        version = f"{size} {status.st_mtime_ns}"
    return StoredFile(utf8_location(path), utf8_name(name), size, version)


def _split_glob(base: str, pattern: str, wildcards: str) -> tuple[str, str]:
    """Part a location with wildcards into the folder before the first of them, and the pattern of its files."""
    parts = base.split("/")
    first = next((index for index, part in enumerate(parts) if any(sign in part for sign in wildcards)), None)
    return (base, pattern) if first is None else ("/".join(parts[:first]), "/".join(parts[first:]))


def _walk(root: str, *, is_deep: bool) -> Iterator[str]:
    """Yield the paths of files below a local folder; links are followed, but not in circles."""

    def fail(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(root, followlinks=True, onerror=fail):
        # A link that leads back is one to a folder that it lies in, or to one above that.
        links = [path for name in names if (path := Path(folder, name)).is_symlink()]
        back = {one.name for one in links if any(up.resolve().is_relative_to(one.resolve()) for up in one.parents)}
        names[:] = [name for name in names if is_deep and not name.startswith(".") and name not in back]
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in files)


def _stored_file(uri: str, name: str, info: pafs.FileInfo) -> StoredFile:
    is_pinned = uri.startswith("hf://") and _PINNED.search(uri)
    version = uri if is_pinned else f"{info.size} {info.mtime_ns}" if info.mtime_ns else ""
    return StoredFile(uri, name, info.size, version)


def _pin_revision(uri: str) -> str:
    """Replace the branch or tag of an hf:// URI by its present commit, so that workers read what was planned."""
    if not uri.startswith("hf://"):
        return uri
    from huggingface_hub import HfApi

    try:
        resolved = fsspec.filesystem("hf").resolve_path(uri)
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"{uri}: wants hf://datasets/OWNER/NAME@REVISION/FOLDER: {one_line_error(error)}") from error
    if not getattr(resolved, "revision", None):
        return uri  # This is a bucket.
    commit = HfApi().repo_info(resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision).sha
    return "hf://" + type(resolved)(resolved.repo_type, resolved.repo_id, commit, resolved.path_in_repo).unresolve()


def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    """Open the file system of a URI; returns it and the path in it."""
    try:
        if uri.startswith("s3://"):
            parts = urlsplit(uri)
            if ":" in parts.netloc and "@" not in parts.netloc:
                raise ValueError("its user or secret holds a / or ?: write %2F, %3F")
            bucket, _ = _from_uri(parts._replace(path="").geturl())
            return bucket, parts.netloc.rpartition("@")[2] + unquote(parts.path)
        if uri.startswith("hf://"):
            filesystem, path = fsspec.url_to_fs(uri)
            return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError, ImportError, ValueError) as error:
        raise DataError(f"{redact_uri(uri)}: not a location pyarrow can read: {one_line_error(error)}") from error


# Reads


class _ExactCache(BaseCache):
    """The reads of an fsspec file: ConnectionError is raised where a server sends fewer bytes than were asked for."""

    _fetched: Sequence[tuple[int, bytes]] = ()  # offsets in the file, and the bytes there

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch byte ranges (start, end) for the reads that follow, near ones in one request; drop earlier ones."""
        self._fetched = ()
        starts, ends = map(list, zip(*ranges, strict=True)) if ranges else ([], [])
        merged = merge_offset_ranges([""] * len(starts), starts, ends, max_gap=_MERGED_GAP_BYTES)
        self._fetched = [(start, self._fetch(start, end)) for _, start, end in zip(*merged, strict=True)]

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        start, stop = start or 0, self.size if stop is None else min(stop, self.size)
        for offset, data in self._fetched:
            if offset <= start and stop <= offset + len(data):
                return data[start - offset : stop - offset]
        data = super()._fetch(start, stop)
        if len(data) != max(0, stop - start):
            raise ConnectionError(f"got {len(data)} of {stop - start} bytes")
        return data


class _SingleThreadParquet(pq.ParquetFile):
    """A parquet file behind a Python object, of which `read_row_groups` reads in the caller's thread alone.

    Arrow's threads would drop the object when they come to it; at the interpreter's end that aborts the process
    (apache/arrow#34314).
    """

    def __init__(self, file: AbstractBufferedFile, metadata: pq.FileMetaData | None) -> None:
        super().__init__(file, metadata=metadata, pre_buffer=False)
        self._cache = file.cache

    def read_row_groups(self, row_groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        ranges = []
        for group in map(self.metadata.row_group, row_groups):
            for chunk in map(group.column, range(group.num_columns)):
                if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
                    start = chunk.dictionary_page_offset or chunk.data_page_offset
                    ranges.append((start, start + chunk.total_compressed_size))
        self._cache.prefetch(ranges)
        return super().read_row_groups(row_groups, columns=list(columns), use_threads=False)


# Faults


def _storage_fault(error: BaseException | None) -> BaseException | None:
    """Return the error of the storage behind an error; None where the program itself is at fault."""
    if isinstance(error, FileNotFoundError) and _http_status(error.__cause__) not in (401, 404, 410):
        # fsspec raises FileNotFoundError for a web server that does not answer, too: its cause tells.
        return _storage_fault(error.__cause__) or error
    known = isinstance(error, OSError | pa.ArrowException) or type(error).__module__.partition(".")[0] in _HTTP_CLIENTS
    return error if known else None


def _http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status that a client's error carries."""
    found = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return found if isinstance(found, int) else None


def _may_pass(uri: str, error: BaseException) -> bool:
    if (
        local_path(uri) is not None
        or isinstance(error, PermissionError | pa.ArrowException)
        or _LASTING_S3_ERROR.search(str(error))
    ):
        return False
    status = _http_status(error)
    return type(error).__name__ != "OfflineModeIsEnabled" and (status is None or status in (408, 429) or status >= 500)
