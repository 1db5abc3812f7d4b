"""A path, the bytes of a file, an open file or the URI of a place -> a file to decode: buffered, seekable, its faults kept and told."""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from graft.errors import AudioError, DataError

AudioSource = str | os.PathLike[str] | bytes | BinaryIO
"""A path or URI (hf://, s3://, http://, https://, file://), the bytes of a file, or an open binary file, which is read from its start."""

BUFFER_BYTES = 2**20
STREAM_BYTES = 2**30
"""Most bytes of a stream that can't be sought, such as a pipe: it is held in memory."""


class SourceFile(io.BufferedReader):
    """A file to decode. A fault of reading looks like the end of the file to a decoder; `check` tells it afterwards."""

    def __init__(self, name: str, size: int, read: Callable[[int, int], bytes]) -> None:
        self._ranges = _Ranges(size, read)
        super().__init__(self._ranges, max(1, min(size, BUFFER_BYTES)))
        self.source = name
        self.size = size
        self.read_range = read

    def after(self, start: int) -> "SourceFile":
        """The rest of the file as a file."""
        return SourceFile(self.source, self.size - start, lambda place, count: self.read_range(start + place, count))

    def check(self) -> None:
        """Raise AudioError if something could not be read."""
        if fault := self._ranges.fault:
            raise AudioError(
                f"{self.source}: {_reason(fault)}: fetch it again, or give the path of a local copy"
            ) from fault


@contextlib.contextmanager
def open_source(source: AudioSource, *, name: str | None = None) -> Iterator[SourceFile]:
    """Open whatever holds a file, which is read by ranges and never whole, but for streams that can't be sought.

    `name` is what messages call it; by default its path. Raises AudioError if it is missing, empty or not to be opened.
    """
    name = name or _name_of(source)
    with contextlib.ExitStack() as stack:
        try:
            size, read = _opened(source, stack)
        except (OSError, DataError, ValueError) as error:
            raise AudioError(f"{name}: {_reason(error)}: give the path of a readable audio file") from error
        if not size:
            raise AudioError(f"{name}: the file is empty (0 bytes): fetch or record it again")
        yield SourceFile(name, size, read)


class _Ranges(io.RawIOBase):
    """A file of a fixed size, read by ranges. Seeking only counts, so that only reads can fail; after a fault nothing is read."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self.size = size
        self.fault: Exception | None = None
        self._read = read
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self._position)
        if count <= 0 or self.fault:
            return 0
        try:
            data = self._read(self._position, count)
            if not data:
                raise EOFError(f"ends at byte {self._position:,} of {self.size:,}")
        except Exception as error:  # a decoder calls this from C, through which no exception passes
            self.fault = error
            return 0
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _opened(source: AudioSource, stack: contextlib.ExitStack) -> tuple[int, Callable[[int, int], bytes]]:
    """A source's size and what reads a range of it. Raises OSError, DataError, ValueError."""
    if isinstance(source, str) and "://" in source:
        return _opened_place(source, stack)
    if isinstance(source, str | os.PathLike):
        file: Any = stack.enter_context(io.FileIO(source))
    else:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
    if not file.seekable():
        file = io.BytesIO(_read_stream(file))
    return _size_of(file), functools.partial(_read_range, file)


def _opened_place(uri: str, stack: contextlib.ExitStack) -> tuple[int, Callable[[int, int], bytes]]:
    """As `_opened`; what fails for a moment is asked for again."""
    from graft.storage.locations import open_file, retry_read

    file = retry_read(uri, lambda: stack.enter_context(open_file(uri)))
    return retry_read(uri, lambda: _size_of(file)), lambda start, count: retry_read(
        uri, lambda: _read_range(file, start, count)
    )


def _size_of(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)


def _read_range(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _read_stream(file: BinaryIO) -> bytes:
    """All of a stream. Raises ValueError for one without an end."""
    data = bytearray()
    while more := file.read(BUFFER_BYTES):
        data += more
        if len(data) > STREAM_BYTES:
            raise ValueError(f"over {STREAM_BYTES:,} bytes of a stream that can't be sought")
    return bytes(data)


def _name_of(source: AudioSource) -> str:
    if isinstance(source, str) and "://" in source:
        from graft.storage.locations import redact_uri

        return redact_uri(source)
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return (
        f"audio of {len(source)} bytes" if isinstance(source, bytes) else str(getattr(source, "name", "audio stream"))
    )


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    from graft.storage.locations import one_line_error

    if isinstance(error, DataError):
        return str(error).partition(": ")[2]  # it begins with the place
    return getattr(error, "strerror", None) or one_line_error(error)
