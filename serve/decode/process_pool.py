"""A function in a process of its own, for what may crash, hang or devour memory: a call at a time; when the process dies, another comes.

call -> its turn -> handed over, taken -> what the function returns | CallFailed | TimeoutError
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

START_S = 120.0
"""In which a process has to come and take a call."""
STARTS = 2
"""For a call that none has taken: a process may have died while it had nothing to do."""
TICK_S = 0.05
"""Within which it is noticed that time is up, or that nobody waits any more."""


class CallFailed(Exception):
    """A call did not return; the message says why: the kind of exception, or that the process died."""


class NoProcess(Exception):
    """No process takes a call: there is too little memory for one, or it can't make itself ready."""


class ProcessWorker(Generic[T]):
    """Calls a function in another process, in the order in which calls come. Call `close` to end it.

    `opened` runs in each new process and returns the function; it gets there by pickle, and what the function returns comes back so. A
    process ends with a call that takes over `timeout_s`, with one that nobody waits for any more, and after `most` of them.
    """

    def __init__(
        self, opened: Callable[[], Callable[[str], T]], *, timeout_s: float, most: int, preloaded: Sequence[str] = ()
    ) -> None:
        self._opened, self._timeout_s, self._most = opened, timeout_s, most
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preloaded))
        self._running: tuple[ForkServerProcess, Connection] | None = None
        self._left = 0
        self._is_closed = threading.Event()
        self._turns = ThreadPoolExecutor(
            1, thread_name_prefix="isolated"
        )  # its one thread alone has to do with the process
        self._turns.submit(self._start)  # now, not at the first call

    async def call(self, argument: str) -> T:
        """Raises TimeoutError, CallFailed, NoProcess."""
        has_left = threading.Event()
        try:
            return await asyncio.wrap_future(self._turns.submit(self._call, argument, has_left))
        finally:
            has_left.set()

    def close(self) -> None:
        """End the process, whatever it does; calls that wait are cancelled."""
        self._is_closed.set()
        self._turns.shutdown(cancel_futures=True)
        self._end()

    def _call(self, argument: str, has_left: threading.Event) -> T:
        pipe = self._hand_over(argument, has_left)
        try:
            returned: T | CallFailed = self._told(pipe, self._timeout_s, has_left)
        except (EOFError, OSError) as error:
            self._replace()
            if isinstance(error, TimeoutError):
                raise
            raise CallFailed("its process died") from error
        self._left -= 1
        if not self._left:
            self._replace()
        if isinstance(returned, CallFailed):
            raise returned
        return returned

    def _hand_over(self, argument: str, has_left: threading.Event) -> Connection:
        """The pipe of a process that has taken a call: from now on, whatever ends it is the call's own fault."""
        for _ in range(STARTS):
            self._start()
            with contextlib.suppress(EOFError, OSError):
                if self._running is not None:
                    _, pipe = self._running
                    pipe.send(argument)
                    self._told(pipe, START_S, has_left)
                    return pipe
            self._replace()
            if has_left.is_set():
                break
        raise NoProcess

    def _told(self, pipe: Connection, timeout_s: float, has_left: threading.Event) -> Any:
        """What the process says. Raises TimeoutError, and EOFError or OSError where it has died."""
        end = time.monotonic() + timeout_s
        while not pipe.poll(TICK_S):
            if time.monotonic() > end or has_left.is_set() or self._is_closed.is_set():
                raise TimeoutError
        return pickle.loads(pipe.recv_bytes())

    def _replace(self) -> None:
        self._end()
        self._start()

    def _start(self) -> None:
        if self._running is None and not self._is_closed.is_set():
            with contextlib.suppress(EOFError, OSError):  # too little memory: the next call tries again
                own, others = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(others, self._opened), daemon=True)
                process.start()
                others.close()  # or the death of the process would not end what it says
                self._running, self._left = (process, own), self._most

    def _end(self) -> None:
        if self._running is not None:
            process, pipe = self._running
            self._running = None
            process.kill()
            process.join()
            pipe.close()


TAKEN = pickle.dumps(None)


def _serve(pipe: Connection, opened: Callable[[], Callable[[str], Any]]) -> None:
    """Do what is asked for through the pipe, until whoever asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started it
    function = opened()
    with contextlib.suppress(EOFError, OSError):
        while True:
            argument = pipe.recv()
            pipe.send_bytes(TAKEN)
            pipe.send_bytes(_returned(function, argument))


def _returned(function: Callable[[str], Any], argument: str) -> bytes:
    try:
        return pickle.dumps(function(argument), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps(CallFailed(type(error).__name__))
