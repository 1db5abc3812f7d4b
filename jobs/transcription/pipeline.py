"""Run the bulk pipeline on Ray Data: read and cut work items on CPUs, transcribe them, write each result once.

    left.parquet -> ItemReader (CPU actors) -> ItemTranscriber (one model each) -> items/*.parquet
                                                                          \\-> done/: the ids of all that is written

left.parquet holds the items of the plan whose ids are not in done/ yet. What goes wrong with one item is a
value, its `error`; a model that cannot be opened ends the run.
"""

import asyncio
import functools
import math
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import graft
from graft.audio.chunking import Chunk, windows
from graft.audio.defects import LOSSES
from graft.checkpoints.names import absolute_checkpoint
from graft.data.dataset import RowTable
from graft.errors import GraftError, ModelError
from graft.inference.segments import Segment
from graft.storage.atomic import atomic_file
from graft.storage.locations import one_line_error

from ..common.cli import user_message
from . import ClipTranscript
from .assembly import (
    PLAN_FILE,
    SEGMENTS,
    join_errors,
    join_items,
    open_results,
    plan_parts,
    read_index,
    recordings_in,
    with_files,
)
from .discovery import recordings_of_rows
from .progress import BulkProgress
from .reader import FAULTS_IN_A_ROW, KEYS, MEASURED, READ, ItemReader, Reading, chunk_of
from .work_items import durations, plan_items

if TYPE_CHECKING:
    from graft.inference.transcriber import Transcriber

GIB = 2**30
CONCURRENT_BATCHES = 3
"""Batches that a worker transcribes at a time. The last answers of a batch leave slots of the engine free, which the
next batches fill; two batches may end together."""

LEFT_FILE = "left.parquet"
"""The items of the plan that had no result when the run began."""
NOTES_FOLDER = "reading"
"""Folder beside the results for the notes of readers on what they read."""

MALLOC_ENV = {"env_vars": {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}}
"""Settings of glibc for the workers' processes. Without them it keeps the memory of features and samples that were
freed: 700 MB of 2,300 MB on ten hours of audio."""

PER_BLOCK: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "runtime_env": MALLOC_ENV}
"""A call of both steps takes a whole block, which is a batch of items."""

RESULTS = pa.schema(
    [
        *KEYS,
        *MEASURED,
        ("language", pa.string()),
        ("started_at", pa.float64()),
        ("heard_s", pa.float64()),
        ("segments", SEGMENTS),
    ]
)
"""The result of an item. `error` is null or says in one line what failed; `defects` are what is wrong with audio that
was decoded all the same; `duration_s` is its length; `read_s` is the CPU time of reading; `language` is the one that
was named or found; `started_at` (Unix time) and `heard_s` are when transcription began and how many seconds it took,
beside other items."""


class ChunkTranscriber(Protocol):
    """A model that transcribes chunks, called from several threads and event loops; graft's Transcriber is one."""

    @property
    def transcribe_chunks(self) -> Callable[..., Awaitable[Sequence[Segment]]]:
        """Chunks that are cut already, and options -> a segment for each, in their order."""

    @property
    def find_language(self) -> Callable[[Sequence[Chunk]], Awaitable[str | None]]:
        """The first chunks of a recording -> the code of its language, where the model finds it out."""


Opener = Callable[[], ChunkTranscriber]


class ItemTranscriber:
    """Transcribe the chunks of items with the model that `opener` opens: rows of READ -> rows of RESULTS.

    Ray calls it from several threads, whose chunks share the engine's batches. A GraftError of the opener is raised at
    the first call: an actor that fails while it starts makes Ray print several tracebacks.
    """

    def __init__(self, opener: Opener, options: dict[str, Any]) -> None:
        self._options = options
        self._faults = 0
        self._model: ChunkTranscriber | GraftError
        try:
            self._model = opener()
        except GraftError as error:
            self._model = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if isinstance(self._model, GraftError):
            raise self._model
        return asyncio.run(self._transcribe_batch(self._model, batch))

    async def _transcribe_batch(self, model: ChunkTranscriber, batch: pa.Table) -> pa.Table:
        rows = batch.select([name for name in READ.names if name != "chunks"]).to_pylist()
        items = zip(batch["chunks"], (row["language"] for row in rows), strict=True)
        results = await asyncio.gather(*(self._transcribe_item(model, *item) for item in items))
        for row, result in zip(rows, results, strict=True):
            row |= result | {"error": row["error"] or result["error"]}
        return pa.Table.from_pylist(rows, schema=RESULTS)

    async def _transcribe_item(
        self, model: ChunkTranscriber, chunks: pa.ListScalar, language: str | None
    ) -> dict[str, Any]:
        """Return an item's `segments`, `language`, `error`, `started_at` and `heard_s`."""
        started_at, start = time.time(), time.monotonic()
        cut = [chunk_of(chunk) for chunk in chunks.values or []]
        language = language or self._options.get("language")
        segments: Sequence[Segment] = ()
        error = None
        try:
            language = language or await model.find_language([chunk for chunk, _ in cut])
            options = self._options | ({"language": language} if language else {})
            segments = await model.transcribe_chunks([chunk for chunk, _ in cut], **options)
        except GraftError:
            raise  # the recipe is wrong, not the item
        except Exception as fault:
            self._faults += 1
            if self._faults > FAULTS_IN_A_ROW:
                raise
            error, cut = f"the engine failed: {type(fault).__name__}: {one_line_error(fault)}", []
        else:
            self._faults = 0 if cut else self._faults  # an item without chunks does not reach the engine
        return {
            "error": error,
            "language": language,
            "started_at": started_at,
            "heard_s": time.monotonic() - start,
            "segments": [
                asdict(replace(segment, channel=channel)) for segment, (_, channel) in zip(segments, cut, strict=True)
            ],
        }


