"""A function in a process of its own: its calls are answered in turn, and a death is the fault of the call that caused it."""

import asyncio
import contextlib
from collections.abc import Iterator

import psutil
import pytest

from serve.decode.process_pool import CallFailed, NoProcess, ProcessWorker
from tests.support.isolated import echo, isolated_processes, never


@contextlib.contextmanager
def isolated(opened=echo, *, most: int = 100) -> Iterator[ProcessWorker]:
    one = ProcessWorker(opened, timeout_s=20, most=most)
    try:
        yield one
    finally:
        one.close()
    assert not isolated_processes()


def test_calls_are_answered_in_turn_by_one_process_from_any_event_loop():
    async def ask(count: int) -> list[tuple[int, str]]:
        return await asyncio.gather(*(one.call(f"a{number}") for number in range(count)))

    with isolated() as one:
        told = asyncio.run(ask(50)) + asyncio.run(ask(3))
    assert [text for _, text in told] == [f"A{number}" for number in [*range(50), *range(3)]]
    assert len({pid for pid, _ in told}) == 1


def test_a_process_that_died_idle_is_nobodys_fault():
    with isolated() as one:
        for _ in range(10):
            pid, _ = asyncio.run(one.call("a"))
            psutil.Process(pid).kill()  # seen before the next call, or not yet
            assert asyncio.run(one.call("b"))[1] == "B"


def test_a_process_ends_after_so_many_calls():
    with isolated(most=2) as one:
        pids = [asyncio.run(one.call("a"))[0] for _ in range(6)]
    assert pids == [pids[0], pids[0], pids[2], pids[2], pids[4], pids[4]]
    assert len(set(pids)) == 3


def test_what_a_function_raises_is_told_by_its_kind():
    with isolated() as one:
        with pytest.raises(CallFailed, match=r"^AttributeError$"):
            asyncio.run(one.call(7))
        assert asyncio.run(one.call("a"))[1] == "A"


def test_where_no_process_comes_it_is_said():
    with isolated(never) as one, pytest.raises(NoProcess):
        asyncio.run(one.call("a"))
