"""Checks that every test must pass besides its own: it leaves no process behind, and its marks tell what it needs.

tests/conftest.py loads this file as a plugin. A test that uses Ray has the mark `ray`, and one that opens the
bundled weights `bundled`: by the fixtures that MARKS names, which other fixtures may use, or by hand.
"""

import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

ROOMS = tuple(f"{ROOT / room}{os.sep}" for room in ("graft", "jobs", "serve"))
MARKS = {"ray_started": "ray", "bundled_weights": "bundled"}
CACHE = "GRAFT_CACHE"
USER_CACHE = os.environ.get(CACHE)
EMPTY_CACHE = Path(tempfile.gettempdir(), f"graft-tests-{os.getpid()}")
"""The cache of tests without the mark `bundled`: if weights appear in it, such a test has opened them."""


class Watch:
    """Watch this process while its tests run one after the other."""

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.had_ray = False
        self.joined_ray = False
        self.module: Path | None = None
        self.children: set[int] = set()
        """The children that ran when the module began."""
        self.zombies: set[int] = set()
        """The children that are known to have ended without being waited for."""

    def begin(self, item: pytest.Item) -> None:
        """Prepare the checks before any fixture of a test runs."""
        choose_cache(os.environ, bundled=item.get_closest_marker("bundled") is not None)
        if torch := sys.modules.get("torch"):
            torch.manual_seed(0)  # whatever was drawn before
        if item.path != self.module:
            self.module, self.children = item.path, set(child_processes())
        self.had_ray, self.joined_ray = ray_runs(), False
        if self.had_ray:  # `connect` asks this before it uses the Ray that runs
            self.patch.setattr("ray.is_initialized", self._join)

    def _join(self) -> bool:
        self.joined_ray = True
        return True

    def complaints(self, item: pytest.Item, *, is_last: bool) -> Iterator[str]:
        """Tell what a test has done that it must not do; `is_last` is said of the last test of a module."""
        self.patch.undo()
        if not item.get_closest_marker("ray") and (self.joined_ray or (ray_runs() and not self.had_ray)):
            yield "it uses Ray: give it the fixture ray_started, or the mark `ray`"
        if (EMPTY_CACHE / "bundled").exists():
            shutil.rmtree(EMPTY_CACHE)
            yield "it opens the bundled weights: give it the fixture bundled_weights, or the mark `bundled`"
        if has_zombie() and (left := zombies() - self.zombies):
            self.zombies |= left
            yield f"it has not waited for its processes {sorted(left)}, which have ended"
        if is_last:
            kept = self.children | lasting_processes()
            if left := {pid: command for pid, command in child_processes().items() if pid not in kept}:
                yield f"its module leaves processes running: {left}"
            if twice := loaded_twice(sys.modules):
                yield f"files are loaded under more than one name: {twice}"


WATCH = pytest.StashKey[Watch]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WATCH] = Watch()


def pytest_unconfigure() -> None:
    shutil.rmtree(EMPTY_CACHE, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures; where processes share the tests, begin with the files that use Ray."""
    for item in items:
        for fixture in MARKS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKS[fixture])
    if "PYTEST_XDIST_WORKER" in os.environ:
        with_ray = {item.path for item in items if item.get_closest_marker("ray")}
        items.sort(key=lambda item: item.path not in with_ray)


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collections, which would look through it all again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[WATCH].begin(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    is_last = nextitem is None or nextitem.path != item.path
    if found := list(item.config.stash[WATCH].complaints(item, is_last=is_last)):
        pytest.fail(f"{item.nodeid}: {'; '.join(found)}", pytrace=False)


def choose_cache(environment: MutableMapping[str, str], *, bundled: bool) -> None:
    """Name the user's cache in the environment, or one without the bundled weights."""
    if not bundled:
        environment[CACHE] = str(EMPTY_CACHE)
    elif USER_CACHE is None:
        environment.pop(CACHE, None)
    else:
        environment[CACHE] = USER_CACHE


def ray_runs() -> bool:
    """Return whether this process is connected to a Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def has_zombie() -> bool:
    """Return whether some child has ended and was not waited for; cheap, unlike a list of all processes."""
    with contextlib.suppress(ChildProcessError):  # there are no children
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def zombies() -> set[int]:
    """Return the ids of the children that have ended and were not waited for."""
    import psutil

    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found


def child_processes() -> dict[int, str]:
    """Return the command lines of the children that run, by process id."""
    import psutil

    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ZombieProcess is one, too
            found[child.pid] = " ".join(child.cmdline())
    return found


def lasting_processes() -> set[int | None]:
    """Return the ids of the children that serve all tests: Ray's own, and those of `multiprocessing`."""
    from multiprocessing import forkserver, resource_tracker

    kept: set[int | None] = {resource_tracker._resource_tracker._pid, forkserver._forkserver._forkserver_pid}
    if ray_runs() and (node := sys.modules["ray"]._private.worker._global_node):
        kept |= {started.process.pid for kind in node.all_processes.values() for started in kind}
    return kept


def loaded_twice(modules: Mapping[str, ModuleType]) -> list[list[str]]:
    """Return the sets of names under which one file of the product is loaded; `__main__` may be a second one."""
    names = defaultdict(list)
    for name, module in list(modules.items()):
        file = vars(module).get("__file__")  # getattr would make transformers' lazy modules search
        if name != "__main__" and isinstance(file, str) and file.startswith(ROOMS):
            names[file].append(name)
    return [shared for shared in names.values() if len(shared) > 1]
