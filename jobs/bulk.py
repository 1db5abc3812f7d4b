"""The bulk pipeline on Ray Data: work items -> decoded and cut on CPUs -> heard by engines -> parquet, each item exactly once.

    plan.parquet -> ItemReader (CPU actors) -> ItemListener (a Transcriber each) -> items/*.parquet
                                                                     \\-> done/: the ids of all that is written

Whatever dies, the next run reads the plan again and leaves out what done/ has. What goes wrong with an item is a value: its `error`.
"""

import asyncio
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from graft.audio import SAMPLE_RATE, AudioClip
from graft.chunking import Chunk, Chunker, ChunkSettings
from graft.corpus import CorpusFile, RowReader
from graft.errors import AudioError, DataError, GraftError
from graft.files import Source
from graft.recordings import probe, read_span
from graft.speech import SpeechSettings
from graft.transcriber import Transcriber
from graft.transcript import Segment
from jobs.items import ITEMS

GIB = 2**30
CALLS = 3
"""Batches that a listener hears at a time: while the last answers of one are decoded, others fill the engine; two end together at times."""
FAULTS_IN_A_ROW = 3
"""Items on which the engine may fail one after the other: more are the engine's fault, not theirs."""

WORDS = pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("text", pa.string())]))
SEGMENTS = pa.list_(
    pa.struct(
        [
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("text", pa.string()),
            ("mean_logprob", pa.float64()),
            ("flags", pa.list_(pa.string())),
            ("words", WORDS),
            ("channel", pa.int32()),
        ]
    )
)
_KEYS = [(name, ITEMS.field(name).type) for name in ("id", "item", "attempt", "item_count")]
_MEASURED = [("error", pa.string()), ("duration_s", pa.float64()), ("read_s", pa.float64())]
_CHUNK = pa.struct([("start_s", pa.float64()), ("channel", pa.int32()), ("has_speech", pa.bool_()), ("samples", pa.large_binary())])
READ = pa.schema([*_KEYS, *_MEASURED, ("chunks", pa.list_(_CHUNK))])
RESULTS = pa.schema([*_KEYS, *_MEASURED, ("heard_s", pa.float64()), ("segments", SEGMENTS)])
"""What is written of an item: `error` is null or says in a line what failed, `duration_s` are the seconds of audio that were decoded,
`read_s` and `heard_s` the seconds that reading (CPU) and hearing (beside other items) took."""


@dataclass(frozen=True)
class Reading:
    """How items become chunks."""

    speech: SpeechSettings
    chunks: ChunkSettings
    channels: Literal["mix", "split"] = "mix"
    audio_column: str = "wav"


class ItemReader:
    """Decodes items and cuts them into chunks; Ray Data's CPU side. Rows of ITEMS -> rows of READ."""

    def __init__(self, reading: Reading) -> None:
        import torch

        torch.set_num_threads(1)
        self._reading = reading
        self._chunker = Chunker(reading.speech, reading.chunks)
        self._rows: dict[str, RowReader] = {}

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for item in batch.to_pylist():
            yield self._read(item)

    def _read(self, item: dict[str, Any]) -> pa.Table:
        start, error, duration_s, chunks = time.process_time(), None, 0.0, pa.array([[]], READ.field("chunks").type)
        try:
            channels, place = self._decode(item)
            duration_s = channels.shape[0] / SAMPLE_RATE
            chunks = self._cut(channels, place)
        except (AudioError, DataError) as fault:
            error = str(fault)
        measured = {"error": error, "duration_s": duration_s, "read_s": time.process_time() - start}
        values = {**{name: item[name] for name, _ in _KEYS}, **measured}
        columns = [chunks if name == "chunks" else pa.array([values[name]], READ.field(name).type) for name in READ.names]
        return pa.table(columns, schema=READ)

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

    def _source(self, item: dict[str, Any]) -> tuple[Source, str | None]:
        if item["row"] is None:
            return item["uri"], None
        reader = self._rows.setdefault(item["uri"], RowReader([CorpusFile(item["uri"], self._reading.audio_column)]))
        audio, path = reader.wav(0, item["row_group"], item["row"])
        return audio, path or item["recording"]

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


