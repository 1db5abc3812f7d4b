"""What the readers of all formats yield: the values of an entry and where its audio is, or why it cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..audio_places import AudioPlace


@dataclass(frozen=True, slots=True)
class Record:
    """A line of a text, a sample of a tar file or a row of a table."""

    number: int  # of the line, sample or row in its file, from 1
    values: Mapping[str, Any]  # by the names of its fields
    audio: AudioPlace | None = None  # None where a field names the file
    id: str = ""  # for a record that has none of its own
    is_whole: bool = False  # its times are those of a file that its audio was cut from, and mean nothing here


@dataclass(frozen=True, slots=True)
class BadRecord:
    """An entry that cannot be read, and the reason."""

    number: int
    reason: str
    detail: str
    id: str | None = None
