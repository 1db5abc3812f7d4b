"""Work items -> their audio, cut into chunks that the model can hear: the CPU side of the bulk pipeline, without Ray.

What goes wrong with an item is a value: its `error`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from graft.audio.chunking import Chunk, Chunker, ChunkSettings
from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.decoding import CONVERT
from graft.audio.spans import probe, read_span
from graft.audio.vad import SpeechSettings
from graft.data.dataset import CorpusFile, RowReader
from graft.errors import AudioError, DataError
from graft.storage.locations import one_line_error, redact_uri
from graft.storage.source import AudioSource

from .crash_guard import CrashTracker
from .work_items import ITEMS

FAULTS_IN_A_ROW = 3
"""Items on which an engine or a reader may fail one after the other: more are its own fault, not theirs."""

KEYS = [(name, ITEMS.field(name).type) for name in ("id", "item", "attempt", "item_count")]
MEASURED = [("error", pa.string()), ("duration_s", pa.float64()), ("read_s", pa.float64())]
_CHUNK = pa.struct(
    [("start_s", pa.float64()), ("channel", pa.int32()), ("has_speech", pa.bool_()), ("samples", pa.large_binary())]
)
READ = pa.schema([*KEYS, *MEASURED, ("chunks", pa.list_(_CHUNK))])
"""`error` is null or says in a line what failed, `duration_s` are the seconds of audio that were decoded, `read_s` the CPU seconds."""
NO_CHUNKS = pa.array([[]], READ.field("chunks").type)


@dataclass(frozen=True)
class Reading:
    """How items become chunks."""

    speech: SpeechSettings
    chunks: ChunkSettings
    channels: Literal["mix", "split"] = "mix"
    audio_column: str = "wav"


class ItemReader:
    """Decodes items and cuts them into chunks; Ray Data's CPU side. Rows of ITEMS -> rows of READ.

    With a folder for notes, items that end the process again and again become errors (jobs.transcription.crash_guard).
    """

    def __init__(self, reading: Reading, notes: Path | None = None) -> None:
        import torch

        torch.set_num_threads(1)
        self._reading = reading
        self._chunker = Chunker(reading.speech, reading.chunks)
        self._corpora = RowReader([])  # one for all parquet files, so that few row groups are held
        self._places: dict[str, int] = {}
        self._deaths = CrashTracker(notes) if notes else None
        self._faults = 0

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        items, deaths = batch.to_pylist(), self._deaths
        if deaths is None or not items:
            yield from map(self._read, items)
            return
        with deaths.noted(first := items[0]["id"]):
            is_suspected = deaths.has_ended_a_process(first)
            for item in items:
                if is_suspected:
                    deaths.note_item(item["id"])
                row = self._unread(item) if deaths.is_poisoned(item["id"]) else self._read(item)
                if is_suspected:  # it has been read, and may wait long to be taken
                    deaths.note_batch(first)
                yield row

    def _read(self, item: dict[str, Any]) -> pa.Table:
        start, error, duration_s, chunks = time.process_time(), None, 0.0, NO_CHUNKS
        try:
            channels, place = self._decode(item)
            duration_s = channels.shape[0] / SAMPLE_RATE
            chunks = self._cut(channels, place)
            self._faults = 0
        except (AudioError, DataError) as fault:
            error = str(fault)
        except Exception as fault:
            self._faults += 1
            if self._faults > FAULTS_IN_A_ROW:
                raise
            error = f"{name_of(item)}: reading it failed: {type(fault).__name__}: {one_line_error(fault)}"
        return _row(item, error=error, duration_s=duration_s, read_s=time.process_time() - start, chunks=chunks)

    def _unread(self, item: dict[str, Any]) -> pa.Table:
        error = f"{name_of(item)}: whatever reads it dies: {CONVERT}, or take a smaller item_s if memory ran out"
        return _row(item, error=error, duration_s=0.0, read_s=0.0, chunks=NO_CHUNKS)

    def _decode(self, item: dict[str, Any]) -> tuple[np.ndarray, int]:
        """An item's samples, (samples, channels), and the place of the first in its recording."""
        source, name = self._source(item)
        rate = probe(source, name=name).rate if item["item_count"] > 1 else 0
        span = [None if second is None else round(second * rate) for second in (item["start_s"], item["end_s"])]
        kind = self._reading.channels
        blocks = list(read_span(source, span[0] or 0, span[1], borders="quiet", channels=kind, name=name))
        if not blocks:
            return np.zeros((0, 1), np.float32), 0
        samples = np.concatenate([block.samples for block in blocks])
        return samples if samples.ndim == 2 else samples[:, None], blocks[0].start

    def _source(self, item: dict[str, Any]) -> tuple[AudioSource, str | None]:
        if item["row"] is None:
            return item["uri"], None
        place = self._places.setdefault(item["uri"], len(self._places))
        if place == len(self._corpora.files):
            self._corpora.files.append(CorpusFile(item["uri"], self._reading.audio_column))
        audio, _ = self._corpora.wav(place, item["row_group"], item["row"])
        return audio, name_of(item)

    def _cut(self, channels: np.ndarray, place: int) -> pa.Array:
        """The chunks of all channels as one row."""
        numbered = self._reading.channels == "split"
        cut = [
            (number if numbered else None, chunk)
            for number, samples in enumerate(channels.T, start=1)
            for chunk in self._chunker(_clip(samples))
        ]
        offset_s = place / SAMPLE_RATE
        values = pa.StructArray.from_arrays(
            [
                pa.array([offset_s + chunk.start_s for _, chunk in cut], pa.float64()),
                pa.array([channel for channel, _ in cut], pa.int32()),
                pa.array([chunk.has_speech for _, chunk in cut], pa.bool_()),
                _binary([chunk.clip.samples for _, chunk in cut]),
            ],
            fields=list(_CHUNK),
        )
        return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values, type=READ.field("chunks").type)


def chunk_of(row: pa.StructScalar) -> tuple[Chunk, int | None]:
    """A chunk of a row of READ, and its channel, where channels are split."""
    samples = np.frombuffer(row["samples"].as_buffer(), np.float32)
    return Chunk(row["start_s"].as_py(), AudioClip(samples), row["has_speech"].as_py()), row["channel"].as_py()


def _row(item: dict[str, Any], *, chunks: pa.Array, **measured: object) -> pa.Table:
    """What is read of an item, as a row of READ."""
    values = item | measured
    columns = [chunks if name == "chunks" else pa.array([values[name]], READ.field(name).type) for name in READ.names]
    return pa.table(columns, schema=READ)


def name_of(item: dict[str, Any]) -> str:
    """What messages call an item's recording: they begin with it."""
    return redact_uri(item["uri"]) if item["row"] is None else item["recording"]


def _clip(samples: np.ndarray) -> AudioClip:
    return AudioClip(np.ascontiguousarray(samples))


def _binary(arrays: Sequence[np.ndarray]) -> pa.Array:
    """float32 arrays as bytes, copied once."""
    offsets = np.concatenate([[0], np.cumsum([array.nbytes for array in arrays], dtype=np.int64)])
    data = np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(arrays), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )
