"""Give processes to uploads in turn: to the client that has used them least, and to its shortest upload."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..fairness import Usage
from .process_pool import CallFailed, ProcessWorker

T = TypeVar("T")


@dataclass(eq=False)
class _Turn(Generic[T]):
    """A wait for a process, which `process` is set to, and then the use of it."""

    client: str
    expected_s: float
    is_long: bool
    process: "Future[ProcessWorker[T]]" = field(default_factory=Future)
    start: float = 0.0


class Turns(Generic[T]):
    """Hands out processes, one to each caller at a time; callers may run in any event loop.

    Of two or more processes, the first is kept for turns that are not long.
    """

    def __init__(self, processes: Sequence[ProcessWorker[T]]) -> None:
        self._processes, self._idle = processes, list(processes)
        self._waiting: list[_Turn[T]] = []  # in order of arrival
        self._running: list[_Turn[T]] = []
        self._usage = Usage()
        self._lock = threading.Lock()
        self._is_closed = False

    @asynccontextmanager
    async def take(self, client: str, expected_s: float, *, is_long: bool) -> AsyncIterator[ProcessWorker[T]]:
        """Wait for a process and hold it until the block ends; `expected_s` orders the turns of one client.

        Raises CallFailed after `close`.
        """
        turn: _Turn[T] = _Turn(client, expected_s, is_long)
        with self._lock:
            if self._is_closed:
                raise CallFailed("the decoder is closed")
            self._waiting.append(turn)
            self._start_turns()
        try:
            yield await asyncio.wrap_future(turn.process)
        finally:
            with self._lock:
                self._end(turn)
                self._start_turns()

    def close(self) -> None:
        """Cancel the turns that wait, and kill the processes."""
        with self._lock:
            self._is_closed = True
            for turn in self._waiting:
                turn.process.cancel()
        for process in self._processes:
            process.close()

    def _start_turns(self) -> None:
        """Give idle processes to those that wait."""
        for process in self._processes:
            while process in self._idle and not self._is_closed and (turn := self._next_turn(process)):
                self._waiting.remove(turn)
                if turn.process.set_running_or_notify_cancel():  # false where its caller no longer waits
                    self._idle.remove(process)
                    self._running.append(turn)
                    self._usage.serve(turn.client)
                    turn.start = time.monotonic()
                    turn.process.set_result(process)

    def _next_turn(self, process: ProcessWorker[T]) -> "_Turn[T] | None":
        is_kept = process is self._processes[0] and len(self._processes) > 1
        waiting = [turn for turn in self._waiting if not (is_kept and turn.is_long)]
        # The first of equal ones.
        return min(waiting, key=lambda one: (self._used_s(one.client), one.is_long, one.expected_s), default=None)

    def _used_s(self, client: str) -> float:
        """Seconds of processes that a client has used, turns that have not ended included."""
        now = time.monotonic()
        return self._usage[client] + sum(now - turn.start for turn in self._running if turn.client == client)

    def _end(self, turn: "_Turn[T]") -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn in self._running:
            self._running.remove(turn)
            self._usage.add(turn.client, time.monotonic() - turn.start)
            self._idle.append(turn.process.result())
