"""Answers by idempotency key: a request that is sent again, because its answer was lost, is not transcribed again."""

import asyncio
import contextvars
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

MOST = 1_000
KEPT_S = 600.0


class KeyReused(Exception):
    """An idempotency key came with another request than before."""


@dataclass(frozen=True)
class _Kept(Generic[T]):
    request: str
    since: float
    answer: "asyncio.Task[T]"


class Answers(Generic[T]):
    """Keeps the last answers of this process for some minutes; failures are not kept."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept[T]] = {}

    async def once(self, key: str, request: str, make: Callable[[], Coroutine[None, None, T]]) -> T:
        """Make the answer to a request, or give the one that was made, or is being made, under the key.

        It is made to the end, also when whoever asked is gone: in a context of its own, or Ray Serve would cancel what it calls with the
        request. So engines tell of it under another request's id. Raises KeyReused for another request under the same key.
        """
        self._forget()
        if (known := self._kept.get(key)) is None:
            while len(self._kept) >= MOST:
                del self._kept[next(iter(self._kept))]
            known = self._kept[key] = _Kept(
                request, time.monotonic(), asyncio.create_task(make(), context=contextvars.Context())
            )
            known.answer.add_done_callback(lambda answer: self._drop_failure(key, answer))
        if known.request != request:
            raise KeyReused
        return await asyncio.shield(known.answer)

    def _drop_failure(self, key: str, answer: "asyncio.Task[T]") -> None:
        if (answer.cancelled() or answer.exception()) and (kept := self._kept.get(key)) and kept.answer is answer:
            del self._kept[key]

    def _forget(self) -> None:
        oldest = time.monotonic() - KEPT_S
        for key in [key for key, kept in self._kept.items() if kept.since < oldest and kept.answer.done()]:
            del self._kept[key]
