"""What the service costs: beside its engine offline, under load, beside other servers, and with engines that come and go."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from graft.errors import require
from graft.text.wer import score

from .building import graft_or_built
from .bulk_speech import MANIFESTS
from .measuring import Findings, with_load
from .processes import alone
from .serve_peers import bench_servers
from .serve_replicas import bench_replicas
from .serve_saturation import bench_saturation


@dataclass(frozen=True)
class ServeBench:
    """Which parts to measure, with which graft (None: one that is built; what it would say is left out), and how much of it."""

    parts: Sequence[str]
    model: str | None = None
    speech: Sequence[str] = MANIFESTS
    threads: int = 1
    clients: int = 32
    """That saturate a service."""
    seconds: float = 60.0
    """Of each load."""


def bench_serve(bench: ServeBench) -> Iterator[tuple[str, Findings]]:
    """Measure part by part, each with servers of its own. Raises ModelError for a folder that is no graft, ServerFailed, MissingExtra."""
    require("ray.serve", extra="serve")
    score(["a"], ["a"])  # a missing extra is told now, not after the listening
    with graft_or_built(bench.model) as graft:
        threads, seconds = bench.threads, bench.seconds
        parts: dict[str, Callable[[], Findings]] = {
            "saturation": functools.partial(
                bench_saturation, graft, threads=threads, clients=bench.clients, seconds=seconds
            ),
            "servers": functools.partial(
                bench_servers, graft, bench.speech, threads=threads, trained=bench.model is not None
            ),
            "replicas": functools.partial(bench_replicas, graft, threads=threads, seconds=seconds),
        }
        for name in bench.parts:
            yield name, with_load(alone(parts[name]))
