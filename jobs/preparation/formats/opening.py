"""Open a manifest and tell its format by its first bytes and its name; gzip is undone while it is read."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, Literal

from graft.errors import AudioError, DataError
from graft.storage.local_paths import local_path
from graft.storage.locations import redact_uri
from graft.storage.source import open_source

from ..audio_places import file_place

Format = Literal["text", "csv", "tar", "parquet", "arrow"]

SNIFFED_BYTES = 512
_BY_SUFFIX: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "tar",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_BY_MAGIC: dict[bytes, Format] = {b"PAR1": "parquet", b"\xff\xff\xff\xff": "arrow"}
_GZIP = b"\x1f\x8b"
_OTHERS = {
    b"BZh": "is compressed with bzip2: gzip or decompress it",
    b"\xfd7zXZ": "is compressed with xz: gzip or decompress it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: gzip or decompress it",
    b"PK\x03\x04": "is a zip file: unpack it",
    b"ARROW1": "is a Feather file: save it as parquet",
}


@dataclass(frozen=True)
class OpenManifest:
    """A manifest that is open, at its start."""

    file: BinaryIO
    format: Format


@contextlib.contextmanager
def open_manifest(location: str, *, has_delimiter: bool = False) -> Iterator[OpenManifest]:
    """Open a manifest, which is read by ranges; a file with a given delimiter is CSV.

    Raises DataError where it is missing or compressed in another way than by gzip, and where reading it failed.
    """
    place = redact_uri(location)
    try:
        with _open(location) as file:
            head = _peek(file)
            suffix = PurePosixPath(file_place(location).name.lower().removesuffix(".gz")).suffix
            if head.startswith(_GZIP):
                file = io.BufferedReader(_Gunzip(file, place))
                head = _peek(file)
                if _is_tar(head) or suffix in (".tar", ".tgz"):
                    raise DataError(
                        f"manifest {place}: is a compressed tar file, of which no part can be read by itself: gunzip it"
                    )
            for magic, fault in _OTHERS.items():
                if head.startswith(magic):
                    raise DataError(f"manifest {place}: {fault}")
            found = next((kind for magic, kind in _BY_MAGIC.items() if head.startswith(magic)), None)
            by_name: Format = "csv" if has_delimiter else _BY_SUFFIX.get(suffix, "text")
            yield OpenManifest(file, found or ("tar" if _is_tar(head) else by_name))
    except (OSError, AudioError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition(": ")[2].rpartition(": ")[0]
        raise DataError(
            f"manifest {place}: {reason}: give the path or URI of a manifest, a tar file or a table"
        ) from error


@contextlib.contextmanager
def _open(location: str) -> Iterator[BinaryIO]:
    path = local_path(location)
    if path is not None:
        with open(path, "rb") as local:
            yield local
        return
    with open_source(location) as file:
        yield file
        file.check()


def _peek(file: BinaryIO) -> bytes:
    """Return the first bytes of a file, and go back to its start."""
    return file.peek(SNIFFED_BYTES)[:SNIFFED_BYTES] if isinstance(file, io.BufferedReader) else b""


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


class _Gunzip(io.RawIOBase):
    """The content of a gzip file, of which a block at a time is held. Raises DataError where it is damaged."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        self._file, self._place = gzip.GzipFile(fileobj=file, mode="rb"), place

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._file.readinto(buffer)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"manifest {self._place}: its gzip data end or are damaged ({error}): fetch it again"
            ) from error
