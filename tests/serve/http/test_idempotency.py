"""The cache of responses by idempotency key: each is created once, completely, and kept for a while."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable

import pytest

import serve.http.idempotency
from serve.http.errors import ApiError
from serve.http.idempotency import MAX_RESPONSES, ResponseCache

REQUEST = contextvars.ContextVar("REQUEST", default="none")


class Counter:
    """Creates numbered responses once `may_end` is set, and remembers the context in which it ran."""

    def __init__(self) -> None:
        self.count, self.request, self.may_end = 0, "", asyncio.Event()

    async def __call__(self) -> int:
        self.count += 1
        self.request = REQUEST.get()
        await self.may_end.wait()
        return self.count


def run_with_cache(test: Callable[[ResponseCache[int], Counter], Awaitable[None]]) -> None:
    async def run() -> None:
        await test(ResponseCache(), Counter())

    asyncio.run(run())


def test_two_requests_at_once_get_one_response():
    async def test(cache: ResponseCache[int], create: Counter) -> None:
        both = [asyncio.create_task(cache.get_or_create("owner", "key", "request", create)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="the idempotency key belongs to another request"):
            await cache.get_or_create("owner", "key", "another request", create)
        create.may_end.set()
        assert await asyncio.gather(*both) == [1, 1]
        assert await cache.get_or_create("owner", "key", "request", create) == 1

    run_with_cache(test)


def test_a_response_is_created_completely_although_its_request_is_cancelled():
    async def test(cache: ResponseCache[int], create: Counter) -> None:
        REQUEST.set("a request")  # Ray Serve keeps the request in the context, and cancels the calls made in it
        task = asyncio.create_task(cache.get_or_create("owner", "key", "request", create))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        create.may_end.set()
        assert await cache.get_or_create("owner", "key", "request", create) == 1
        assert create.request == "none"

    run_with_cache(test)


def test_failures_are_not_kept():
    async def fail() -> int:
        raise ValueError("no answer")

    async def test(cache: ResponseCache[int], create: Counter) -> None:
        with pytest.raises(ValueError, match="no answer"):
            await cache.get_or_create("owner", "key", "request", fail)
        create.may_end.set()
        assert await cache.get_or_create("owner", "key", "another request", create) == 1

    run_with_cache(test)


def test_responses_are_limited_in_number_and_time(monkeypatch):
    async def test(cache: ResponseCache[int], create: Counter) -> None:
        create.may_end.set()
        for number in range(MAX_RESPONSES):
            await cache.get_or_create("owner", f"key {number}", "request", create)
        assert await cache.get_or_create("owner", "key 0", "request", create) == 1
        assert await cache.get_or_create("owner", "one more", "request", create) == MAX_RESPONSES + 1
        assert await cache.get_or_create("owner", "key 1", "request", create) == 2
        # The oldest was removed.
        assert await cache.get_or_create("owner", "key 0", "request", create) == MAX_RESPONSES + 2
        monkeypatch.setattr(serve.http.idempotency, "KEEP_S", 0.0)
        assert await cache.get_or_create("owner", "key 2", "request", create) == MAX_RESPONSES + 3
        assert len(cache._entries) == 1

    run_with_cache(test)


def test_a_client_with_many_responses_loses_its_own():
    async def test(cache: ResponseCache[int], create: Counter) -> None:
        create.may_end.set()
        kept = await cache.get_or_create("careful", "key", "request", create)
        for number in range(MAX_RESPONSES + 10):
            await cache.get_or_create("greedy", f"key {number}", "request", create)
        assert await cache.get_or_create("careful", "key", "request", create) == kept
        assert len(cache._entries) == MAX_RESPONSES

    run_with_cache(test)
