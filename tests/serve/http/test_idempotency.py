"""Answers by idempotency key: made once, to the end, and kept for a while."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable

import pytest

import serve.http.idempotency
from serve.http.idempotency import MOST, Answers, KeyReused

ASKING = contextvars.ContextVar("ASKING", default="nobody")


class Counting:
    """Makes answers, each with its number, once it may; keeps in mind what it saw of who asked."""

    def __init__(self) -> None:
        self.made, self.seen, self.may = 0, "", asyncio.Event()

    async def __call__(self) -> int:
        self.made += 1
        self.seen = ASKING.get()
        await self.may.wait()
        return self.made


def with_answers(test: Callable[[Answers[int], Counting], Awaitable[None]]) -> None:
    async def run() -> None:
        await test(Answers(), Counting())

    asyncio.run(run())


def test_two_at_once_get_one_answer():
    async def test(answers: Answers[int], make: Counting) -> None:
        asked = [asyncio.create_task(answers.once("key", "request", make)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(KeyReused):
            await answers.once("key", "another request", make)
        make.may.set()
        assert await asyncio.gather(*asked) == [1, 1]
        assert await answers.once("key", "request", make) == 1

    with_answers(test)


def test_an_answer_is_made_to_the_end_when_whoever_asked_is_gone():
    async def test(answers: Answers[int], make: Counting) -> None:
        ASKING.set("a request")  # as Ray Serve does, which ends with it what it calls
        asked = asyncio.create_task(answers.once("key", "request", make))
        await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        make.may.set()
        assert await answers.once("key", "request", make) == 1
        assert make.seen == "nobody"

    with_answers(test)


def test_failures_are_not_kept():
    async def fail() -> int:
        raise ValueError("no answer")

    async def test(answers: Answers[int], make: Counting) -> None:
        with pytest.raises(ValueError, match="no answer"):
            await answers.once("key", "request", fail)
        make.may.set()
        assert await answers.once("key", "another request", make) == 1

    with_answers(test)


def test_answers_are_kept_for_a_while_and_not_too_many(monkeypatch):
    async def test(answers: Answers[int], make: Counting) -> None:
        make.may.set()
        for number in range(MOST):
            await answers.once(f"key {number}", "request", make)
        assert await answers.once("key 0", "request", make) == 1
        assert await answers.once("one more", "request", make) == MOST + 1
        assert await answers.once("key 1", "request", make) == 2
        assert await answers.once("key 0", "request", make) == MOST + 2  # the oldest made room
        monkeypatch.setattr(serve.http.idempotency, "KEPT_S", 0.0)
        assert await answers.once("key 2", "request", make) == MOST + 3
        assert len(answers._kept) == 1

    with_answers(test)
