"""The service as it is run, by `serve run`, on a Ray of this benchmark's own; asked over HTTP, its engine's counts by Ray."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.inference.engines.protocol import EngineCounts

from ..common.cluster import connect
from ..common.local_service import serving

APP = "bench"
MOST_REQUESTS = 10_000
"""That a service of a benchmark has in hand: here clients wait, and are not refused."""


@dataclass(frozen=True)
class Service:
    """A service that runs."""

    url: str

    def counts(self) -> EngineCounts:
        """Of one of its engines."""
        from ray import serve

        return serve.get_deployment_handle("Engine", APP).counts.remote().result()

    def engines(self) -> int:
        """Engines that are up."""
        from ray import serve

        states = serve.status().applications[APP].deployments["Engine"].replica_states
        return sum(count for state, count in states.items() if state == "RUNNING")


@contextlib.contextmanager
def service(model: str, **settings: Any) -> Iterator[Service]:
    """Run the service until the block ends. Raises ServerFailed."""
    import ray

    connect(cpus=8)
    with tempfile.TemporaryDirectory() as folder:
        limits = {"request_timeout_s": 600, "max_ongoing_requests": MOST_REQUESTS} | settings
        with serving(model, Path(folder), app=APP, **limits) as url:
            yield Service(url)
    ray.shutdown()
