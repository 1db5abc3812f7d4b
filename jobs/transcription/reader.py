"""Decode work items and cut their audio into chunks for a model: the CPU side of the bulk pipeline, without Ray.

What goes wrong with one item is a value, its `error`.
"""

import contextlib
import functools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from graft.audio.audio_info import CONVERT, AudioTrack
from graft.audio.chunking import Chunk, Chunker, ChunkSettings, windows
from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.defects import AudioDefect, merge_defects
from graft.audio.spans import probe, read_span
from graft.audio.vad import SpeechSettings
from graft.data.dataset import CorpusFile, RowReader
from graft.errors import AudioError, DataError
from graft.imports import import_heavy
from graft.storage.locations import one_line_error, redact_uri
from graft.storage.source import AudioSource

from .work_items import ITEMS

FAULTS_IN_A_ROW = 3
"""Items in a row on which an engine or a reader may fail; when more do, the fault is its own and the run ends."""

LONE_CRASHES = 2
"""Crashes of processes while they read an item, after the first one of its batch, that make it poisoned. A killed node
counts as a crash, too."""
POISONED = (
    f"the decoder crashed on this file {LONE_CRASHES + 1} times; it is skipped: {CONVERT}, "
    "or take a smaller item_s if memory ran out"
)

KEYS = [(name, ITEMS.field(name).type) for name in ("id", "item", "attempt", "item_count")]
DEFECTS = pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("flag", pa.string())]))
MEASURED = [("error", pa.string()), ("defects", DEFECTS), ("duration_s", pa.float64()), ("read_s", pa.float64())]
_CHUNK = pa.struct(
    [("start_s", pa.float64()), ("channel", pa.int32()), ("has_speech", pa.bool_()), ("samples", pa.large_binary())]
)
READ = pa.schema([*KEYS, ("language", pa.string()), *MEASURED, ("chunks", pa.list_(_CHUNK))])
"""Schema of an item that was read. `error` is null or says in one line what failed, `defects` are what is wrong with
audio that was decoded all the same, `duration_s` is its length, `read_s` the CPU time in seconds."""
NO_CHUNKS = pa.array([[]], READ.field("chunks").type)


@dataclass(frozen=True)
class Reading:
    """How items become chunks: by the speech in them, or, where `speech` is None, as windows of all of their audio."""

    speech: SpeechSettings | None
    chunks: ChunkSettings
    channels: Literal["mix", "split"] = "mix"
    track: AudioTrack | None = None


WINDOWS = Reading(None, ChunkSettings(max_s=30.0))
"""All of the audio in windows of up to 30 s, the longest that Whisper takes; nobody looks for speech in it."""


