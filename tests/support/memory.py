"""Measure the memory that a function takes, in a process of its own."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def peak_growth(warm_up: Callable[[], Any], function: Callable[[], Any]) -> int:
    """Return by how many bytes `function` raises a fresh process's memory above what it is after `warm_up` (Linux).

    Both are picklable. `warm_up` makes the imports, and what else is not to be counted.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, warm_up, function).result()


def _measure(warm_up: Callable[[], Any], function: Callable[[], Any]) -> int:
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _peak_bytes()
    function()
    return _peak_bytes() - before


def _peak_bytes() -> int:
    """Return the most bytes that were resident; getrusage's count is that of the parent where that is larger."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024
