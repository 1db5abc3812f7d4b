"""Work in a fresh process, and what it, and whatever it started, used: CPU time, and memory at most. Linux: from /proc."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.5
IDLE = "ray::IDLE"
CLOCK_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """A process as it stands: what it calls itself, its CPU seconds, and the most memory that it has held, shared memory included."""

    parent: int
    title: str
    cpu_s: float
    peak_mb: float


@dataclass
class Watched(Generic[T]):
    """What work returned, the peak of its own process, and of those below it by what they call themselves."""

    result: T
    own_mb: float
    below_mb: dict[str, float] = field(default_factory=dict)

    def peak_mb(self, name: str) -> float:
        """The most that one of the processes held whose title has this in it."""
        return max((peak for title, peak in self.below_mb.items() if name in title), default=0.0)


def alone(work: Callable[..., T], *arguments: object) -> T:
    """Do work in a fresh process."""
    with _fresh() as pool:
        return pool.submit(work, *arguments).result()


def watched(work: Callable[..., T], *arguments: object) -> Watched[T]:
    """Do work in a fresh process, and see what it and those that it starts hold at most."""
    seen: dict[int, Process] = {}
    with _fresh() as pool:
        root = pool.submit(os.getpid).result()
        future = pool.submit(work, *arguments)
        is_done = False
        while not is_done:
            wait([future], POLL_S)
            is_done = future.done()  # what it holds in the end is seen once more
            for pid, process in family(root):
                title = seen[pid].title if process.title == IDLE and pid in seen else process.title
                seen[pid] = replace(process, title=title)
    result = future.result()
    own = seen.pop(root)
    titles = {process.title for process in seen.values()}
    below = {title: max(process.peak_mb for process in seen.values() if process.title == title) for title in titles}
    return Watched(result, own.peak_mb, below)


def _fresh() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def family(root: int) -> Iterator[tuple[int, Process]]:
    """A process, and all below it, by their ids."""
    found = {pid: process for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if (process := _look(pid))}
    for pid, process in found.items():
        above = pid
        while above in found and above != root:
            above = found[above].parent
        if above == root:
            yield pid, process


def _look(pid: int) -> Process | None:
    """None for what has ended meanwhile, or has no memory of its own."""
    home = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines())
        title = (home / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        counts = (
            (home / "stat").read_text().rpartition(")")[2].split()
        )  # from the third on, the state: the name before may hold spaces
    except OSError:
        return None
    if "VmHWM" not in status:
        return None
    cpu_s = (int(counts[11]) + int(counts[12])) / CLOCK_HZ
    return Process(int(status["PPid"]), title, cpu_s, int(status["VmHWM"].split()[0]) / 1024)
