"""Open an audio file for a decoder: buffered and seekable, whether it is a path, a URI, bytes or an open file.

Decoders are C libraries, through which no exception passes: a fault of reading ends the file for them, and
`SourceFile.check` raises it.
"""

import contextlib
import functools
import io
import os
import select
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from graft.errors import AudioError, DataError

from .local_paths import local_path

AudioSource = str | os.PathLike[str] | bytes | BinaryIO
"""A path or URI (hf://, s3://, http://, https://, file://), the bytes of a file, or an open binary file, which is read
from its start."""

BUFFER_BYTES = 2**20
STREAM_BYTES = 2**30
"""Largest stream that cannot be sought, such as a pipe, in bytes: it is held in memory."""

PIPE_WAIT_S = 30.0
"""Seconds for which a named pipe may be silent when it is opened."""

ReadRange = Callable[[int, int], bytes]
"""(start, count) -> the bytes there, at most `count`."""


class SourceFile(io.BufferedReader):
    """A file to decode, named `label` in messages.

    A fault of reading looks like the end of the file until `check` raises it.
    """

    def __init__(self, label: str, size: int, read_range: ReadRange) -> None:
        self._ranges = _RangeFile(size, read_range)
        super().__init__(self._ranges, max(1, min(size, BUFFER_BYTES)))
        self.label = label
        self.size = size
        self.read_range = read_range

    def after(self, start: int) -> "SourceFile":
        """Open the rest of the file, from byte `start` on, as a file of its own."""
        return SourceFile(self.label, self.size - start, lambda offset, count: self.read_range(start + offset, count))

    def before(self, end: int) -> "SourceFile":
        """Open the start of the file, up to byte `end`, as a file of its own."""
        return SourceFile(self.label, end, lambda offset, count: self.read_range(offset, min(count, end - offset)))

    def patched(self, start: int, data: bytes) -> "SourceFile":
        """Open the file with other bytes from byte `start` on, as a file of its own."""

        def read_range(offset: int, count: int) -> bytes:
            found = bytearray(self.read_range(offset, count))
            for place in range(max(start, offset), min(start + len(data), offset + len(found))):
                found[place - offset] = data[place - start]
            return bytes(found)

        return SourceFile(self.label, self.size, read_range)

    def check(self) -> None:
        """Raise AudioError if something could not be read."""
        if fault := self._ranges.fault:
            raise AudioError(
                f"{self.label}: {_reason(fault)}: fetch it again, or give the path of a local copy"
            ) from fault


@contextlib.contextmanager
def open_source(source: AudioSource, *, name: str | None = None) -> Iterator[SourceFile]:
    """Open a source, which is read by ranges and never held whole, except for streams that cannot be sought.

    `name` is what messages call it; by default its path. Raises AudioError if it is missing, empty or cannot be opened.
    """
    label = name or _label_of(source)
    with contextlib.ExitStack() as stack:
        try:
            size, read_range = _open_ranges(source, stack)
        except (OSError, DataError, ValueError) as error:
            raise AudioError(f"{label}: {_reason(error)}: give the path of a readable audio file") from error
        if not size:
            raise AudioError(f"{label}: the file is empty (0 bytes): fetch or record it again")
        yield SourceFile(label, size, read_range)


class _RangeFile(io.RawIOBase):
    """A file of a fixed size, read by ranges.

    Seeking moves a counter, so that only reads can fail; after a fault nothing is read.
    """

    def __init__(self, size: int, read_range: ReadRange) -> None:
        self.size = size
        self.fault: Exception | None = None
        self._read_range = read_range
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
            data = self._read_range(self._position, count)
            if not data:
                raise EOFError(f"ends at byte {self._position:,} of {self.size:,}")
        except Exception as error:  # A decoder calls this from C, through which no exception passes.
            self.fault = error
            return 0
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _open_ranges(source: AudioSource, stack: contextlib.ExitStack) -> tuple[int, ReadRange]:
    """Return a source's size and what reads a range of it. Raises OSError, DataError, ValueError.

    Reads of URIs that fail in a way that may pass are retried; all of a stream that cannot be sought is read.
    """
    if isinstance(source, SourceFile):
        return source.size, source.read_range
    path = local_path(source) if isinstance(source, str) else source
    if isinstance(source, str) and path is None:
        from graft.storage.locations import open_file, retry_read

        retry: Any = functools.partial(retry_read, source)
        remote = retry(lambda: stack.enter_context(open_file(source)))
        size = retry(lambda: remote.seek(0, io.SEEK_END))
        return size, lambda start, count: retry(lambda: _read_range(remote, start, count))
    if isinstance(path, str | os.PathLike):
        file: Any = stack.enter_context(io.FileIO(path, opener=_open_path))
    else:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
    if not file.seekable():
        data = bytearray()
        while more := file.read(BUFFER_BYTES):
            data += more
            if len(data) > STREAM_BYTES:
                raise ValueError(f"over {STREAM_BYTES:,} bytes of a stream that can't be sought")
        file = io.BytesIO(data)
    return file.seek(0, io.SEEK_END), functools.partial(_read_range, file)


def _open_path(path: str, flags: int) -> int:
    """Open a file; a pipe into which nobody writes is given up, where it would block for ever. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode) and not select.select([descriptor], [], [], PIPE_WAIT_S)[0]:
        os.close(descriptor)
        raise OSError(f"a pipe into which nobody has written for {PIPE_WAIT_S:g} s")
    os.set_blocking(descriptor, True)
    return descriptor


def _read_range(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _label_of(source: AudioSource) -> str:
    if isinstance(source, str) and "://" in source:
        from graft.storage.locations import redact_uri

        return redact_uri(source)
    if isinstance(source, SourceFile):
        return source.label
    if isinstance(source, bytes):
        return f"audio of {len(source)} bytes"
    return os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "audio stream"))


def _reason(error: Exception) -> str:
    """Describe in one line what went wrong."""
    from graft.storage.locations import one_line_error

    if isinstance(error, DataError):
        return str(error).partition(": ")[2]  # A DataError begins with the location, which the caller names too.
    return getattr(error, "strerror", None) or one_line_error(error)