@dataclass(frozen=True)
class Workers:
    """The processes of a run: up to `readers` that each take one CPU, and `transcribers` that each open the model."""

    readers: int
    transcribers: int
    cpus_per_transcriber: int
    gpus_per_transcriber: float
    items_per_batch: int
    logical_cpu: float = 1.0
    """CPUs that are reserved in the cluster for each CPU of a process: under one where the cluster is so small that
    nothing would be left to Ray's own tasks."""

    @property
    def cpus(self) -> int:
        """CPUs of all of them, without those of Ray's own tasks."""
        return self.readers + self.transcribers * self.cpus_per_transcriber

    def reserved_cpus(self, count: int) -> float:
        """CPUs of the cluster that a process with so many CPUs reserves; Ray takes no fractions over one."""
        share = count * self.logical_cpu
        return share if share < 1 else math.floor(share)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Arguments of model_opener: a worker's threads, and whether it has a GPU."""
        return {"threads": self.cpus_per_transcriber, "gpu": self.gpus_per_transcriber > 0}


@dataclass(frozen=True)
class Pipeline:
    """How items are read, which model transcribes them, and on how many processes."""

    reading: Reading
    opener: Opener
    workers: Workers
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of every call of the model's `transcribe_chunks`, such as the instruction."""


def transcribe_items(plan: Path, home: Path, pipeline: Pipeline) -> None:
    """Transcribe the items of a plan that have no result in `home` yet, and write home/items/*.parquet.

    Raises ModelError for a model that cannot be opened or does not take the options, and the engine's exception where
    it fails on several items one after the other.
    """
    import ray.data
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.checkpoint.checkpoint_filter import CheckpointManager

    class PlannedCheckpoints(CheckpointManager):
        """Removes half-written results. Finished items are left out by the plan, not by an actor of Ray's own."""

        def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> Any:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
            return None, 0

    for name in ("items", "done", NOTES_FOLDER):
        (home / name).mkdir(exist_ok=True)
    context = ray.data.DataContext.get_current().copy()
    context.use_datasource_v2 = False  # it starts eight processes to read the footer of one file
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=str(home / "done"),
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=PlannedCheckpoints,
    )
    workers = pipeline.workers
    left = home / LEFT_FILE
    left_count = _write_unfinished(plan, left, home)
    batch_count = math.ceil(left_count / workers.items_per_batch)
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Without checkpoints a run that is started again would begin anew.
        warnings.filterwarnings("error", message=".*logical plan doesn't support")
        planned = ray.data.read_parquet(str(left), num_cpus=0)
        # strict, or what is left of each block is a batch of its own
        items = planned.repartition(target_num_rows_per_block=workers.items_per_batch, strict=True)
        read = items.map_batches(
            ItemReader,
            fn_constructor_args=[pipeline.reading, home / NOTES_FOLDER],
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.readers),
            num_cpus=workers.reserved_cpus(1),
            memory=GIB,
            **PER_BLOCK,
        )
        transcribed = read.map_batches(
            ItemTranscriber,
            fn_constructor_args=[pipeline.opener, pipeline.options],
            compute=ray.data.ActorPoolStrategy(
                size=min(workers.transcribers, batch_count),
                max_concurrent_calls_per_actor=CONCURRENT_BATCHES,
                enable_true_multi_threading=True,
                max_tasks_in_flight_per_actor=CONCURRENT_BATCHES + 2,
            ),
            num_cpus=workers.reserved_cpus(workers.cpus_per_transcriber),
            num_gpus=workers.gpus_per_transcriber,
            **PER_BLOCK,
        )
        try:
            # Reading and writing reserve no CPU, as they mostly wait for the disk: in a small cluster, whose CPUs the
            # other processes take, results would be written only when all are there.
            transcribed.write_parquet(
                str(home / "items"),
                ray_remote_args={"num_cpus": 0},
                concurrency=min(batch_count, max(2, workers.transcribers)),  # Ray warns of more than there are batches
            )
        except Exception as error:
            if message := user_message(error):
                raise ModelError(message) from error
            raise