class ItemListener:
    """Hears the chunks of items with a Transcriber that `opener` opens; rows of READ -> rows of RESULTS.

    Ray may call it from several threads: their chunks share the engine's batches, so the end of one batch does not idle.
    """

    def __init__(self, opener: Callable[[], Transcriber], wording: dict[str, Any]) -> None:
        self._transcriber = opener()
        self._wording = wording
        self._faults = 0

    def __call__(self, batch: pa.Table) -> pa.Table:
        return asyncio.run(self._hear_all(batch))

    async def _hear_all(self, batch: pa.Table) -> pa.Table:
        rows = batch.select([name for name in READ.names if name != "chunks"]).to_pylist()
        heard = await asyncio.gather(*map(self._hear, batch["chunks"]))
        results = [
            {**row, "error": row["error"] or error, "heard_s": seconds, "segments": [asdict(segment) for segment in segments]}
            for row, (segments, error, seconds) in zip(rows, heard, strict=True)
        ]
        return pa.Table.from_pylist(results, schema=RESULTS)

    async def _hear(self, chunks: pa.ListScalar) -> tuple[Sequence[Segment], str | None, float]:
        start = time.monotonic()
        cut = [_chunk(chunk) for chunk in chunks.values or []]
        try:
            segments = await self._transcriber.transcribe_chunks([chunk for chunk, _ in cut], **self._wording)
        except GraftError:
            raise  # the recipe's fault, not the item's
        except Exception as error:
            self._faults += 1
            if self._faults > FAULTS_IN_A_ROW:
                raise
            return [], f"the engine failed: {type(error).__name__}: {' '.join(str(error).split())}", time.monotonic() - start
        self._faults = 0
        return (
            [replace(segment, channel=channel) for segment, (_, channel) in zip(segments, cut, strict=True)],
            None,
            time.monotonic() - start,
        )


@dataclass(frozen=True)
class Workers:
    """What the pipeline takes of the cluster."""

    readers: int
    listeners: int
    cpus_per_listener: int
    gpus_per_listener: float
    items_per_batch: int


def transcribe_items(
    plan: Path, home: Path, reading: Reading, opener: Callable[[], Transcriber], wording: dict[str, Any], workers: Workers
) -> None:
    """Transcribe the items of a plan that have no result in `home` yet: home/items/*.parquet. Raises what the engine does, OutputError."""
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    for name in ("items", "done"):
        (home / name).mkdir(exist_ok=True)
    context = ray.data.DataContext.get_current().copy()
    context.use_datasource_v2 = False  # it starts eight processes, to read the footer of one file
    context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=str(home / "done"), delete_checkpoint_on_success=False)
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*logical plan doesn't support")  # without checkpoints a run would begin anew
        planned = ray.data.read_parquet(str(plan))
        # strict, or what is left of each block is a batch of its own
        items = planned.repartition(target_num_rows_per_block=workers.items_per_batch, strict=True)
        read = items.map_batches(
            ItemReader,
            fn_constructor_args=[reading],
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.readers),
            num_cpus=1,
            memory=GIB,
        )
        heard = read.map_batches(
            ItemListener,
            fn_constructor_args=[opener, wording],
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=workers.listeners,
                max_concurrent_calls_per_actor=CALLS,
                enable_true_multi_threading=True,
                max_tasks_in_flight_per_actor=CALLS + 2,
            ),
            num_cpus=workers.cpus_per_listener,
            num_gpus=workers.gpus_per_listener,
        )
        heard.write_parquet(str(home / "items"))


def _clip(samples: np.ndarray) -> AudioClip:
    return AudioClip(np.ascontiguousarray(samples))


def _binary(arrays: Sequence[np.ndarray]) -> pa.Array:
    """float32 arrays as bytes, copied once."""
    offsets = np.concatenate([[0], np.cumsum([array.nbytes for array in arrays], dtype=np.int64)])
    data = np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(arrays), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _chunk(chunk: pa.StructScalar) -> tuple[Chunk, int | None]:
    samples = np.frombuffer(chunk["samples"].as_buffer(), np.float32)
    return Chunk(chunk["start_s"].as_py(), AudioClip(samples), chunk["has_speech"].as_py()), chunk["channel"].as_py()
