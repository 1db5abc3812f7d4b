"""Bound the uploads that are arriving: how many there are, of each client and in all, and how slow one may be."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..service import Client, ServiceBusy
from .errors import ApiError

PATIENCE_S = 15.0
"""Seconds for which an upload may stall, at its start and after any time at a sufficient rate."""
RETRY_AFTER_S = 5
"""Seconds after which to try again where too many uploads are arriving."""


class UploadCounts:
    """Counts uploads by client."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __getitem__(self, client: Client) -> int:
        return self._counts[client.id]

    @contextmanager
    def one_of(self, client: Client) -> Iterator[None]:
        """Count an upload of a client until the block ends."""
        self._counts[client.id] += 1
        try:
            yield
        finally:
            self._counts[client.id] -= 1
            if not self._counts[client.id]:
                del self._counts[client.id]

    def check(self, client: Client, limit: int) -> None:
        """Raise ServiceBusy where one more upload of a client exceeds a limit.

        Beyond the limit, a client gets no more than its share: the limit divided by the number of clients that upload.
        Beyond twice the limit nobody gets more.
        """
        total, clients = self._counts.total(), len(self._counts.keys() | {client.id})
        has_share = self._counts[client.id] >= max(1, limit // clients)
        if (total >= limit and has_share) or total >= 2 * limit:
            raise ServiceBusy(RETRY_AFTER_S, "too many uploads are arriving")


class UploadTimer:
    """Says until when the next part of an upload must come.

    All of it must arrive within `max_s` seconds. At `min_bytes_per_s` or more it never stalls; each second at a lower
    rate uses up some of PATIENCE_S, which bytes beyond the rate restore. A rate of 0 allows any pause.
    """

    def __init__(self, max_s: float, min_bytes_per_s: float) -> None:
        self._max_s, self._min_bytes_per_s = max_s, min_bytes_per_s
        now = time.monotonic()
        self._end = now + max_s
        self._stall_end = now + PATIENCE_S if min_bytes_per_s else self._end

    @property
    def remaining_s(self) -> float:
        """Seconds within which the next part must come."""
        return min(self._end, self._stall_end) - time.monotonic()

    def on_part(self, byte_count: int) -> None:
        """Note that a part has come."""
        if self._min_bytes_per_s:
            gained_s = byte_count / self._min_bytes_per_s
            self._stall_end = min(self._stall_end + gained_s, time.monotonic() + PATIENCE_S)

    def error(self) -> ApiError:
        """Return the error for an upload whose next part did not come in time."""
        if self._end <= self._stall_end:
            return ApiError(408, f"the upload took longer than {self._max_s:g} s: send it again")
        rate = f"{self._min_bytes_per_s:g} bytes a second"
        return ApiError(408, f"the upload came at less than {rate}: send it again over a faster connection")
