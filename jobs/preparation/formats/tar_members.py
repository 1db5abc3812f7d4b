"""List the members of a tar file by its headers: where each one's bytes are. Nothing is unpacked.

Only headers are read, so that memory does not depend on the file's size. Names are only names: no path of a member is
ever opened. Links and sparse members have no bytes of their own.
"""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from graft.errors import AudioError, DataError
from graft.storage.local_paths import utf8_name
from graft.storage.locations import redact_uri
from graft.storage.source import SourceFile, open_source

MOST_HEADER_BYTES = 2**20
"""Longest header; a file that states a longer one is damaged, or wants to fill the memory."""


class DamagedTarError(DataError):
    """A tar file whose headers cannot be read any further."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member that is no folder."""

    name: str
    start: int
    size: int
    fault: str = ""  # why its bytes cannot be read

    @property
    def base_name(self) -> str:
        """The name without its folders."""
        return self.name.rpartition("/")[2]


def iter_members(file: BinaryIO, place: str) -> Iterator[Member]:
    """Yield the members of an open tar file in their order. `place` is what messages call it.

    Raises DataError where it is no tar file, or cannot be read by ranges, and DamagedTarError where it ends early.
    """
    if not file.seekable():
        raise DataError(f"{place}: a tar file is read by ranges, and this is a stream: give the path of a file")
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    position = -1
    try:
        # The archive holds no resource but the file, which is the caller's.
        archive = tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
        while (info := archive.next()) is not None:
            if info.size < 0 or archive.offset <= position:  # it would go round in a circle
                raise tarfile.ReadError("a header leads backwards")
            archive.members = []  # it would hold all of them
            position = archive.offset
            if not info.isdir():
                name = utf8_name(info.name).removeprefix("./")
                yield Member(name, info.offset_data, info.size, _fault(info, size))
        position = archive.offset
        file.seek(position)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("no header is there")
    except (tarfile.TarError, ValueError, RecursionError, OverflowError, IndexError, EOFError) as error:
        if isinstance(file, SourceFile):
            file.check()  # rather the fault of reading, which looks like the end of the file
        if position < 0:
            raise DataError(f"{place}: is no tar file ({error}): give one that is not compressed") from error
        raise DamagedTarError(
            f"{place}: is damaged after byte {min(position, size):,} of {size:,} ({error}): fetch it again"
        ) from error


class TarIndex:
    """The members of a tar file by their names."""

    def __init__(self, location: str) -> None:
        """Read the headers of a tar file. Raises DataError where it is missing, or no tar file."""
        self.location, self.damage = location, ""
        self._members = dict[str, Member]()
        place = redact_uri(location)
        try:
            with open_source(location) as file:
                with contextlib.suppress(DamagedTarError):
                    for member in iter_members(file, place):
                        self._members[member.name] = member
                    return
                self.damage = f"{place} is damaged after its member {len(self._members):,}"
                file.check()
        except AudioError as error:
            raise DataError(str(error)) from error

    def get(self, name: str) -> Member | None:
        """Return the member of this name; None where there is none."""
        return self._members.get(name.removeprefix("./"))


class _Headers:
    """A file as tarfile reads it, which trusts the sizes in headers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._empty = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        data = self._file.read(count)
        self._empty = 0 if data else self._empty + 1
        if self._empty > 8:  # tarfile would wait for more forever
            raise tarfile.ReadError("unexpected end of data")
        return data


def _fault(info: tarfile.TarInfo, size: int) -> str:
    """Say why a member's bytes cannot be read, "" where they can."""
    if info.issym() or info.islnk():
        return "it is a link"
    if not info.isreg() or info.sparse:
        return "it is no plain file"
    return "the tar file ends within it" if info.offset_data + info.size > size else ""
