"""What Ray's own processes unpickle of a training run: where the work is, not the work itself.

Train's controller and Data's coordinators import the module of what they pass on. This one brings in neither torch nor transformers, which
saves each of those processes a few hundred MB and seconds.
"""

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graft.training.progress import latest_checkpoint, read_progress

SCHEDULING_S = 0.02


def train(config: dict[str, bytes]) -> None:
    """Run a training worker; `config` holds its Run, pickled."""
    from .worker import work

    work(pickle.loads(config["run"]))


def trainer(
    function: Any,
    config: dict[str, Any],
    dataset: Any,
    *,
    workers: int,
    gpu: bool,
    retries: int,
    storage: str,
    resource: str | None = None,
) -> Any:
    """Make a TorchTrainer whose workers get a dataset's blocks in order; `dataset` may be what makes one at every start of the workers."""
    import ray.train
    from ray.train.torch import TorchTrainer

    each = {"CPU": 1.0, **({"GPU": 1.0} if gpu else {}), **one_of(resource)}
    return TorchTrainer(
        function,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=each),
        run_config=ray.train.RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=retries),
        ),
        datasets={"train": dataset},
        dataset_config=in_order(),
    )


def in_order() -> Any:
    """How Ray Train shares out a dataset: block i goes to worker i mod workers."""
    import ray.train
    from ray.data import ExecutionOptions

    return ray.train.DataConfig(execution_options=ExecutionOptions(preserve_order=True))


def delivered_blocks() -> Any:
    """Iterate over the blocks that this worker is given."""
    import ray.train

    return blocks_of(ray.train.get_dataset_shard("train"))


def blocks_of(shard: Any) -> Any:
    """Iterate over the blocks of a worker's share, of which two are fetched ahead."""
    return shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)


@dataclass(frozen=True)
class Remaining:
    """Makes the dataset of what is not trained yet; Ray Train calls it whenever it starts the workers, at first or anew."""

    delivery: Any
    step_positions: np.ndarray
    checkpoints: str
    data_workers: int
    data_resource: str | None = None

    def __call__(self) -> Any:
        position = read_progress(latest_checkpoint(self.checkpoints)).position
        first = int(np.searchsorted(self.step_positions, position, side="right"))
        count = max(
            1, len(self.step_positions) - first
        )  # Ray makes no dataset of nothing, and workers that are done read none
        return planned_dataset(self.delivery, first, count, data_workers=self.data_workers, resource=self.data_resource)


def planned_dataset(
    delivery: Any,
    first: int,
    count: int,
    *,
    data_workers: int,
    most_tasks: int = 5000,
    resource: str | None = None,
    loader: Any = None,
) -> Any:
    """Make the Ray dataset of `count` batches of a delivery from the `first` on, in order, one a row and a block.

    `delivery` is a reference to a jobs.training.loader.Delivery, or to what a `loader` other than LoadBatches takes. With order preserved, block i
    reaches worker i mod workers. A task of the range, which fuses with a loader actor, makes a block of each batch that it loads: with a
    task a batch, Ray would take a millisecond for each of a large run's batches before the first is loaded.
    """
    import ray

    dataset = ray.data.range(count, override_num_blocks=min(count, most_tasks))
    dataset.context.target_max_block_size = 1  # bytes: never two batches in a block
    callbacks: list[Any] = [SchedulerThrottle]  # of no class of Ray's, which this module does not import
    dataset.context.custom_execution_callback_classes = callbacks
    return dataset.map_batches(
        loader or LoadBatches,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=data_workers),
        num_cpus=1,
        resources=one_of(resource) or None,
        fn_constructor_args=(delivery, first),
    )


def one_of(resource: str | None) -> dict[str, float]:
    """What to ask of a cluster for one of a resource of its own."""
    return {resource: 1.0} if resource else {}


class SchedulerThrottle:
    """Lets Ray Data's scheduling loop, whose callback it is, turn no oftener than every SCHEDULING_S.

    While loaded batches wait for a slower training step, the loop would turn without a pause and take half a CPU from the loaders.
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
    """A Ray Data actor around jobs.training.loader's BatchLoader; `delivery` is a reference to its Delivery, `first` what number 0 stands for."""

    def __init__(self, delivery: Any, first: int):
        import ray
        import torch

        from .loader import BatchLoader

        torch.set_num_threads(1)  # Ray counts one core for it
        self.first = first
        self.loader = BatchLoader(ray.get(delivery))

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number in block["id"]:
            yield self.loader.block(self.first + int(number))
