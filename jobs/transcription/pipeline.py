"""The bulk pipeline on Ray Data: work items -> decoded and cut on CPUs -> heard by engines -> parquet, each item exactly once.

    plan.parquet -> ItemReader (CPU actors) -> ItemTranscriber (a Transcriber each) -> items/*.parquet
                                                                     \\-> done/: the ids of all that is written

Whatever dies, the next run reads the plan again and leaves out what done/ has. What goes wrong with an item is a value: its `error`.
"""

import asyncio
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from graft.errors import GraftError
from graft.inference.transcriber import Transcriber
from graft.inference.transcript import Segment
from graft.storage.locations import one_line_error

from .reader import FAULTS_IN_A_ROW, KEYS, MEASURED, READ, ItemReader, Reading, chunk_of

GIB = 2**30
CALLS = 3
"""Batches that a listener hears at a time: while the last answers of one are decoded, others fill the engine; two end together at times."""

GIVES_BACK = {"env_vars": {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}}
"""What workers' processes start with, or glibc keeps the megabytes that features and samples have left: 700 MB of 2,300 on ten hours."""

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
RESULTS = pa.schema([*KEYS, *MEASURED, ("heard_s", pa.float64()), ("segments", SEGMENTS)])
"""What is written of an item: `error` is null or says in a line what failed, `duration_s` are the seconds of audio that were decoded,
`read_s` and `heard_s` the seconds that reading (CPU) and hearing (beside other items) took."""


class ItemTranscriber:
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
            {
                **row,
                "error": row["error"] or error,
                "heard_s": seconds,
                "segments": [asdict(segment) for segment in segments],
            }
            for row, (segments, error, seconds) in zip(rows, heard, strict=True)
        ]
        return pa.Table.from_pylist(results, schema=RESULTS)

    async def _hear(self, chunks: pa.ListScalar) -> tuple[Sequence[Segment], str | None, float]:
        start = time.monotonic()
        cut = [chunk_of(chunk) for chunk in chunks.values or []]
        try:
            segments = await self._transcriber.transcribe_chunks([chunk for chunk, _ in cut], **self._wording)
        except GraftError:
            raise  # the recipe's fault, not the item's
        except Exception as error:
            self._faults += 1
            if self._faults > FAULTS_IN_A_ROW:
                raise
            return [], f"the engine failed: {type(error).__name__}: {one_line_error(error)}", time.monotonic() - start
        if cut:  # the engine was asked
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
    plan: Path,
    home: Path,
    reading: Reading,
    opener: Callable[[], Transcriber],
    wording: dict[str, Any],
    workers: Workers,
) -> None:
    """Transcribe the items of a plan that have no result in `home` yet: home/items/*.parquet. Raises what the engine does."""
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    for name in ("items", "done", "reading"):
        (home / name).mkdir(exist_ok=True)
    context = ray.data.DataContext.get_current().copy()
    context.use_datasource_v2 = False  # it starts eight processes, to read the footer of one file
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(home / "done"), delete_checkpoint_on_success=False
    )
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*logical plan doesn't support"
        )  # without checkpoints a run would begin anew
        planned = ray.data.read_parquet(str(plan))
        # strict, or what is left of each block is a batch of its own
        items = planned.repartition(target_num_rows_per_block=workers.items_per_batch, strict=True)
        read = items.map_batches(
            ItemReader,
            fn_constructor_args=[reading, home / "reading"],
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.readers),
            num_cpus=1,
            memory=GIB,
            runtime_env=GIVES_BACK,
        )
        heard = read.map_batches(
            ItemTranscriber,
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
            runtime_env=GIVES_BACK,
        )
        heard.write_parquet(str(home / "items"))
