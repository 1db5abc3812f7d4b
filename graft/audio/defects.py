"""Define what may be wrong with a recording that is decoded all the same: a flag, and the time that it concerns.

recording |====  ====|=====|########.......|
              |       |             |
    damaged or gap    phase_cancelled   truncated_file
"""

from collections.abc import Iterable
from dataclasses import dataclass

# Flag: the file ends before the audio that its header announces, or without the mark of its end.
TRUNCATED_FILE = "truncated_file"
# Flag: the file holds more audio than its header states, or, in a file that is whole, less.
HEADER_MISMATCH = "header_mismatch"
# Flag: a part of the file cannot be decoded, or holds no numbers; it is silent where the file tells how long it lasted,
# else left out.
DAMAGED = "damaged"
# Flag: no audio was recorded for a second or more, by the file's own timestamps; it is silent.
GAP = "gap"
# Flag: the channels cancel each other out, so that the loudest one is taken instead of their mean.
PHASE_CANCELLED = "phase_cancelled"

# Flag: the file has several audio tracks and nobody said which is wanted, so that its default one is taken.
SEVERAL_TRACKS = "several_tracks"

# Defects in which audio is lost: whoever needs the whole of a recording refuses it.
LOSSES = frozenset({TRUNCATED_FILE, DAMAGED})


@dataclass(frozen=True, order=True)
class AudioDefect:
    """A flag and the time in seconds that it concerns; start and end are equal where the file does not tell."""

    start_s: float
    end_s: float
    flag: str


def merge_defects(defects: Iterable[AudioDefect]) -> tuple[AudioDefect, ...]:
    """Order defects by time; those of one flag that repeat, overlap or touch become one."""
    merged: list[AudioDefect] = []
    for defect in sorted(set(defects), key=lambda one: (one.flag, one.start_s, one.end_s)):
        last = merged[-1] if merged else None
        if last is not None and last.flag == defect.flag and defect.start_s <= last.end_s + 1e-3:
            merged[-1] = AudioDefect(last.start_s, max(last.end_s, defect.end_s), last.flag)
        else:
            merged.append(defect)
    return tuple(sorted(merged))
