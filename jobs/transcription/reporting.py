"""Say what a run of bulk transcription left out, what failed, and how it ended."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graft.audio.defects import SEVERAL_TRACKS
from graft.storage.atomic import write_atomic

from ..common.console import json_text, printable
from .discovery import suffix_of

ERRORS_FILE, SKIPPED_FILE = "errors.jsonl", "skipped.jsonl"
MOST_FAILURES, MOST_SUFFIXES = 3, 5
"""Recordings that failed, and kinds of files that are left out, which are named in the command's output."""


def summary_lines(summary: dict[str, Any], failures: Sequence[str]) -> Iterator[str]:
    """Yield the lines that end a run: counts, speed and cost, then what failed (`failures`) and what is flagged."""
    rtfx, cost = summary["rtfx"], summary["cost_per_audio_hour"]
    speed = f", {rtfx:.1f} times as fast as real time in this run" if rtfx else ""
    speed = ", nothing was left to do" if rtfx is None else speed
    price = f", {cost:.4f} an hour of audio" if cost is not None else ""
    counts = f"{summary['done']} recording{'s' * (summary['done'] != 1)} done, {summary['failed']} failed"
    yield f"{counts}; {summary['audio_hours']:.2f} h of audio{speed}{price}"
    yield from (f"  failed: {count} x {reason}" for reason, count in summary["failed_by_reason"].items())
    yield from (f"  {failure}" for failure in failures)
    yield from (f"  flagged: {count} segments {flag}" for flag, count in summary["flagged_segments"].items())
    recordings = dict(summary["flagged_recordings"])
    tracks = recordings.pop(SEVERAL_TRACKS, 0)
    yield from (f"  flagged: {count} recordings {flag}" for flag, count in recordings.items())
    if tracks:
        have = "1 recording has" if tracks == 1 else f"{tracks} recordings have"
        yield f"  {have} several audio tracks ({SEVERAL_TRACKS}): the default one is taken, audio_track= takes another"


def say_skipped(skipped: Sequence[str], out: Path | None) -> None:
    """Say which files of the folders are left out, and list them in SKIPPED_FILE of a folder of results."""
    listed = ""
    if out:
        write_atomic(out / SKIPPED_FILE, "".join(f"{json_text({'uri': uri})}\n" for uri in skipped))
        listed = f": {out / SKIPPED_FILE} lists them"
    if skipped:
        suffixes = Counter(suffix_of(uri) or "no suffix" for uri in skipped)
        counts = printable(", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(MOST_SUFFIXES)))
        more = ", ..." if len(suffixes) > MOST_SUFFIXES else ""
        files = "1 file is" if len(skipped) == 1 else f"{len(skipped)} files are"
        print(f"graft: {files} no audio by suffix and left out ({counts}{more}){listed}", file=sys.stderr, flush=True)


def first_failures(out: Path) -> list[str]:
    """Return lines on the first recordings that failed, and on where all of them are listed; none where none failed."""
    path, first = out / ERRORS_FILE, dict[str, str]()
    with path.open(encoding="utf-8") as file:  # which has a line for each part of a recording
        for one in map(json.loads, file):
            first.setdefault(one["recording"], one["error"])
            if len(first) == MOST_FAILURES:
                break
    return [*(f"{name}: {error}" for name, error in first.items()), f"{path} lists all that failed"] if first else []
