"""Functions that tests run in worker processes, without slow imports, and a list of the worker processes that run."""

import contextlib
import os
from collections.abc import Callable

import psutil


def make_upper() -> Callable[[str], tuple[int, str]]:
    return upper


def upper(text: str) -> tuple[int, str]:
    """Return the id of the process and the text in capitals."""
    return os.getpid(), text.upper()


def make_filled() -> Callable[[str], tuple[int, bytes]]:
    return filled


def filled(size: str) -> tuple[int, bytes]:
    """Return the id of the process and a number of zero bytes."""
    return os.getpid(), bytes(int(size))


def die_at_start() -> Callable[[str], str]:
    os._exit(1)


def isolated_processes() -> list[psutil.Process]:
    """Return the processes that forkservers of this process have forked and that still run."""
    return forked_by_forkservers(psutil.Process())


def forked_by_forkservers(parent: psutil.Process) -> list[psutil.Process]:
    """Return the running children of a process's forkservers; processes that end meanwhile and zombies are left out."""
    found = []
    for child in parent.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ZombieProcess is a subclass of it
            if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                found += [process for process in child.children() if is_alive(process)]
    return found


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
