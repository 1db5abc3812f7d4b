"""Functions to run in a process of their own, without imports that take long, and the processes in which such run."""

import os
from collections.abc import Callable

import psutil


def echo() -> Callable[[str], tuple[int, str]]:
    return said


def said(text: str) -> tuple[int, str]:
    """Who heard it, and what."""
    return os.getpid(), text.upper()


def never() -> Callable[[str], str]:
    os._exit(1)


def isolated_processes() -> list[psutil.Process]:
    """Those that forkservers of this process have forked."""
    servers = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    return [process for server in servers for process in server.children() if process.status() != psutil.STATUS_ZOMBIE]
