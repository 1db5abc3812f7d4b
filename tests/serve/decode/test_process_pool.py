"""A worker process answers calls in order, and its death fails only the call that it had accepted."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from serve.decode.process_pool import CallFailed, ProcessWorker, WorkerStartFailed
from tests.support.faults import until
from tests.support.isolated import (
    die_at_start,
    forked_by_forkservers,
    is_alive,
    isolated_processes,
    make_filled,
    make_upper,
)

pytestmark = pytest.mark.processes

LARGE = 60_000_000
"""Bytes of a result that take tens of milliseconds to send."""


@contextlib.contextmanager
def worker(initialize=make_upper, *, max_calls: int = 100) -> Iterator[ProcessWorker]:
    one = ProcessWorker(initialize, timeout_s=20, max_calls=max_calls)
    try:
        yield one
    finally:
        one.close()
    assert not isolated_processes()


def test_calls_are_answered_in_order_by_one_process_from_any_event_loop():
    async def call(count: int) -> list[tuple[int, str]]:
        return await asyncio.gather(*(one.call(f"a{number}") for number in range(count)))

    with worker() as one:
        results = asyncio.run(call(50)) + asyncio.run(call(3))
    assert [text for _, text in results] == [f"A{number}" for number in [*range(50), *range(3)]]
    assert len({pid for pid, _ in results}) == 1


def test_the_death_of_an_idle_process_fails_no_call():
    with worker() as one:
        for _ in range(10):
            pid, _ = asyncio.run(one.call("a"))
            psutil.Process(pid).kill()  # noticed before the next call, or not yet
            assert asyncio.run(one.call("b"))[1] == "B"


@pytest.mark.parametrize("received_share", [0.0, 0.25, 0.5, 0.75])
def test_a_process_killed_while_it_sends_a_large_result_fails_that_call_alone(received_share):
    """The process is killed when this one has read a share of the result; a kill that comes too late is tried again."""
    deaths = 0
    with worker(make_filled) as one:
        while deaths < 2:
            pid, _ = asyncio.run(one.call("1"))
            with killed_after_reading(received_share * LARGE, pid):
                result = asyncio.run(outcome(one, str(LARGE)))
            if isinstance(result, CallFailed):
                assert str(result) == "its process died"
                deaths += 1
            else:
                assert len(result[1]) == LARGE
            new_pid, data = asyncio.run(one.call("7"))
            assert (new_pid != pid, len(data)) == (True, 7)
        assert len(asyncio.run(one.call(str(LARGE)))[1]) == LARGE


async def outcome(one: ProcessWorker, argument: str) -> tuple[int, bytes] | BaseException:
    """Return the result or the exception of a call."""
    (result,) = await asyncio.gather(one.call(argument), return_exceptions=True)
    return result


@contextlib.contextmanager
def killed_after_reading(byte_count: float, pid: int) -> Iterator[None]:
    """Kill a process once this one has begun to read a large message and has read so many bytes of it."""
    counters = psutil.Process().io_counters
    start = counters().read_chars

    def wait_and_kill() -> None:
        while counters().read_chars - start < 2**20 + byte_count:  # small messages do not come to a mebibyte
            time.sleep(0)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=wait_and_kill)
    killer.start()
    yield
    killer.join()


def test_a_process_is_replaced_after_its_last_call():
    with worker(max_calls=2) as one:
        pids = [asyncio.run(one.call("a"))[0] for _ in range(6)]
    assert pids == [pids[0], pids[0], pids[2], pids[2], pids[4], pids[4]]
    assert len(set(pids)) == 3


def test_an_exception_is_reported_by_its_class():
    with worker() as one:
        with pytest.raises(CallFailed, match=r"^AttributeError$"):
            asyncio.run(one.call(7))
        assert asyncio.run(one.call("a"))[1] == "A"


def test_a_process_that_cannot_start_is_an_error():
    with worker(die_at_start) as one, pytest.raises(WorkerStartFailed):
        asyncio.run(one.call("a"))


def test_zombies_and_processes_that_vanish_are_not_listed():
    zombie = subprocess.Popen([sys.executable, "-c", ""])  # nobody waits for it until the end of the test
    process = psutil.Process(zombie.pid)
    until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert not is_alive(process)
    assert not isolated_processes()

    class Parent:
        def children(self) -> list[psutil.Process]:
            return [process]

    zombie.wait()
    assert not is_alive(process)
    assert forked_by_forkservers(Parent()) == []