class ItemReader:
    """Decode items and cut them into chunks, for Ray Data: rows of ITEMS -> rows of READ.

    Some files make a decoder crash, or take more memory than there is. Ray starts another process and gives it the same
    batch, without end. So a reader with a folder for notes writes there which batch it reads, and the notes of crashed
    processes stay. When a batch has crashed a process, its items are noted one by one, and an item that crashes its
    process LONE_CRASHES times more is poisoned: it becomes an error.
    """

    def __init__(self, reading: Reading, notes: Path | None = None) -> None:
        import_heavy("torch").set_num_threads(1)
        self._channels, self._track = reading.channels, reading.track
        self._chunker: Callable[[AudioClip], list[Chunk]] = (
            Chunker(reading.speech, reading.chunks)
            if reading.speech
            else functools.partial(windows, max_s=reading.chunks.max_s)
        )
        self._corpora = RowReader([])  # one reader for all parquet files, so that few row groups are held
        self._file_numbers: dict[CorpusFile, int] = {}  # a parquet file -> its place in the reader's list
        self._note = notes / uuid.uuid4().hex if notes else None
        self._crashes: Counter[str] = Counter()  # by what the crashed processes had noted
        for path in notes.iterdir() if notes else ():
            with contextlib.suppress(FileNotFoundError):  # the note of a living process, which has just finished
                self._crashes[path.read_text()] += 1
        self._faults = 0

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        items, note = batch.to_pylist(), self._note
        if note is None or not items:
            yield from map(self._read, items)
            return
        batch_note = f"batch of {items[0]['id']}"
        is_suspected = self._crashes[batch_note] > 0
        try:
            note.write_text(batch_note)
            for item in items:
                if is_suspected:
                    note.write_text(item["id"])
                is_poisoned = self._crashes[item["id"]] >= LONE_CRASHES
                row = _row(item, error=f"{name_of(item)}: {POISONED}") if is_poisoned else self._read(item)
                if is_suspected:  # the item is read; its row may wait long until Ray takes it
                    note.write_text(batch_note)
                yield row
        finally:
            note.unlink(missing_ok=True)

    def _read(self, item: dict[str, Any]) -> pa.Table:
        start, error, duration_s, chunks = time.process_time(), None, 0.0, NO_CHUNKS
        defects: Sequence[AudioDefect] = ()
        try:
            samples, start_sample, defects = self._decode(item)
            duration_s = len(samples) / SAMPLE_RATE
            chunks = self._cut(samples, start_sample)
            self._faults = 0
        except (AudioError, DataError) as fault:
            error = str(fault)
        except Exception as fault:
            self._faults += 1
            if self._faults > FAULTS_IN_A_ROW:
                raise
            error = f"{name_of(item)}: reading it failed: {type(fault).__name__}: {one_line_error(fault)}"
        read_s = time.process_time() - start
        return _row(item, error=error, defects=defects, duration_s=duration_s, read_s=read_s, chunks=chunks)

    def _decode(self, item: dict[str, Any]) -> tuple[np.ndarray, int, Sequence[AudioDefect]]:
        """Return an item's samples, (samples, channels), where in its recording the first is, and its defects."""
        defects: list[AudioDefect] = []
        source: AudioSource = item["uri"]
        name: str | None = None  # messages call it by its URI
        if item["row"] is not None:
            file = CorpusFile(item["uri"], item["audio_column"])
            number = self._file_numbers.setdefault(file, len(self._file_numbers))
            if number == len(self._corpora.files):
                self._corpora.files.append(file)
            source, _ = self._corpora.wav(number, item["row_group"], item["row"])
            name = name_of(item)
        rate = probe(source, name=name, track=self._track).rate if item["item_count"] > 1 else 0
        start, end = (None if second is None else round(second * rate) for second in (item["start_s"], item["end_s"]))
        how: dict[str, Any] = {"channels": self._channels, "track": self._track, "name": name, "defects": defects}
        blocks = list(read_span(source, start or 0, end, borders="quiet", **how))
        if not blocks:
            return np.zeros((0, 1), np.float32), 0, defects
        samples = np.concatenate([block.samples for block in blocks])
        return samples.reshape(len(samples), -1), blocks[0].start, defects

    def _cut(self, samples: np.ndarray, start_sample: int) -> pa.Array:
        """Cut every channel of (samples, channels) into chunks; returns them as one row of READ's `chunks`."""
        is_split = self._channels == "split"
        cut = [
            (number if is_split else None, chunk)
            for number, channel in enumerate(samples.T, start=1)
            for chunk in self._chunker(AudioClip(np.ascontiguousarray(channel)))
        ]
        offset_s = start_sample / SAMPLE_RATE
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
    """Return a chunk of READ, and the number of its channel, None where channels are mixed."""
    samples = np.frombuffer(row["samples"].as_buffer(), np.float32)
    return Chunk(row["start_s"].as_py(), AudioClip(samples), row["has_speech"].as_py()), row["channel"].as_py()


def name_of(item: dict[str, Any]) -> str:
    """Return the name of an item's recording with which messages about it begin."""
    return redact_uri(item["uri"]) if item["row"] is None else item["recording"]


def _row(
    item: dict[str, Any],
    *,
    error: str | None,
    defects: Sequence[AudioDefect] = (),
    duration_s: float = 0.0,
    read_s: float = 0.0,
    chunks: pa.Array = NO_CHUNKS,
) -> pa.Table:
    """Make the row of READ of one item."""
    found = [asdict(defect) for defect in merge_defects(defects)]
    values = item | {"error": error, "defects": found, "duration_s": duration_s, "read_s": read_s}
    columns = [chunks if name == "chunks" else pa.array([values[name]], READ.field(name).type) for name in READ.names]
    return pa.table(columns, schema=READ)


def _binary(arrays: Sequence[np.ndarray]) -> pa.Array:
    """Copy float32 arrays once, into an Arrow array of bytes."""
    offsets = np.concatenate([[0], np.cumsum([array.nbytes for array in arrays], dtype=np.int64)])
    data = np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(arrays), buffers)
