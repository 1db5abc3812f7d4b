"""What a driver and all that it started have used so far, by what they do in a training run. Linux: from /proc."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
CLOCK_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """What a process does, its CPU seconds, and the most memory that it has held, shared memory included."""

    kind: str
    cpu_s: float
    peak_mb: float


Usage = Mapping[int, Process]
"""Process id -> process."""


def usage(driver: int) -> Usage:
    """Look at a process and all below it."""
    parents = {pid: parent for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if (parent := _parent(pid)) is not None}
    family = (pid for pid in parents if driver in _ancestry(pid, parents))
    return {pid: process for pid in family if (process := _look(pid, is_driver=pid == driver))}


def cpu_s(before: Usage, after: Usage) -> dict[str, float]:
    """CPU seconds between two looks, by kind; what ended meanwhile is left out."""
    spent: dict[str, float] = {}
    for pid, process in after.items():
        earlier = before[pid].cpu_s if pid in before else 0.0
        spent[process.kind] = spent.get(process.kind, 0.0) + process.cpu_s - earlier
    return spent


def peak_mb(seen: Usage, kind: str) -> float:
    """The most that one of the processes of a kind has held; 0 where there is none."""
    return max((process.peak_mb for process in seen.values() if process.kind == kind), default=0.0)


def _ancestry(pid: int, parents: Mapping[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on, its state; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _look(pid: int, *, is_driver: bool) -> Process | None:
    """None for what has ended meanwhile, or has no memory of its own."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return None
    fields = _stat(pid)
    if not fields or "VmHWM" not in status:
        return None
    kind = DRIVER if is_driver else next((kind for part, kind in TITLES.items() if part in title), RAY)
    return Process(kind, (int(fields[11]) + int(fields[12])) / CLOCK_HZ, int(status["VmHWM"].split()[0]) / 1024)
