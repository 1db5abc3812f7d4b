"""How far one training run grows: Ray's split of the batches over up to 64 stand-ins, and Ray Train itself with a few real workers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .building import graft_or_built
from .measuring import Findings, with_load
from .scale_stand_ins import bench_real, bench_split
from .scale_train import bench_train


@dataclass(frozen=True)
class ScaleBench:
    """Which parts to measure, with how many workers, and for how long."""

    parts: Sequence[str]
    graft: str | None = None
    """Whose processor and widths are taken; None: one built of the bundled weights."""
    consumers: Sequence[int] = (1, 8, 64)
    """Stand-ins to split over."""
    workers: Sequence[int] = (1, 2, 4)
    """Of training runs."""
    seconds: float = 20.0
    """That each split is watched, about."""
    steps: int = 60
    """Of each training run."""


def bench_scale(bench: ScaleBench) -> Iterator[tuple[str, Findings]]:
    """Measure part by part. Raises ModelError for a folder that is no graft, GraftError for too short a measurement."""
    with graft_or_built(bench.graft) as graft:
        parts: dict[str, Callable[[], Findings]] = {
            "split": lambda: bench_split(graft, consumers=bench.consumers, seconds=bench.seconds),
            "real": lambda: bench_real(graft, consumers=bench.consumers, seconds=bench.seconds),
            "train": lambda: bench_train(graft, workers=bench.workers, steps=bench.steps),
        }
        for name in bench.parts:
            yield name, with_load(parts[name]())
