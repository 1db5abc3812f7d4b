"""Where corpora lie: local folders, the Hugging Face hub (hf://), S3 (s3://) and single files of web servers (http://, https://).

A file, folder or glob -> the URIs of its parquet files -> open parquet files, read by ranges. A place over the network is asked again when
it fails for a moment; a lasting fault is a DataError of one line, in which a URI stands without its user, secret and query.
"""

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from graft.errors import DataError, require
from graft.retries import again, shown, told

_PINNED = re.compile("@[0-9a-f]{40}/")


def list_files(places: Sequence[str]) -> list[str]:
    """The parquet files of files, folders (not their subfolders) and globs: sorted URIs or absolute local paths, each once.

    Raises DataError when a place is missing, or none of them holds a parquet file.
    """
    found = sorted({file for place in places for file in again(place, functools.partial(_expand, place))})
    if not found:
        where = ", ".join(map(shown, places)) or "(none)"
        raise DataError(f"corpus {where}: no *.parquet file found there (FOLDER/*/*.parquet takes those in its subfolders)")
    return found


@contextlib.contextmanager
def open_parquet(uri: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Open one file of `list_files`; with its metadata, its footer is not fetched again. Use it inside `again`."""
    with open_file(uri) as file, pq.ParquetFile(file, metadata=metadata, pre_buffer=True) as parquet:
        yield parquet


def open_file(uri: str) -> Any:
    """Open any file to read ranges of it. Use it inside `again`."""
    if uri.startswith(("http://", "https://")):
        require("aiohttp", extra="jobs")
    if uri.startswith(("hf://", "http://", "https://")):
        filesystem, path = fsspec.url_to_fs(uri)
        return _Ranges(filesystem.open(path, "rb", cache_type="none"))  # by default it reads 5 MB ahead, for a footer of 10 kB
    filesystem, path = _connect(uri)
    return filesystem.open_input_file(path)


def version_of(uri: str) -> str | None:
    """What changes when the file does: the commit that its URI holds, or its size and time; None where neither is to be had."""
    if uri.startswith("hf://"):
        return uri if _PINNED.search(uri) else None
    if uri.startswith(("http://", "https://")):
        return None
    filesystem, path = _connect(uri)
    info = filesystem.get_file_info(path)
    return f"{uri} {info.size} {info.mtime_ns}" if info.mtime_ns else None


def _expand(place: str) -> list[str]:
    """The files that a file, folder or glob stands for, as URIs or absolute local paths (Ray's workers have other working folders)."""
    if place.startswith(("http://", "https://")):
        return [place]
    place = _pinned(place) if "://" in place else os.path.abspath(os.path.expanduser(place))
    plain = "://" not in place or place.startswith("hf://")  # in other URIs names are quoted, and "?" begins the options
    base, options = (place, "") if plain else (place.partition("?")[0], "".join(place.partition("?")[1:]))
    base, pattern = base.rstrip("/"), "*.parquet"
    signs = "*[?" if plain else "*["
    if any(sign in base for sign in signs) and not os.path.exists(base):
        parts = base.split("/")
        first = next(index for index, part in enumerate(parts) if any(sign in part for sign in signs))
        base, pattern = "/".join(parts[:first]), "/".join(parts[first:])
    filesystem, root = _connect(base + options)
    kind = filesystem.get_file_info(root).type
    if kind == pafs.FileType.File:
        return [base + options]
    if kind == pafs.FileType.NotFound:
        raise FileNotFoundError(base)
    inside = filesystem.get_file_info(pafs.FileSelector(root, recursive="/" in pattern))
    names = [info.path[len(root) :].lstrip("/") for info in inside if info.type == pafs.FileType.File]
    chosen = [name for name in names if _matches(name, pattern) and not PurePosixPath(name).name.startswith((".", "_"))]
    return [f"{base}/{name if plain else quote(name)}{options}" for name in chosen]


def _pinned(uri: str) -> str:
    """A place on the hub at the commit that its branch or tag stands for now: workers must read what was planned."""
    if not uri.startswith("hf://"):
        return uri
    from huggingface_hub import HfApi

    try:
        place = fsspec.filesystem("hf").resolve_path(uri)
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"corpus {uri}: wants hf://datasets/OWNER/NAME@REVISION/FOLDER: {told(error)}") from error
    if not getattr(place, "revision", None):
        return uri  # a bucket
    commit = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    return "hf://" + type(place)(place.repo_type, place.repo_id, commit, place.path_in_repo).unresolve()


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


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
        raise DataError(f"corpus {shown(uri)}: not a location pyarrow can read: {told(error)}") from error


@functools.lru_cache(maxsize=16)
def _bucket(uri: str) -> pafs.FileSystem:
    """One client for each bucket: a new one asks for the bucket's region and opens new connections."""
    return pafs.FileSystem.from_uri(uri)[0]


class _Ranges(io.RawIOBase):
    """An fsspec file whose reads are whole: fewer bytes than the file must hold are a fault."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        left = self.file.size - self.file.tell()
        wanted = left if size < 0 else min(size, left)
        data = self.file.read(wanted) if wanted else b""
        if len(data) != wanted:
            raise ConnectionError(f"got {len(data)} of {wanted} bytes")
        return data
