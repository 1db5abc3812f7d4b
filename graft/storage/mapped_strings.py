"""Hold millions of strings in a file instead of in memory: the system reads and drops its pages as it sees fit."""

import mmap
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa

from graft.errors import DataError

HELD_BYTES = 64 * 2**20
"""Most bytes of strings that are held in memory, after all."""


class MappedStrings:
    """Appends strings to an unnamed file of the temporary folder, and maps them as one array of Arrow."""

    def __init__(self) -> None:
        # Nothing closes it: the mapped array outlives this object.
        self._file = tempfile.SpooledTemporaryFile(HELD_BYTES)  # noqa: SIM115
        self._ends: list[np.ndarray] = [np.zeros(1, np.int64)]

    def add(self, strings: Any) -> None:
        """Append a LargeStringArray without nulls, or the chunks of one. Raises DataError where the disk is full."""
        chunks = strings.chunks if isinstance(strings, pa.ChunkedArray) else [strings]
        for chunk in chunks:
            if not len(chunk):
                continue
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if data is not None:
                self._write(memoryview(data)[ends[0] : ends[-1]])
            self._ends.append(ends[1:] - ends[0] + self._ends[-1][-1])

    def array(self) -> Any:
        """Map all strings: a LargeStringArray, which holds in memory only where each string ends."""
        offsets = np.concatenate(self._ends)
        self._ends = [offsets]
        size = int(offsets[-1])
        if size > HELD_BYTES:
            data = pa.py_buffer(mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ))
        else:
            self._file.seek(0)
            data = pa.py_buffer(self._file.read())
        return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), data)

    def _write(self, data: memoryview) -> None:
        try:
            self._file.write(data)
            if int(self._ends[-1][-1]) + len(data) > HELD_BYTES:
                self._file.flush()
        except OSError as error:
            raise DataError(
                f"the temporary folder {tempfile.gettempdir()} cannot hold the corpus's ids and texts "
                f"({error.strerror}): free some of its space, or name a larger one in TMPDIR"
            ) from error
