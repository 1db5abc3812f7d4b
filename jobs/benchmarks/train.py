"""What training costs: steps, feeding and workers, each a part that is measured on its own, on one graft."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .building import graft_or_built
from .ingest import bench_ingest
from .measuring import Findings, with_load
from .steps import bench_gains, bench_step
from .workers import bench_workers


@dataclass(frozen=True)
class TrainBench:
    """Which parts to measure, on which graft (None: one built of the bundled weights), and for how long."""

    parts: Sequence[str]
    graft: str | None = None
    clips: int = 16
    """In a turn of steps; two workers share twice as many."""
    repetitions: int = 3
    fed_clips: int = 1000
    """To feed to the stand-in step."""


def bench_train(bench: TrainBench) -> Iterator[tuple[str, Findings]]:
    """Measure part by part. Raises ModelError for a folder that is no graft, MissingExtra where the bundled weights are not installed."""
    torch.set_num_threads(1)
    with graft_or_built(bench.graft) as graft:
        parts: dict[str, Callable[[], Findings]] = {
            "step": lambda: bench_step(graft, clips=bench.clips, repetitions=bench.repetitions),
            "gains": lambda: bench_gains(graft, clips=bench.clips, repetitions=1),
            "ingest": lambda: bench_ingest(graft, clips=bench.fed_clips),
            "workers": lambda: bench_workers(graft, clips=2 * bench.clips, repetitions=bench.repetitions),
        }
        for name in bench.parts:
            yield name, with_load(parts[name]())
