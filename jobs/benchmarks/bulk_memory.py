"""What bulk transcription holds in memory: its driver by the number of recordings, its workers by their length, and a large plan.

Each run is a fresh process, which is watched with all that it starts. A stand-in for an H200 answers.
"""

import contextlib
import functools
import io
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from ..common.console import quiet_libraries
from ..transcription.assembly import read_index
from ..transcription.discovery import find_recordings
from ..transcription.driver import transcribe
from ..transcription.recipe import TranscribeRecipe
from ..transcription.work_items import at_attempts, durations, plan_items
from .bulk_engine import Device, open_stand_in
from .bulk_speech import link_files, write_archive, write_long_recording
from .measuring import Findings, Numbers, list_numbers
from .processes import Watched, watched

FEW = 100
SHORT_S = 0.3

ABOUT = f"""\
few, many  recordings of {SHORT_S} s through jobs.transcribe; driver: the most that its process holds
long       one recording (8 kHz, as telephones make it), by one reader and one listener
plan       files in folders listed, planned and written; none is opened
Megabytes (2^20 bytes), memory shared with Ray's object store included."""


def bench_memory(graft: str, *, recordings: int, hours: float, rows: int) -> Findings:
    """Measure the driver with few recordings and with so many, workers on a recording of so many hours, and a plan of so many rows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        few = _short_recordings(graft, folder / "few", min(FEW, recordings))
        many = _short_recordings(graft, folder / "many", recordings)
        write_long_recording(folder / "long.wav", hours)
        long = watched(_transcribe, graft, str(folder / "long.wav"), str(folder / "long"))
        planned = _planned(folder / "plan", rows)
    numbers: Numbers = {
        "few_recordings": min(FEW, recordings),
        "few_driver_mb": few.own_mb,
        "many_recordings": recordings,
        "many_driver_mb": many.own_mb,
        "many_more_mb": many.own_mb - few.own_mb,
        "many_s": many.result,
        "long_hours": hours,
        **{
            f"long_{name}_mb": long.peak_mb(actor)
            for name, actor in {"reader": "ItemReader", "listener": "ItemListener"}.items()
        },
        "long_driver_mb": long.own_mb,
        "long_s": long.result,
        "plan_rows": rows,
        "plan_mb": planned.own_mb,
        "plan_s": planned.result,
    }
    return Findings(numbers, f"{ABOUT}\n{list_numbers(numbers)}")


def _short_recordings(graft: str, folder: Path, count: int) -> Watched[float]:
    write_archive(folder / "archive", count, seconds=SHORT_S)
    return watched(_transcribe, graft, str(folder / "archive"), str(folder / "out"))


def _planned(folder: Path, rows: int) -> Watched[float]:
    """A plan of links to a few files."""
    files = write_archive(folder / "files", 100, seconds=SHORT_S)
    (folder / "archive").mkdir()
    link_files(folder / "archive", files, range(rows))
    return watched(_plan, str(folder / "archive"), str(folder))


def _transcribe(graft: str, audio: str, out: str) -> float:
    """Transcribe an archive as jobs.transcribe does; returns the seconds. Raises RuntimeError where a recording fails."""
    import ray

    quiet_libraries()
    Path(out).mkdir()
    recipe = TranscribeRecipe(model=graft, audio=audio, out=out)
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        _, summary = transcribe(
            find_recordings([audio]), recipe, Path(out), functools.partial(open_stand_in, graft, Device())
        )
    seconds = time.monotonic() - start
    ray.shutdown()
    if summary["failed"]:
        raise RuntimeError(f"{summary['failed']} recordings failed: {summary['failed_by_reason']}")
    return seconds


def _plan(audio: str, home: str) -> float:
    """Plan an archive as jobs.transcribe does; returns the seconds."""
    start = time.monotonic()
    plan = plan_items(find_recordings([audio]), item_s=TranscribeRecipe.model_fields["item_s"].default, probe=durations)
    plan = at_attempts(plan, read_index(Path(home)), retry_errors=False)
    pq.write_table(plan, Path(home) / "plan.parquet", row_group_size=50_000)
    return time.monotonic() - start
