"""Keep responses by idempotency key, so that a request that is sent again is not transcribed again."""

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Generic, TypeVar

from .errors import ApiError

T = TypeVar("T")

MAX_RESPONSES = 1_000
KEEP_S = 600.0
"""Seconds for which a response is kept."""


class ResponseCache(Generic[T]):
    """Keeps the last responses of this process for ten minutes; failures are not kept.

    Where there are too many, the owner of the most loses its oldest.
    """

    def __init__(self) -> None:
        # By owner and key: the request, when its response was first asked for, and the response.
        self._entries: dict[tuple[str, str], tuple[str, float, asyncio.Task[T]]] = {}

    async def get_or_create(
        self, owner: str, name: str, request: str, create: Callable[[], Coroutine[None, None, T]]
    ) -> T:
        """Return the response that was created, or is being created, under an owner's key; else create it.

        It is created completely even if the caller is cancelled: its task has a context of its own, because Ray Serve
        cancels the remote calls of a request with the request. Engine replicas therefore log its chunks under another
        request id. Raises ApiError where the key came with another request.
        """
        now, key = time.monotonic(), (owner, name)
        for old_key, (_, since, task) in list(self._entries.items()):
            if since < now - KEEP_S and task.done():
                del self._entries[old_key]
        if key not in self._entries:
            while len(self._entries) >= MAX_RESPONSES:
                ((most, _),) = Counter(owner for owner, _ in self._entries).most_common(1)
                del self._entries[next(entry for entry in self._entries if entry[0] == most)]  # the oldest
            task = asyncio.create_task(create(), context=contextvars.Context())
            self._entries[key] = request, now, task
            task.add_done_callback(lambda done: self._remove_failure(key, done))
        known_request, _, response = self._entries[key]
        if known_request != request:
            message = "the idempotency key belongs to another request"
            raise ApiError(409, message, code="idempotency_key_reused")
        return await asyncio.shield(response)

    def _remove_failure(self, key: tuple[str, str], done: "asyncio.Task[T]") -> None:
        if (done.cancelled() or done.exception()) and key in self._entries and self._entries[key][-1] is done:
            del self._entries[key]
