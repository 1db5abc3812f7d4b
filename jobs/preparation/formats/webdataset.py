"""Read WebDataset's tar files: members in a row with the same name up to its first dot are one sample.

    KEY.wav (or another kind of audio), KEY.txt or KEY.json or KEY.cls -> one record

Texts are read as the headers are, and audio is left where it is. Source: https://github.com/webdataset/webdataset
"""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any, BinaryIO

from graft.errors import DataError

from ...transcription.discovery import AUDIO_SUFFIXES
from ..audio_places import AudioPlace
from .records import BadRecord, Record
from .tar_members import DamagedTarError, Member, iter_members

MOST_TEXT_BYTES = 2**20
"""Longest text or JSON of a sample."""
TEXTS = ("txt", "text", "transcript", "cls")
"""Suffixes of members that hold a sample's text, the first one first."""
DAMAGED = "damaged tar"


def read_samples(file: BinaryIO, location: str, place: str) -> Iterator[Record | BadRecord]:
    """Yield the samples of an open tar file, whose ids are its name and their keys. `place` is what messages call it.

    What follows a damaged header is one BadRecord. Raises DataError where it is no tar file.
    """
    number = 0
    members = iter_members(file, f"manifest {place}")
    damage = list[str]()

    def undamaged() -> Iterator[Member]:
        try:
            yield from members
        except DamagedTarError as error:
            damage.append(str(error))

    for key, group in groupby(undamaged(), lambda member: _split(member.name)[0]):
        for member in group if key is None else ():
            number += 1
            yield BadRecord(number, "no sample", "WebDataset names members KEY.SUFFIX", member.name)
        if key is not None:
            number += 1
            name = f"{place.removesuffix('.tar')}/{key}"
            try:
                yield _sample(file, location, list(group), number, name)
            except DataError as error:
                reason, _, detail = str(error).partition(": ")
                yield BadRecord(number, reason, detail, name)
    if damage:
        yield BadRecord(number + 1, DAMAGED, damage[0])


def _sample(file: BinaryIO, location: str, members: list[Member], number: int, name: str) -> Record | BadRecord:
    parts = {_split(member.name)[1]: member for member in members}
    audio = [member for suffix, member in parts.items() if f".{suffix.rpartition('.')[2]}" in AUDIO_SUFFIXES]
    if len(audio) != 1:
        names = ", ".join(member.base_name for member in (audio or members)[:4])
        return BadRecord(number, "no audio" if not audio else "several audio files", f"the sample holds {names}", name)
    if audio[0].fault:
        return BadRecord(number, "unreadable member", f"{audio[0].name}: {audio[0].fault}", name)
    values: dict[str, Any] = {}
    if "json" in parts:
        values = _read_values(file, parts["json"])
    for suffix in reversed(TEXTS):
        if suffix in parts and not (suffix == "cls" and "text" in values):
            values["text"] = _read_text(file, parts[suffix])
    return Record(number, values, AudioPlace(location, audio[0].base_name, audio[0].start, audio[0].size), name, True)


def _split(name: str) -> tuple[str | None, str]:
    """Return a member's key and suffix in lower case; the key is None where there is none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem and dot else (None, "")


def _read_values(file: BinaryIO, member: Member) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(file, member))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {member.name}: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"not JSON: {member.name}: a {type(values).__name__}, wants an object")
    return values


def _read_text(file: BinaryIO, member: Member) -> str:
    if member.fault:
        raise DataError(f"unreadable member: {member.name}: {member.fault}")
    if member.size > MOST_TEXT_BYTES:
        raise DataError(f"unreadable member: {member.name}: {member.size:,} bytes are no text")
    file.seek(member.start)
    try:
        return file.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {member.name}: {error.reason}") from error
