"""Share processes and places among clients, so that the one that has had least is served next."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Usage:
    """Keeps how much each client has used.

    Who has used nothing for a while, or comes for the first time, counts as having used as much as the client that was
    served last: idle time earns no credit, and past use is forgotten once others have had as much.
    """

    def __init__(self) -> None:
        self._used: dict[str, float] = {}  # of clients above the level
        self._level = 0.0

    def __getitem__(self, client: str) -> float:
        return self._used.get(client, self._level)

    def serve(self, client: str) -> None:
        """Note that a client is served now: nobody counts as having used less."""
        self._level = max(self._level, self[client])
        self._used = {other: used for other, used in self._used.items() if used > self._level}

    def add(self, client: str, amount: float) -> None:
        """Note that a client has used so much more."""
        self._used[client] = self[client] + amount


class FairSlots:
    """Limits the calls that run at a time, in all and of one client.

    The client that has fewest running gets the next free slot; of several such, the one that has had fewest.
    """

    def __init__(self, total: int, per_client: int) -> None:
        self._total, self._per_client = total, per_client
        self._held: Counter[str] = Counter()
        self._usage = Usage()
        self._waiting: dict[asyncio.Future[None], str] = {}  # in order of arrival

    @asynccontextmanager
    async def slot(self, client: str) -> AsyncIterator[None]:
        """Wait for a slot and hold it until the block ends."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[granted] = client
        self._grant()
        try:
            await granted
            yield
        finally:
            if self._waiting.pop(granted, None) is None:  # it was granted, though perhaps to a cancelled task
                self._held -= Counter({client: 1})
                self._grant()

    def _grant(self) -> None:
        """Give free slots to those that wait."""
        while self._held.total() < self._total:
            eligible = [one for one, client in self._waiting.items() if self._held[client] < self._per_client]
            if not eligible:
                return
            granted = min(eligible, key=self._priority)  # the first of equal ones
            client = self._waiting.pop(granted)
            self._held[client] += 1
            self._usage.serve(client)
            self._usage.add(client, 1)
            if not granted.done():
                granted.set_result(None)

    def _priority(self, waiting: asyncio.Future[None]) -> tuple[int, float]:
        client = self._waiting[waiting]
        return self._held[client], self._usage[client]
