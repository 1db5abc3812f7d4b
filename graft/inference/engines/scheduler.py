"""Keep decode rows in order of admission and deliver their tokens to the event loops that read them."""

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from graft.inference.engines.kv_cache import round_up_columns
from graft.inference.engines.protocol import EngineRequest, Token

# A token, or the end of a stream: an error or None.
Item = Token | Exception | None

# Most clips that are encoded together: 30 s windows of more would need more memory than the KV cache.
ENCODER_ROWS = 32


@dataclass(eq=False)
class Row:
    """A request under way and the queue of its tokens, which the event loop that made the row reads."""

    request: EngineRequest
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    outbox: "asyncio.Queue[Item]" = field(default_factory=asyncio.Queue)
    is_over: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prefix_ids)  # of the answer

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def read_length(self) -> int:
        """Tokens that are read together before the first new one: the prompt and the answer's prefix."""
        return self.prompt_length + len(self.request.prefix_ids)

    @cached_property
    def length(self) -> int:
        """Columns of a KV cache slot that hold the prompt and the longest answer."""
        return round_up_columns(self.prompt_length + self.request.max_new_tokens)

    @property
    def position(self) -> int:
        """Position of the last token; that of the prompt's first token is 0."""
        return self.prompt_length + len(self.tokens) - 1


def check_prefix(request: EngineRequest) -> None:
    """Raise ValueError for a request whose prefix leaves its answer no room for a token."""
    count = len(request.prefix_ids)
    if count and count >= request.max_new_tokens:
        raise ValueError(f"the prefix has {count} tokens, and the answer may have {request.max_new_tokens}")


def pick_admissible(
    waiting: Sequence[Row],
    running: Sequence[Row],
    max_batch_tokens: int,
    max_prefill_tokens: int,
    *,
    window: int = 0,
) -> list[Row]:
    """Pick the rows to admit next: the one that has waited longest, as soon as it fits beside the running rows, and as
    many of those nearest to it in length as fit with it. Each row takes `window` tokens more than its own.
    """
    picked: list[Row] = []
    longest = max((row.length for row in running), default=0)
    longest_prompt = 0
    for row in heapq.nsmallest(ENCODER_ROWS, waiting, key=lambda row: abs(row.length - waiting[0].length)):
        longest, longest_prompt = max(longest, row.length), max(longest_prompt, row.read_length)
        count = len(picked) + 1
        exceeds_batch = (running or picked) and (window + longest) * (len(running) + count) > max_batch_tokens
        if exceeds_batch or (picked and (window + longest_prompt) * count > max_prefill_tokens):
            break
        picked.append(row)
    return picked


def deliver(items: Iterable[tuple[Row, Item]]) -> None:
    """Send rows their tokens, or the error or None that ends their streams; each event loop is woken once."""
    items_of_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[Row, Item]]] = defaultdict(list)
    for row, item in items:
        row.is_over |= not isinstance(item, Token)
        items_of_loop[row.loop].append((row, item))
    for loop, batch in items_of_loop.items():
        try:
            loop.call_soon_threadsafe(_fill_outboxes, batch)
        except RuntimeError:  # the loop is closed: nobody reads these streams any more
            for row, _ in batch:
                row.is_over = True


async def next_token(row: Row) -> Token | None:
    """Wait for the row's next token; None after the last. Raises the error that ends its stream."""
    item = await row.outbox.get()
    if isinstance(item, Exception):
        raise item
    return item


def _fill_outboxes(batch: Sequence[tuple[Row, Item]]) -> None:
    for row, item in batch:
        row.outbox.put_nowait(item)
