"""What bulk transcription costs: Ray's pipeline beside a bare loop, other transcribers, memory, and what batches change in bf16."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from graft.text.wer import score

from .building import graft_or_built
from .bulk_bf16 import bench_bf16
from .bulk_memory import bench_memory
from .bulk_peers import NO_GRAFT, bench_peers
from .bulk_pipeline import bench_pipeline
from .bulk_speech import MANIFESTS
from .measuring import Findings, with_load
from .processes import alone


@dataclass(frozen=True)
class BulkBench:
    """Which parts to measure, with which graft (None: what needs a trained one is left out), and how much of it."""

    parts: Sequence[str]
    model: str | None = None
    speech: Sequence[str] = MANIFESTS
    threads: int = 1
    seconds: float = 30.0
    """Of each turn of a pipeline."""
    repetitions: int = 1
    """Of its turns."""
    recordings: int = 10_000
    hours: float = 10.0
    rows: int = 1_000_000
    """Of the plan."""


def bench_bulk(bench: BulkBench) -> Iterator[tuple[str, Findings]]:
    """Measure part by part, each in fresh processes. Raises ModelError for a folder that is no graft, DataError, MissingExtra."""
    score(["a"], ["a"])  # a missing extra is told now, not after the listening
    with graft_or_built(bench.model) as graft:
        pipeline = functools.partial(bench_pipeline, graft, seconds=bench.seconds, repetitions=bench.repetitions)
        bf16 = functools.partial(bench_bf16, graft, bench.speech, threads=bench.threads)
        parts: dict[str, Callable[[], Findings]] = {
            "pipeline": lambda: alone(pipeline),
            "peers": lambda: bench_peers(bench.model, bench.speech, threads=bench.threads),
            "memory": lambda: bench_memory(graft, recordings=bench.recordings, hours=bench.hours, rows=bench.rows),
            "bf16": lambda: alone(bf16) if bench.model else Findings({}, NO_GRAFT),
        }
        for name in bench.parts:
            yield name, with_load(parts[name]())
