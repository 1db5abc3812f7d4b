"""Define what the decoders share: a header's facts, the form of decoding, and the log of what is wrong with a file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from graft.audio.defects import DAMAGED, LOSSES, AudioDefect
from graft.errors import AudioError

BLOCK_SAMPLES = 2**20
"""Samples of a block, all channels together: 4 MB."""

LONGEST_SHORTFALL_S = 0.5
"""A file that ends sooner or later than its header says by more than this is truncated, or its header is wrong; headers
that count a few frames too many are common."""

CONVERT = "convert it, e.g. `ffmpeg -i IN OUT.flac`"

AudioTrack = int | str
"""The audio track of a file that has several: its number among them, counted from 1, or its language as the file writes
it, such as deu or en."""

Decode = Callable[[int, int | None, "DefectLog"], Iterator[np.ndarray]]
"""(start, end) -> blocks (frames, channels). Without exact seek the start is always 0; the last block may go beyond the
end."""


@dataclass(eq=False)
class DefectLog:
    """Collects the defects of a recording while it is decoded; without a list, those that lose audio are refused."""

    label: str
    defects: list[AudioDefect] | None
    damaged_s: float = 0.0
    """Seconds that are damaged."""

    def add(self, flag: str, start_s: float, end_s: float, reason: str = "audio is lost") -> None:
        """Add a defect. Raises AudioError if it loses audio and is not to be put up with."""
        if flag in LOSSES:
            self.refuse(start_s, reason)
        self.note(flag, start_s, end_s)

    def note(self, flag: str, start_s: float, end_s: float) -> None:
        """Add a defect that is put up with."""
        self.damaged_s += (end_s - start_s) * (flag == DAMAGED)
        if self.defects is not None:
            self.defects.append(AudioDefect(start_s, end_s, flag))

    def refuse(self, at_s: float, reason: str) -> None:
        """Raise AudioError for a loss, unless losses are put up with."""
        if self.defects is None:
            raise AudioError(
                f"{self.label}: damaged or truncated at {at_s:.1f} s ({reason}): fetch it again, or {CONVERT}"
            )


@dataclass(frozen=True)
class AudioInfo:
    """The facts in the header of a recording."""

    format: str
    rate: int
    channels: int
    duration_s: float | None
    """Duration in seconds: exact where `exact_seek`, elsewhere what the header or the bit rate suggests; None where
    neither does."""
    exact_seek: bool
    """Whether frames can be read from anywhere; if not, all frames before them are decoded and dropped."""
    track_count: int = 1
    """Number of audio tracks in the file, of which one is decoded."""
