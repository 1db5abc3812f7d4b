"""What a driver and all that it started have used so far, by what they do in a training run."""

from collections.abc import Mapping
from dataclasses import dataclass

from .processes import Process, family

DRIVER, RAY = "driver", "ray"
TITLES = {
    "RayTrainWorker": "workers",
    "Consumer": "workers",
    "SplitCoordinator": "coordinator",
    "LoadBatches": "loaders",
    "MadeBatches": "loaders",
    "TrainController": "controller",
}
"""Part of a process's title -> its kind."""
KINDS = ("coordinator", "loaders", "workers", RAY)
ABOUT_KINDS = """\
ms: CPU time of all processes of a kind for each batch; ray: its own, and those that wait for work. waited: share of the workers' time.
MB: the most that a process held, shared memory included."""


@dataclass(frozen=True)
class Used:
    """What a process does, and what it has used."""

    kind: str
    process: Process


Usage = Mapping[int, Used]
"""By process id."""


def usage(driver: int) -> Usage:
    """Look at a process and all below it."""
    return {pid: Used(DRIVER if pid == driver else _kind(process.title), process) for pid, process in family(driver)}


def cpu_s(before: Usage, after: Usage) -> dict[str, float]:
    """CPU seconds between two looks, by kind; what ended meanwhile is left out."""
    spent: dict[str, float] = {}
    for pid, used in after.items():
        earlier = before[pid].process.cpu_s if pid in before else 0.0
        spent[used.kind] = spent.get(used.kind, 0.0) + used.process.cpu_s - earlier
    return spent


def peak_mb(seen: Usage, kind: str) -> float:
    """The most that one of the processes of a kind has held; 0 where there is none."""
    return max((used.process.peak_mb for used in seen.values() if used.kind == kind), default=0.0)


def _kind(title: str) -> str:
    return next((kind for part, kind in TITLES.items() if part in title), RAY)
