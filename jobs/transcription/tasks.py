"""Run a function in parallel on Ray, or in this process, and say what speaks for Ray."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from . import Auto

STOP_S = 10.0
"""Seconds for which tasks that are stopped are waited for."""


def asks_for_ray(workers: int | Auto) -> str | None:
    """Say why a command is to run on Ray, however little it has to do; None where it may run in this process."""
    if os.environ.get("RAY_ADDRESS"):
        return "RAY_ADDRESS names a cluster"
    return f"workers={workers} is more than one process" if workers != "auto" and workers > 1 else None


class TaskCrashError(Exception):
    """The process of a task has crashed, each time that Ray has tried it."""

    def __init__(self, task: Any) -> None:
        super().__init__("a process of Ray has crashed each time that it was tried")
        self.task = task


class Tasks(Protocol):
    """Runs a function on several arguments; a task stands for one call."""

    def start(self, *arguments: Any) -> Any:
        """Return a task, which can be a key of a dictionary."""
        ...

    def wait(self, tasks: Iterable[Any]) -> tuple[Any, Any]:
        """Wait until one of the tasks is done; returns it and its result, or raises what it has raised.

        Raises TaskCrashError for a task that ends its process.
        """
        ...

    def stop(self, tasks: Iterable[Any]) -> None:
        """End tasks whose results nobody wants any more."""
        ...

    @property
    def cpus(self) -> int:
        """Number of CPUs for tasks."""
        ...


class RayTasks:
    """Runs each task of a function on a CPU of the Ray cluster."""

    def __init__(self, function: Callable[..., Any]) -> None:
        import ray

        self._function = ray.remote(num_cpus=1)(function)

    def start(self, *arguments: Any) -> Any:
        """See Tasks."""
        return self._function.remote(*arguments)

    def wait(self, tasks: Iterable[Any]) -> tuple[Any, Any]:
        """See Tasks."""
        import ray

        (task,), _ = ray.wait(list(tasks), num_returns=1)
        try:
            return task, ray.get(task)
        except ray.exceptions.WorkerCrashedError as error:
            raise TaskCrashError(task) from error

    def stop(self, tasks: Iterable[Any]) -> None:
        """See Tasks."""
        import ray

        for task in (stopped := list(tasks)):
            ray.cancel(task, force=True)
        if stopped:
            ray.wait(stopped, num_returns=len(stopped), timeout=STOP_S)

    @property
    def cpus(self) -> int:
        """See Tasks."""
        import ray

        return int(ray.cluster_resources().get("CPU", 1))


class TasksHere:
    """Runs each task of a function in the thread that waits for it."""

    cpus = 1

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def start(self, *arguments: Any) -> Any:
        """See Tasks."""
        return partial(self._function, *arguments)

    def wait(self, tasks: Iterable[Any]) -> tuple[Any, Any]:
        """See Tasks."""
        task = next(iter(tasks))
        return task, task()

    def stop(self, tasks: Iterable[Any]) -> None:
        """See Tasks."""
