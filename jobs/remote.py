"""What Ray's own processes unpickle of a training run: where the work is, not the work itself.

Train's controller and Data's coordinators import the module of what they pass on. This one brings in neither torch nor transformers, which
saves each of those processes a few hundred MB and seconds.
"""

import pickle
from typing import Any


def train(config: dict[str, bytes]) -> None:
    """Run a training worker; `config` holds its Run, pickled."""
    from jobs.train_worker import work

    work(pickle.loads(config["run"]))


class LoadBatches:
    """A Ray Data actor around jobs.ingest's BatchLoader; `delivery` is a reference to its Delivery."""

    def __init__(self, delivery: Any):
        import ray

        from jobs.ingest import BatchLoader

        self.load = BatchLoader(ray.get(delivery))

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        return self.load(block)