def _write_unfinished(plan: Path, left: Path, home: Path) -> int:
    """Write the items of a plan that have no result in `home` yet, and return how many there are."""
    done = read_index(home)["id"]
    count = 0
    with (
        atomic_file(left) as temporary,
        pq.ParquetFile(plan) as file,
        pq.ParquetWriter(temporary, file.schema_arrow) as writer,
    ):
        for batch in file.iter_batches():
            unfinished = batch.filter(pc.invert(pc.is_in(batch["id"], done)))
            writer.write_batch(unfinished)
            count += len(unfinished)
    return count


def run_plan(
    plan: pa.Table,
    done: pa.Table,
    home: Path,
    pipeline: Pipeline,
    transcribe: Callable[[Path, Path, Pipeline], None] = transcribe_items,
) -> float | None:
    """Transcribe the items of a plan that are not `done`, the index of `home`, and print how it goes.

    `transcribe` does so, by default on Ray. Returns the seconds of audio for each second of this run, None where
    nothing was left to do. Raises as transcribe_items.
    """
    with atomic_file(home / PLAN_FILE) as temporary:
        pq.write_table(plan, temporary, row_group_size=50_000)
    if pc.all(pc.is_in(plan["id"], done["id"])).as_py():
        return None
    with BulkProgress(plan, done, home) as progress:
        transcribe(home / PLAN_FILE, home, pipeline)
    return progress.rtfx


def transcribe_rows(rows: RowTable, home: Path, pipeline: Pipeline) -> Iterator[ClipTranscript]:
    """Transcribe the rows of a corpus and yield a transcript for each, in their order; no row may stand there twice.

    `home` is a folder that every node sees. A run that was cut off goes on there. Raises as transcribe_items.
    """
    home.mkdir(exist_ok=True)
    plan = plan_rows(rows)
    run_plan(plan, open_results(home), home, pipeline)
    for part in plan_parts(with_files(plan, read_index(home))):
        for items in recordings_in(part, home / "items"):
            yield clip_transcript(items)


def plan_rows(rows: RowTable) -> pa.Table:
    """Return the work items of the rows of a corpus, each a recording of its own, in their order."""
    places = zip(rows.file.tolist(), rows.row_group.tolist(), rows.row.tolist(), strict=True)
    versions = pa.array([f"{rows.files[file].uri}:{group}:{row}" for file, group, row in places])
    return plan_items(recordings_of_rows(rows, versions), probe=durations)


def clip_transcript(items: Sequence[dict[str, Any]]) -> ClipTranscript:
    """Join the items of a clip, with their results."""
    transcript = join_items(items)
    # Characters stand for tokens, whose number is not kept; one more stands for the end of a segment's answer.
    known = [one for one in transcript.segments if one.mean_logprob is not None]
    weights = [len(one.text) + 1 for one in known]
    mean = float(np.average([one.mean_logprob for one in known], weights=weights)) if known else None
    # A text must fit all of its clip, so a clip of which a part is lost has failed.
    defects = {defect.flag for defect in transcript.defects}
    lost = sorted(defects & LOSSES)
    error = join_errors(items) or (f"the audio is incomplete ({', '.join(lost)})" if lost else None)
    return ClipTranscript(
        transcript.text,
        error,
        transcript.duration_s,
        mean,
        flags=tuple(sorted(defects | {flag for segment in transcript.segments for flag in segment.flags})),
        started_at=min((item["started_at"] for item in items if item["started_at"] is not None), default=None),
        transcription_s=sum(item["heard_s"] or 0.0 for item in items),
    )


def languages_for_model(rows: RowTable, model: str) -> RowTable:
    """Return rows with the languages that a model's prompt is to name; a model that is not told any gets none.

    Raises ModelError where the model does not know one of them.
    """
    counts = np.bincount(rows.language, minlength=len(rows.languages)).tolist()
    is_told = check_languages(dict(zip(rows.languages, counts, strict=True)), model)
    return rows if is_told else rows.without_languages()


def check_languages(counts: Mapping[str, int], model: str) -> bool:
    """Tell whether a model's prompt can name languages, of which there are so many recordings; "" is none.

    Raises ModelError where the model does not know one of them.
    """
    from graft.checkpoints.loading import open_speech_processor

    known = open_speech_processor(model).languages
    for code, count in counts.items() if known else ():
        if code and count and code not in known:
            which = "1 recording is" if count == 1 else f"{count} recordings are"
            raise ModelError(
                f"{which} in {code}, and {model} knows {', '.join(sorted(known))}: "
                "choose another model, or leave these out"
            )
    return bool(known)


def model_opener(model: str, *, threads: int, gpu: bool, **settings: Any) -> Opener:
    """Return a function that opens a model in a worker; `settings` are graft.load's."""
    device = "cuda" if gpu else "cpu"
    return functools.partial(_open_model, absolute_checkpoint(model), threads=threads, device=device, **settings)


def _open_model(model: str, **settings: Any) -> "Transcriber":
    opened: Transcriber = graft.load(model, chunker=windows, **settings)
    return opened  # readers cut the audio; the chunker is not called
