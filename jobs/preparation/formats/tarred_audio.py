"""Find the audio of lines whose files lie in tar files: NeMo's tarred sets, and lhotse's shar.

NeMo: a line's shard_id (or its manifest's number) -> audio_ID.tar beside it or one folder up, or one of `tars`
shar: cuts.N.jsonl.gz -> recording.N.tar beside it
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graft.errors import DataError
from graft.storage.locations import redact_uri

from ..audio_places import AudioPlace, file_place, location_below
from .records import BadRecord
from .sources import list_files
from .tar_members import TarIndex

SHAR_SUFFIXES = (".flac", ".wav", ".mp3", ".opus", ".ogg", ".sph", ".sox")

_LAST_NUMBER = re.compile(r"(\d+)\D*$")
_PART = re.compile(r"^(.+)-sub\d+(\.\w+)?$")  # NeMo's names for further lines of one file


class TarredAudio:
    """The tar files beside a manifest, each of whose headers are read once."""

    def __init__(self, manifest: str, tars: Sequence[str]) -> None:
        """`tars` are locations as users write them, relative to the manifest's folder."""
        self._manifest = manifest
        self._tars = [file for one in tars for file in list_files(location_below(manifest, one))]
        self._by_number = {number: tar for tar in self._tars if (number := _number(tar)) is not None}
        self._indices = dict[str, TarIndex | str]()  # or why there is none

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a line's audio lies in a tar file."""
        return bool(self._tars) or "shard_id" in values

    def find(self, values: Mapping[str, Any], path: str, number: int) -> AudioPlace | BadRecord:
        """Return the place of the audio that a line of NeMo's calls `path`, or why there is none."""
        shard = _integer(values.get("shard_id"))
        shard = _number(self._manifest) if shard is None else shard
        if not self._tars:
            beside = (f"audio_{shard}.tar", f"../audio_{shard}.tar")
            candidates = [location_below(self._manifest, name) for name in beside]
        elif len(self._tars) == 1:
            candidates = self._tars
        else:
            candidates = [self._by_number[shard]] if shard in self._by_number else []
        part = _PART.match(path)
        names = (path, *([part[1] + (part[2] or "")] if part else []))
        return self._member(candidates, names, number) or BadRecord(
            number, "no tar file", f"none for the shard {shard}: name the tar files under `tars`", path
        )

    def find_recording(self, cut: str, number: int) -> AudioPlace | BadRecord:
        """Return the place of the recording that lhotse's shar keeps of a cut, or why there is none."""
        name = file_place(self._manifest).name
        tar = re.sub(r"\.jsonl(\.gz)?$", ".tar", name.replace("cuts", "recording", 1))
        found = self._member(
            [location_below(self._manifest, tar)], [f"{cut}{suffix}" for suffix in SHAR_SUFFIXES], number
        )
        return found or BadRecord(number, "no tar file", f"{tar} is not beside its cuts", cut)

    def _member(self, tars: Sequence[str], names: Sequence[str], number: int) -> AudioPlace | BadRecord | None:
        """Find a member in the first of the tar files that is there; None where none is."""
        fault = ""
        for tar in tars:
            if tar not in self._indices:
                try:
                    self._indices[tar] = TarIndex(tar)
                except DataError as error:
                    self._indices[tar] = str(error)
            index = self._indices[tar]
            if isinstance(index, str):
                fault = index
                continue
            member = next((found for name in names if (found := index.get(name))), None)
            if member is None:
                return BadRecord(number, "not in tar file", index.damage or f"{redact_uri(tar)} holds none", names[0])
            if member.fault:
                return BadRecord(number, "unreadable member", f"{redact_uri(tar)}: {member.fault}", names[0])
            return AudioPlace(tar, member.base_name, member.start, member.size)
        return BadRecord(number, "no tar file", fault, names[0]) if fault and self._tars else None


def _number(location: str) -> int | None:
    """Return the last number in a file's name."""
    found = _LAST_NUMBER.search(file_place(location).name.partition(".json")[0].removesuffix(".tar"))
    return int(found[1]) if found else None


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
