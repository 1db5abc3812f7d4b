"""Run a function in parallel on Ray, or in this process."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol


class Tasks(Protocol):
    """Runs a function on several arguments; a task stands for one call."""

    def start(self, *arguments: Any) -> Any:
        """Return a task, which can be a key of a dictionary."""
        ...

    def wait(self, tasks: Iterable[Any]) -> tuple[Any, Any]:
        """Wait until one of the tasks is done; returns it and its result, or raises what it has raised."""
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
        return task, ray.get(task)

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
