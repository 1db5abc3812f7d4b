"""Make work items of files as a run plans them, and read them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from jobs.transcription.discovery import find_recordings
from jobs.transcription.reader import READ, ItemReader, Reading
from jobs.transcription.work_items import durations, plan_items
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
