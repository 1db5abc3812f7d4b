"""Start training workers with Ray Train: the function that each worker runs, and the TorchTrainer that starts it.

Ray Train's controller imports this module to unpickle the function, so it imports neither torch nor transformers: that
saves the controller several hundred MB of memory and seconds of start-up.
"""

import pickle
import time
from typing import Any


def run_worker(config: dict[str, bytes]) -> None:
    """Run one training worker; `config["run"]` is its pickled jobs.training.worker.Run."""
    from .worker import work

    work(pickle.loads(config["run"]))


def make_trainer(
    worker_function: Any,
    config: dict[str, Any],
    dataset: Any,
    *,
    workers: int,
    gpu: bool,
    retries: int,
    storage: str,
    resource: str | None = None,
) -> Any:
    """Make a TorchTrainer whose workers receive a dataset's blocks in order.

    `dataset` is a Ray dataset, or a function without arguments that makes one; Ray Train calls it whenever it starts
    the workers. `resource` names a custom resource of the cluster of which each worker takes one.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    worker_resources = {"CPU": 1.0, **({"GPU": 1.0} if gpu else {}), **({resource: 1.0} if resource else {})}
    return TorchTrainer(
        worker_function,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=worker_resources),
        run_config=ray.train.RunConfig(
            name=f"attempt-{time.time_ns()}",  # Ray Train resumes silently where a name was used before
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=retries),
        ),
        datasets={"train": dataset},
        dataset_config=ordered_data_config(),
    )


def ordered_data_config() -> Any:
    """Make the DataConfig by which Ray Train sends block i of a dataset to worker i modulo the number of workers."""
    import ray.train
    from ray.data import ExecutionOptions

    return ray.train.DataConfig(execution_options=ExecutionOptions(preserve_order=True))
