"""What Ray Train is given: the function that each training worker runs, and the order of its data.

Ray Train's controller imports this module to unpickle the function, so it imports neither torch nor transformers: that
saves the controller several hundred MB of memory and seconds of start-up.
"""

import pickle
from typing import Any


def run_worker(config: dict[str, bytes]) -> None:
    """Run one training worker; `config["run"]` is its pickled jobs.training.worker.Run."""
    from .worker import work

    work(pickle.loads(config["run"]))


def ordered_data_config() -> Any:
    """Make the DataConfig by which Ray Train sends block i of a dataset to worker i modulo the number of workers."""
    import ray.train
    from ray.data import ExecutionOptions

    return ray.train.DataConfig(execution_options=ExecutionOptions(preserve_order=True))
