"""Requests on their way through the engine: whose turn is next, and how their tokens reach whoever waits for them."""

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from graft.inference.engines.kv_cache import whole_columns
from graft.inference.engines.protocol import EngineRequest, Token

Item = Token | Exception | None
"""A token, or what ends the stream: an error or None."""

ENCODER_ROWS = 32
"""Clips that are encoded together: 30 s windows of more would need more memory than the cache."""


@dataclass(eq=False)
class Row:
    """A request on its way through the engine and the stream that waits for its tokens, in the event loop that made it."""

    request: EngineRequest
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    outbox: "asyncio.Queue[Item]" = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    is_over: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @cached_property
    def length(self) -> int:
        """The columns that it may come to need."""
        return whole_columns(self.prompt_length + self.request.max_new_tokens)

    @property
    def position(self) -> int:
        """That of its last token, its prompt's first being 0."""
        return self.prompt_length + len(self.tokens) - 1


def pick(waiting: Sequence[Row], running: Sequence[Row], max_batch_tokens: int, max_prefill_tokens: int) -> list[Row]:
    """The row that has waited longest, as soon as it fits beside those that run, and those nearest to it in length, as many as fit."""
    picked: list[Row] = []
    longest = max((row.length for row in running), default=0)
    longest_prompt = 0
    for row in heapq.nsmallest(ENCODER_ROWS, waiting, key=lambda row: abs(row.length - waiting[0].length)):
        longest, longest_prompt = max(longest, row.length), max(longest_prompt, row.prompt_length)
        count = len(picked) + 1
        if (running or picked) and longest * (len(running) + count) > max_batch_tokens:
            break
        if picked and longest_prompt * count > max_prefill_tokens:
            break
        picked.append(row)
    return picked


def longest_of(rows: Iterable[Row]) -> int:
    """The most tokens that one of the rows has so far."""
    return max(row.position for row in rows) + 1


def underway(rows: Iterable[Row]) -> int:
    """How many of the rows have tokens to come: one is over as soon as its last token goes out, wherever it is still listed."""
    return sum(not row.is_over for row in rows)


def send(items: Iterable[tuple[Row, Item]]) -> None:
    """Hand over tokens, or end streams with an error or None; every event loop is woken once."""
    parcels: defaultdict[asyncio.AbstractEventLoop, list[tuple[Row, Item]]] = defaultdict(list)
    for row, item in items:
        row.is_over |= not isinstance(item, Token)
        parcels[row.loop].append((row, item))
    for loop, parcel in parcels.items():
        try:
            loop.call_soon_threadsafe(_deliver, parcel)
        except RuntimeError:  # the loop is closed: nobody listens any more
            for row, _ in parcel:
                row.is_over = True


async def received(row: Row) -> Token | None:
    """The row's next token, None after the last. Raises the error that ends its stream."""
    item = await row.outbox.get()
    if isinstance(item, Exception):
        raise item
    return item


def _deliver(parcel: Sequence[tuple[Row, Item]]) -> None:
    for row, item in parcel:
        row.outbox.put_nowait(item)
