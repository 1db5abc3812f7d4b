"""Decode with transformers and continuous batching: rows join and leave the batch between decode steps.

    stream() -> waiting -> admission within budgets -> prefill -> a slot of the KV cache -> step, step, ... -> the row's
    stream

One thread owns the model. In each turn it prefills at most one group of rows, then takes one decode step with all rows,
so that neither running nor waiting rows are held up for long. In fp32, the rows beside it never change a row's tokens.
"""

import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

import torch

from graft.inference.engines.kv_cache import SlotDecoder
from graft.inference.engines.protocol import EngineCounts, EngineRequest, Token
from graft.inference.engines.sampling import choose_tokens, repeating_ids
from graft.inference.engines.scheduler import Row, check_prefix, deliver, next_token, pick_admissible


class TransformersEngine:
    """Decodes greedily with transformers, in a batch that rows join and leave at any step.

    Tokens equal those of `model.generate(..., do_sample=False)`. `max_batch_tokens` bounds the rows that decode
    together times the length of the longest: prompt and most answer, rounded up to kv_cache.COLUMNS, and a Whisper's
    window. `max_prefill_tokens` bounds the rows whose prompts are read between two steps times the longest prompt,
    window included. One row alone may exceed both. An idle engine waits for more requests as long as another one
    arrives every `gather_s` seconds, at most ten times as long. Where the model fails on several rows, it is tried
    again on each half of them: only the rows that fail alone end, with the model's error, or with MemoryError. Call
    `close` to release the model.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        *,
        eos_ids: Collection[int],
        max_batch_tokens: int = 16_384,
        max_prefill_tokens: int = 4_096,
        gather_s: float = 0.01,
    ) -> None:
        decoder.reserve(max_batch_tokens)
        self._decoder = decoder
        self._device = decoder.device
        self._max_length = decoder.max_length
        self._eos_ids = frozenset(eos_ids)
        self._max_batch_tokens = max_batch_tokens
        self._max_prefill_tokens = max_prefill_tokens
        self._gather_s = gather_s
        self._running: list[Row] = []  # in the order of their slots; the engine's thread owns it and the next four
        self._prefills = self._steps = self._tokens = 0
        self._busy_s = 0.0
        self._rows: dict[str, Row] = {}
        self._waiting: list[Row] = []
        self._is_closed = False
        self._changed = threading.Condition()  # guards the three fields above
        self._thread = threading.Thread(target=self._work, name="graft-engine", daemon=True)
        self._thread.start()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """Stream an answer, as Engine says.

        Raises ValueError for an id under way or too long a request, RuntimeError for a closed engine.
        """
        row = Row(request)
        length = row.prompt_length + request.max_new_tokens
        if self._max_length and length > self._max_length:
            raise ValueError(f"prompt and answer may have {length} tokens: the model takes {self._max_length}")
        check_prefix(request)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            if request.request_id in self._rows:
                raise ValueError(f"request {request.request_id} is already under way")
            self._rows[request.request_id] = row
            self._waiting.append(row)
            self._changed.notify()
        try:
            while token := await next_token(row):
                yield token
        finally:
            self._leave(row)

    def abort(self, request_id: str) -> None:
        """End a request, as Engine says. Its row leaves the KV cache before the next step."""
        if row := self._rows.get(request_id):
            self._leave(row)

    def counts(self) -> EngineCounts:
        """Return the engine's state and totals, as Engine says."""
        running = sum(not row.is_over for row in self._running)  # a row is over before it has left its slot
        return EngineCounts(running, len(self._waiting), self._prefills, self._steps, self._tokens, self._busy_s)

    def close(self) -> None:
        """Stop decoding, as Engine says."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _leave(self, row: Row) -> None:
        with self._changed:
            if self._rows.get(row.request.request_id) is row:
                del self._rows[row.request.request_id]
            if row in self._waiting:
                self._waiting.remove(row)
        if not row.is_over:
            deliver([(row, None)])

    @torch.inference_mode()
    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while self._wait_for_work():
            start = time.monotonic()
            try:
                self._run_turn()
            except Exception as error:  # outside the model: which row is in which slot is no longer known
                with self._changed:
                    self._waiting = []
                    deliver([(row, error) for row in self._rows.values()])
                self._running = []
                self._decoder.slots.keep([])
            self._busy_s += time.monotonic() - start
        with self._changed:
            deliver((row, RuntimeError("the engine is closed")) for row in self._rows.values())
        del self._decoder

    def _wait_for_work(self) -> bool:
        """Wait until rows run or wait; returns False when the engine is closed."""
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                # While more requests arrive, they are waited for, so that they are prefilled together.
                deadline, seen = time.monotonic() + 10 * self._gather_s, 0
                while seen != len(self._waiting) and time.monotonic() < deadline and not self._is_closed:
                    seen = len(self._waiting)
                    self._changed.wait(self._gather_s)
            return not self._is_closed

    def _run_turn(self) -> None:
        self._retire()
        with self._changed:
            group = pick_admissible(
                self._waiting,
                self._running,
                self._max_batch_tokens,
                self._max_prefill_tokens,
                window=self._decoder.slots.window,
            )
            if picked := set(group):
                self._waiting = [row for row in self._waiting if row not in picked]
        if group:
            self._try_in_halves(group, self._prefill)
        self._retire()
        if self._running:
            self._decoder.slots.fit(max(row.position for row in self._running) + 1)
            self._try_in_halves(self._running, self._step)

    def _retire(self) -> None:
        kept = [slot for slot, row in enumerate(self._running) if not row.is_over]
        if len(kept) < len(self._running):
            self._running = [self._running[slot] for slot in self._decoder.slots.keep(kept)]

    def _try_in_halves(self, rows: list[Row], work: Callable[[list[Row]], None]) -> None:
        """Do work for rows or, where it fails, for each half of them; a row for which it fails alone ends.

        Its stream raises the error, or MemoryError with a remedy where memory ran out.
        """
        try:
            work(rows)
            return
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the rows' tensors
            failure = error
            if is_out_of_memory(error):
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                failure = MemoryError(
                    f"not enough memory for one request: lower max_batch_tokens, now {self._max_batch_tokens}"
                )
                failure.__cause__ = error
        if len(rows) == 1:
            deliver([(rows[0], failure)])
        else:
            self._try_in_halves(rows[: len(rows) // 2], work)
            self._try_in_halves(rows[len(rows) // 2 :], work)

    def _prefill(self, rows: list[Row]) -> None:
        together = [*self._running, *rows]
        cache, logits = self._decoder.prefill([row.request for row in rows])
        only = {index: row.request.first_ids for index, row in enumerate(rows) if row.request.first_ids}
        # Answers with a prefix have begun already.
        first = [index for index, row in enumerate(rows) if not row.tokens and index not in only]
        logits[first] = logits[first].index_fill(1, self._decoder.first_suppressed_ids, float("-inf"))
        chosen = choose_tokens(logits, self._decoder.suppressed_ids, _blocked_ids(rows), only)
        slots = self._decoder.slots
        longest = slots.window + max(row.length for row in together)
        self._decoder.reserve(max(self._max_batch_tokens, len(together) * longest))
        slots.fit(max(row.position for row in together) + 1)
        self._decoder.join(cache, [row.read_length for row in rows])
        self._running = together
        self._prefills += 1
        self._send_tokens(rows, *chosen)

    def _step(self, rows: list[Row]) -> None:
        first = self._running.index(rows[0])
        logits = self._decoder.step([row.tokens[-1] for row in rows], [row.position for row in rows], first=first)
        chosen = choose_tokens(logits, self._decoder.suppressed_ids, _blocked_ids(rows))
        self._steps += 1
        self._send_tokens(rows, *chosen)

    def _send_tokens(self, rows: Sequence[Row], ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Send each row its next token, and end those that are complete."""
        items: list[tuple[Row, Token | None]] = []
        for row, id, logprob in zip(rows, ids, logprobs, strict=True):
            row.tokens.append(id)
            if id not in self._eos_ids:
                items.append((row, Token(id, logprob)))
            if id in self._eos_ids or len(row.tokens) == row.request.max_new_tokens:
                items.append((row, None))
        self._tokens += sum(item is not None for _, item in items)
        deliver(items)


def _blocked_ids(rows: Sequence[Row]) -> dict[int, list[int]]:
    """Return the ids that would repeat an n-gram, by row index."""
    blocked = {index: repeating_ids(row.tokens, row.request.no_repeat_ngram) for index, row in enumerate(rows)}
    return {index: ids for index, ids in blocked.items() if ids}


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of a device or of the machine ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in str(error)
