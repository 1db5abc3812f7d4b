"""Stream planned batches through Ray Data: an ordered dataset with one batch per block, and its actors.

    windows -> ReadWindows, one actor -> a block for each batch -> LoadBatches, several actors -> split to the workers

Ray Train's controller and Ray Data's coordinators import this module to unpickle its classes, so it imports neither
torch nor transformers: that saves each of those processes several hundred MB of memory and seconds of start-up.
"""

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graft.training.progress import latest_checkpoint, read_progress

BATCH = "batch"
READER_CPUS = 0
"""CPUs that the reader reserves: it mostly waits for files, and a run fits into as many CPUs as workers and loaders."""
SCHEDULING_S = 0.02
"""Shortest time in seconds between two turns of Ray Data's scheduling loop."""


def iter_blocks(shard: Any) -> Any:
    """Iterate over the blocks of a worker's share of a dataset; the next two are fetched ahead."""
    return shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)


@dataclass(frozen=True)
class DataStep:
    """An actor class of the stream, and its argument, mostly a reference."""

    actor: Any
    spec: Any


@dataclass(frozen=True)
class RemainingBatches:
    """Makes the dataset of the batches after the newest checkpoint; Ray Train calls it whenever it starts workers."""

    reader: DataStep
    loader: DataStep
    step_positions: np.ndarray
    windows: np.ndarray
    checkpoints: str
    data_workers: int
    data_resource: str | None = None

    def __call__(self) -> Any:
        position = read_progress(latest_checkpoint(self.checkpoints)).position
        first = int(np.searchsorted(self.step_positions, position, side="right"))
        # Ray refuses an empty dataset; workers whose run is finished read none of the one batch that is left.
        first = min(first, len(self.windows) - 1)
        return planned_dataset(
            self.reader,
            self.loader,
            range(int(self.windows[first]), int(self.windows[-1]) + 1),
            first=first,
            data_workers=self.data_workers,
            resource=self.data_resource,
        )


def planned_dataset(
    reader: DataStep,
    loader: DataStep,
    windows: range,
    *,
    first: int = 0,
    data_workers: int,
    most_tasks: int = 5000,
    resource: str | None = None,
) -> Any:
    """Make the Ray dataset of the planned batches of windows, from batch number `first` on, in order.

    A reader fetches window after window and yields a block for each batch; `data_workers` loaders make one each of
    them. With ExecutionOptions(preserve_order=True), block i reaches worker i modulo the number of workers. The range
    has at most `most_tasks` tasks: with one for each window, Ray would spend a millisecond on every window of a large
    run before the first is read.
    """
    import ray
    from ray.data._internal.datasource.range_datasource import RangeDatasource

    # ray.data.range itself, whose tasks each wait for a CPU: a run would stall where workers and loaders have them all.
    dataset = ray.data.read_datasource(
        RangeDatasource(len(windows), column_name="id"),
        num_cpus=READER_CPUS,
        override_num_blocks=min(len(windows), most_tasks),
    )
    dataset.context.target_max_block_size = 1  # byte: Ray then never puts two batches into one block
    callbacks: list[Any] = [SchedulerThrottle]  # Ray's own base class would import ray here
    dataset.context.custom_execution_callback_classes = callbacks
    resources = {resource: 1.0} if resource else None
    read = dataset.map_batches(
        reader.actor,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=READER_CPUS,
        fn_constructor_args=(reader.spec, windows.start, first),
    )
    return read.map_batches(
        loader.actor,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=data_workers),
        num_cpus=1,
        resources=resources,
        fn_constructor_args=(loader.spec,),
    )


class SchedulerThrottle:
    """A callback that limits Ray Data's scheduling loop to one turn every SCHEDULING_S seconds.

    While loaded batches wait for a slower training step, the loop would otherwise spin and take half a CPU from the
    loaders.
    """

    def __init__(self) -> None:
        self.turned_s = time.monotonic()

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self.turned_s + SCHEDULING_S - time.monotonic()))
        self.turned_s = time.monotonic()

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


class ReadWindows:
    """A Ray Data actor around AheadReader; row 0 of the dataset is window number `first_window`."""

    def __init__(self, spec: Any, first_window: int, first: int):
        import ray

        from .reader import AheadReader

        self.first_window = first_window
        self.reader = AheadReader(ray.get(spec), first)

    def __call__(self, block: dict[str, Any]) -> Iterator[Any]:
        for number in block["id"]:
            for batch in self.reader.window(self.first_window + int(number)):
                yield pickled_block(batch)


def pickled_block(batch: Any) -> Any:
    """Put a batch into a block of one row."""
    import pyarrow as pa

    return pa.table({BATCH: pa.array([pickle.dumps(batch, protocol=5)], pa.large_binary())})


class LoadBatches:
    """A Ray Data actor around BatchLoader, which makes the batches that were read."""

    def __init__(self, spec: Any):
        import ray
        import torch

        from .loader import BatchLoader

        torch.set_num_threads(1)  # the actor reserves one core
        self.loader = BatchLoader(ray.get(spec))

    def __call__(self, block: Any) -> Iterator[dict[str, Any]]:
        for batch in block[BATCH]:
            yield self.loader.block(pickle.loads(batch.as_buffer()))
