"""Measure work: wall and CPU seconds, several ways in turns, and what a process and all below it use of a machine."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
# Measured values by name, as `--json` writes them.
Numbers = dict[str, Any]
# A line of a table: its name and its numbers.
Row = tuple[str, Numbers]

# Its title among the processes below it.
DRIVER = "the process that was watched"
# Seconds between two looks at the processes of some work.
LOOK_S = 0.5
NAME_WIDTH, COLUMN_WIDTH = 26, 10


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall seconds of work and this process's CPU seconds, which do not grow while others hold the cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(ways: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, np.ndarray]:
    """Time ways in turns, so that a busy machine slows all alike; returns wall and CPU seconds (repetitions, 2)."""
    turns = [{name: seconds_of(work) for name, work in ways.items()} for _ in range(repetitions)]
    return {name: np.array([turn[name] for turn in turns]) for name in ways}


def alone(work: Callable[..., T], *arguments: object) -> T:
    """Do work in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


class Process(NamedTuple):
    """A process's title, CPU seconds, and the most memory that it held, shared included, in MB (2^20 bytes)."""

    title: str
    cpu_s: float
    peak_mb: float


class Watched(NamedTuple, Generic[T]):
    """The result of work in a fresh process, and looks at the processes by their ids, with times (time.monotonic)."""

    result: T
    looks: list[tuple[float, dict[int, Process]]]

    def peak_mb(self, title: str = DRIVER) -> float:
        """Return the most memory that one process with this in its title held; 0 where there was none."""
        processes = [process for _, look in self.looks for process in look.values()]
        return max((process.peak_mb for process in processes if title in process.title), default=0.0)


def watch(work: Callable[..., T], *arguments: object) -> Watched[T]:
    """Do work in a fresh process, and look at this process and all below it until it is done. Linux only."""
    looks, is_done = [], False
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        root = pool.submit(os.getpid).result()
        future = pool.submit(work, *arguments)
        while not is_done:
            wait([future], LOOK_S)
            is_done = future.done()  # before the look, so that the last look shows the end
            looks.append((time.monotonic(), look_at(root)))
    return Watched(future.result(), looks)


def look_at(root: int) -> dict[int, Process]:
    """Look at a process and all below it."""
    import psutil

    processes = {}
    with contextlib.suppress(psutil.NoSuchProcess):  # the root has crashed
        for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):  # the process has ended meanwhile
                title, times = " ".join(process.cmdline()), process.cpu_times()
                status = Path(f"/proc/{process.pid}/status").read_text()
                if peak_kb := re.search(r"VmHWM:\s+(\d+)", status):  # a zombie has none
                    used = times.user + times.system, int(peak_kb[1]) / 1024
                    processes[process.pid] = Process(DRIVER if process.pid == root else title, *used)
    return processes


def cpu_s(before: Mapping[int, Process], after: Mapping[int, Process], title: str) -> float:
    """Return the CPU seconds between two looks of processes with this in their title that have not ended meanwhile."""
    mine = {pid: process.cpu_s for pid, process in after.items() if title in process.title}
    return sum(seconds - (before[pid].cpu_s if pid in before else 0.0) for pid, seconds in mine.items())


def shown(value: float | None) -> str:
    """Write a number for a table; a missing one is a dash."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def report(about: str, numbers: Numbers) -> Numbers:
    """Print a line for each number; returns the numbers."""
    if about:
        print(about)
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(f"{name:<{width}}  {shown(value):>12}", flush=True)
    return numbers


def report_table(about: str, rows: Iterable[Row]) -> Numbers:
    """Print each row once it is measured, under the names of the first row's numbers; returns all as "row number"."""
    print(about)
    reported: Numbers = {}
    for name, numbers in rows:
        widths = [max(COLUMN_WIDTH, len(title) + 2) for title in numbers]
        if not reported:
            print(" " * NAME_WIDTH + "".join(map(str.rjust, numbers, widths)))
        print(name.ljust(NAME_WIDTH) + "".join(map(str.rjust, map(shown, numbers.values()), widths)), flush=True)
        reported |= {f"{name} {title}": value for title, value in numbers.items()}
    return reported
