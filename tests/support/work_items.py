"""Make work items of files as a run plans them, and read them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.storage.atomic import atomic_file
from jobs.transcription.discovery import find_recordings
from jobs.transcription.pipeline import RESULTS
from jobs.transcription.reader import READ, ItemReader, Reading
from jobs.transcription.work_items import ITEMS, durations, plan_items
from tests.support import media

QUICK = SpeechSettings(detector="energy")


def long_recording(home: Path) -> Path:
    """Write 46.3 s of speech on two channels at 8 kHz, as telephones record it."""
    path = home / "calls" / "long.flac"
    path.parent.mkdir()
    soundfile.write(path, media.speech(8000, channels=2), 8000)
    return path


def items_of(*sources: Path, item_s: float = 1800.0) -> pa.Table:
    return plan_items(find_recordings([str(source) for source in sources]), item_s=item_s, probe=durations)


def read(items: pa.Table, **changed) -> pa.Table:
    reader = ItemReader(Reading(**{"speech": QUICK, "chunks": ChunkSettings(max_s=5.0)} | changed))
    table = pa.concat_tables(reader(items))
    assert table.schema == READ
    return table


def chunks_of(table: pa.Table) -> list[tuple[float, int | None, np.ndarray]]:
    parts = (chunk for row in table["chunks"].to_pylist() for chunk in row)
    return [(chunk["start_s"], chunk["channel"], np.frombuffer(chunk["samples"], np.float32)) for chunk in parts]


def planned(*recordings: tuple[str, list[float | None]]) -> pa.Table:
    """Make a plan of recordings, by the seconds that are expected of each of their items."""
    blank = {field.name: None for field in ITEMS}
    rows = [
        blank
        | {"id": f"{name}-{index}", "item": f"{name}-{index}", "attempt": 0, "recording": name, "index": index}
        | {"uri": f"/calls/{name}", "item_count": len(expected), "expected_s": seconds}
        for name, expected in recordings
        for index, seconds in enumerate(expected)
    ]
    return pa.Table.from_pylist(rows, ITEMS)


def write_results(home: Path, name: str, *items: tuple[str, int, float, str | None]) -> None:
    """Write a file of results: of each item its name, also its text, how many its recording has, seconds and error."""
    segment = {"start_s": 0.0, "end_s": 1.0, "flags": [], "words": []}
    rows = [
        {"id": item, "item": item, "attempt": 0, "item_count": count, "duration_s": seconds, "error": error}
        | {"read_s": 0.0, "heard_s": 0.0, "defects": [], "segments": [] if error else [segment | {"text": item}]}
        for item, count, seconds, error in items
    ]
    with atomic_file(home / "items" / f"{name}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, RESULTS), temporary)
