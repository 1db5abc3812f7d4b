"""Build only once per test process what equal settings build."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P, T = ParamSpec("P"), TypeVar("T")


def built_once(build: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that writes a folder, its first argument: for keyword arguments that it has seen, copy that.

    PyTorch's random numbers stay as they were, whether it builds or copies.
    """
    built: dict[str, Path] = {}

    @functools.wraps(build)
    def copy(folder, **settings):  # type: ignore[no-untyped-def]
        key = repr(sorted(settings.items()))
        if key not in built:
            home = tempfile.mkdtemp(prefix="graft-tests-")
            atexit.register(shutil.rmtree, home, ignore_errors=True)
            with torch.random.fork_rng(devices=[]):
                build(Path(home, "built"), **settings)
            built[key] = Path(home, "built")
        shutil.copytree(built[key], folder, dirs_exist_ok=True)
        return str(folder) if build.__annotations__["return"] is str else Path(folder)

    return copy
