"""Call a function in a worker process that may crash, hang or run out of memory without harming the caller.

call -> wait for its turn -> sent and accepted -> the function's result | CallFailed | TimeoutError

pebble's process pool is not used: it stops answering when a worker is killed while it sends a large result.
"""

import asyncio
import contextlib
import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, TypeVar

T = TypeVar("T")

ACCEPT_TIMEOUT_S = 120.0
"""Seconds in which a new process must start and accept a call."""
MAX_STARTS = 2
"""Processes that are started for a call that none has accepted: an idle process may have died unnoticed."""
POLL_S = 0.05
"""Seconds within which a timeout or an abandoned call is noticed."""
ACCEPTED = pickle.dumps(None)
"""The message by which a process says that it has received a call."""


class CallFailed(Exception):
    """The call did not return; the message is the name of the exception's class, or says that the process died."""


class WorkerStartFailed(Exception):
    """No process accepts the call: there is too little memory for one, or its initialization fails."""


class ProcessWorker(Generic[T]):
    """Calls a function in one other process, one call at a time in order of arrival. Call `close` to end the process.

    `initialize` runs in each new process and returns the function. It is sent there by pickle, as are arguments and
    results. The process is replaced after a call that takes longer than `timeout_s`, after one that its caller has
    cancelled, after its death, and after `max_calls` calls.
    """

    def __init__(
        self,
        initialize: Callable[[], Callable[[Any], T]],
        *,
        timeout_s: float,
        max_calls: int,
        preload: Sequence[str] = (),
    ) -> None:
        self._initialize, self._timeout_s, self._max_calls = initialize, timeout_s, max_calls
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._running: tuple[ForkServerProcess, Connection] | None = None
        self._calls_left = 0
        self._is_closed = threading.Event()
        # The executor's single thread is the only one that touches the process; its queue keeps the order of calls.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="process-worker")
        self._executor.submit(self._start)  # now rather than at the first call

    async def call(self, argument: Any, *, timeout_s: float | None = None) -> T:
        """Return the function's result; `timeout_s` replaces the worker's for this call.

        Raises TimeoutError, CallFailed, WorkerStartFailed.
        """
        is_cancelled, limit_s = threading.Event(), self._timeout_s if timeout_s is None else timeout_s
        try:
            return await asyncio.wrap_future(self._executor.submit(self._call, argument, limit_s, is_cancelled))
        finally:
            is_cancelled.set()

    def close(self) -> None:
        """Kill the process, even during a call, and cancel the calls that wait."""
        self._is_closed.set()
        self._executor.shutdown(cancel_futures=True)
        self._kill()

    def _call(self, argument: Any, timeout_s: float, is_cancelled: threading.Event) -> T:
        pipe = self._send(argument, is_cancelled)
        try:
            result: T | CallFailed = self._receive(pipe, timeout_s, is_cancelled)
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            self._restart()
            if isinstance(error, TimeoutError):
                raise
            raise CallFailed("its process died") from error
        self._calls_left -= 1
        if not self._calls_left:
            self._restart()
        if isinstance(result, CallFailed):
            raise result
        return result

    def _send(self, argument: Any, is_cancelled: threading.Event) -> Connection:
        """Return the pipe of a process that has accepted the call: a death from now on is the call's own fault."""
        for _ in range(MAX_STARTS):
            self._start()
            with contextlib.suppress(EOFError, OSError):
                if self._running is not None:
                    _, pipe = self._running
                    pipe.send(argument)
                    self._receive(pipe, ACCEPT_TIMEOUT_S, is_cancelled)
                    return pipe
            self._restart()
            if is_cancelled.is_set():
                break
        raise WorkerStartFailed

    def _receive(self, pipe: Connection, timeout_s: float, is_cancelled: threading.Event) -> Any:
        """Return the next message of the process. Raises TimeoutError; where the process died, EOFError or OSError."""
        deadline = time.monotonic() + timeout_s
        while not pipe.poll(POLL_S):
            if time.monotonic() > deadline or is_cancelled.is_set() or self._is_closed.is_set():
                raise TimeoutError
        return pickle.loads(pipe.recv_bytes())

    def _restart(self) -> None:
        self._kill()
        self._start()

    def _start(self) -> None:
        if self._running is None and not self._is_closed.is_set():
            with contextlib.suppress(EOFError, OSError):  # too little memory: the next call tries again
                own_end, worker_end = self._context.Pipe()
                process = self._context.Process(target=_serve_calls, args=(worker_end, self._initialize), daemon=True)
                process.start()
                worker_end.close()  # an open copy here would hide the process's death from `recv_bytes`
                self._running, self._calls_left = (process, own_end), self._max_calls

    def _kill(self) -> None:
        if self._running is not None:
            process, pipe = self._running
            self._running = None
            process.kill()
            process.join()
            pipe.close()


def _serve_calls(pipe: Connection, initialize: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer calls until the other end of the pipe is closed. This is the main function of the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    function = initialize()
    with contextlib.suppress(EOFError, OSError):
        while True:
            argument = pipe.recv()
            pipe.send_bytes(ACCEPTED)
            try:
                result = pickle.dumps(function(argument), protocol=pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                result = pickle.dumps(CallFailed(type(error).__name__))
            pipe.send_bytes(result)
