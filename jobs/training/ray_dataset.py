"""Stream planned batches through Ray Data: an ordered dataset with one batch per block, and the loading actors.

Ray Train's controller and Ray Data's coordinators import this module to unpickle its classes, so it imports neither
torch nor transformers: that saves each of those processes several hundred MB of memory and seconds of start-up.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graft.training.progress import latest_checkpoint, read_progress

SCHEDULING_S = 0.02
"""Shortest time in seconds between two turns of Ray Data's scheduling loop."""


def iter_blocks(shard: Any) -> Any:
    """Iterate over the blocks of a worker's share of a dataset; the next two are fetched ahead."""
    return shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)


@dataclass(frozen=True)
class RemainingBatches:
    """Makes the dataset of the batches after the newest checkpoint; Ray Train calls it whenever it starts workers."""

    spec: Any
    step_positions: np.ndarray
    checkpoints: str
    data_workers: int
    data_resource: str | None = None

    def __call__(self) -> Any:
        position = read_progress(latest_checkpoint(self.checkpoints)).position
        first = int(np.searchsorted(self.step_positions, position, side="right"))
        # Ray refuses an empty dataset; workers whose run is finished read none of the one batch that is left.
        count = max(1, len(self.step_positions) - first)
        return planned_dataset(self.spec, first, count, data_workers=self.data_workers, resource=self.data_resource)


def planned_dataset(
    spec: Any,
    first: int,
    count: int,
    *,
    data_workers: int,
    most_tasks: int = 5000,
    resource: str | None = None,
    loader: Any = None,
) -> Any:
    """Make the Ray dataset of `count` planned batches from number `first` on, in order, one batch per row and block.

    `spec` is a reference to a jobs.training.loader.LoaderSpec, or to the argument of another `loader` than
    LoadBatches. With ExecutionOptions(preserve_order=True), block i reaches worker i modulo the number of workers. The
    range has at most `most_tasks` tasks: with one task for each batch, Ray would spend a millisecond on every batch of
    a large run before it loads the first.
    """
    import ray

    dataset = ray.data.range(count, override_num_blocks=min(count, most_tasks))
    dataset.context.target_max_block_size = 1  # byte: Ray then never puts two batches into one block
    callbacks: list[Any] = [SchedulerThrottle]  # Ray's own base class would import ray here
    dataset.context.custom_execution_callback_classes = callbacks
    return dataset.map_batches(
        loader or LoadBatches,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=data_workers),
        num_cpus=1,
        resources={resource: 1.0} if resource else None,
        fn_constructor_args=(spec, first),
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


class LoadBatches:
    """A Ray Data actor around BatchLoader; row 0 of the dataset is batch number `first`."""

    def __init__(self, spec: Any, first: int):
        import ray
        import torch

        from .loader import BatchLoader

        torch.set_num_threads(1)  # the actor reserves one core
        self.first = first
        self.loader = BatchLoader(ray.get(spec))

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number in block["id"]:
            yield self.loader.block(self.first + int(number))
