"""Keep responses by idempotency key, so that a request that is sent again is not transcribed again."""

import asyncio
import contextvars
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_RESPONSES = 1_000
KEEP_S = 600.0
"""Seconds for which a response is kept."""


class IdempotencyKeyReused(Exception):
    """An idempotency key came with another request than before."""


@dataclass(frozen=True)
class _Entry(Generic[T]):
    request: str
    since: float
    response: "asyncio.Task[T]"


class ResponseCache(Generic[T]):
    """Keeps the last responses of this process for ten minutes; failures are not kept."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry[T]] = {}

    async def get_or_create(self, key: str, request: str, create: Callable[[], Coroutine[None, None, T]]) -> T:
        """Return the response that was created, or is being created, under a key; else create it.

        It is created completely even if the caller is cancelled: its task has a context of its own, because Ray Serve
        cancels the remote calls of a request with the request. Engine replicas therefore log its chunks under another
        request id. Raises IdempotencyKeyReused where the key came with another request.
        """
        self._remove_expired()
        if (entry := self._entries.get(key)) is None:
            while len(self._entries) >= MAX_RESPONSES:
                del self._entries[next(iter(self._entries))]  # the oldest
            task = asyncio.create_task(create(), context=contextvars.Context())
            entry = self._entries[key] = _Entry(request, time.monotonic(), task)
            task.add_done_callback(lambda done: self._remove_failure(key, done))
        if entry.request != request:
            raise IdempotencyKeyReused
        return await asyncio.shield(entry.response)

    def _remove_failure(self, key: str, done: "asyncio.Task[T]") -> None:
        is_failure = done.cancelled() or done.exception()
        if is_failure and (entry := self._entries.get(key)) and entry.response is done:
            del self._entries[key]

    def _remove_expired(self) -> None:
        oldest = time.monotonic() - KEEP_S
        for key, entry in list(self._entries.items()):
            if entry.since < oldest and entry.response.done():
                del self._entries[key]
