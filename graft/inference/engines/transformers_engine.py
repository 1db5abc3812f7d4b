"""The engine that works everywhere: a thread that owns the model, and rows that join and leave between its decode steps.

    stream() -> waiting -> pick: the oldest and its like, within budgets -> prefill -> a slot -> step, step, ... -> the row's own stream

A turn prefills one group at most, then takes a step with all rows: neither those that run nor those that wait are kept for long.
In fp32 a row's tokens are never changed by the rows beside it.
"""

import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

import torch

from graft.inference.engines.kv_cache import SlotDecoder
from graft.inference.engines.protocol import EngineCounts, EngineRequest, Token
from graft.inference.engines.sampling import choose, repeating_ids
from graft.inference.engines.scheduler import Row, longest_of, pick, received, send, underway
from graft.model.modeling import GraftForConditionalGeneration


class TransformersEngine:
    """Greedy decoding with transformers, in a batch that rows join and leave at any step.

    Tokens equal those of `model.generate(..., do_sample=False)`; ids in the generation config's `suppress_tokens` never come.
    `max_batch_tokens` bounds the rows that decode together times the longest (prompt and most answer, rounded up to slots.COLUMNS);
    `max_prefill_tokens` bounds the rows whose prompts are read between two steps times the longest prompt; both but for one row. An idle
    engine waits for more requests as long as another comes every `gather_s` seconds, at most ten times as long. Where the model fails on
    several rows, each half of them is tried by itself: only those on which it fails alone end, with its error, or with MemoryError.
    `graphs` says whether steps are CUDA graphs, by default on CUDA. Call `close` to release the model.
    """

    def __init__(
        self,
        model: GraftForConditionalGeneration,
        *,
        pad_id: int,
        eos_ids: Collection[int],
        max_batch_tokens: int = 16_384,
        max_prefill_tokens: int = 4_096,
        gather_s: float = 0.01,
        graphs: bool | None = None,
    ) -> None:
        self._device = model.device
        graphs = graphs if graphs is not None else self._device.type == "cuda"
        self._decoder = SlotDecoder(model, pad_id=pad_id, tokens=max_batch_tokens, graphs=graphs)
        self._eos_ids = frozenset(eos_ids)
        self._suppressed_ids = torch.tensor(
            model.generation_config.suppress_tokens or [], dtype=torch.long, device=self._device
        )
        self._max_batch_tokens = max_batch_tokens
        self._max_prefill_tokens = max_prefill_tokens
        self._gather_s = gather_s
        self._running: list[Row] = []  # in the order of their slots; the thread's own, as the next four
        self._prefills = self._steps = self._tokens = 0
        self._busy_s = 0.0
        self._rows: dict[str, Row] = {}
        self._waiting: list[Row] = []
        self._is_closed = False
        self._changed = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._work, name="graft-engine", daemon=True)
        self._thread.start()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """See Engine. Raises ValueError for an id that is under way, RuntimeError when the engine is closed."""
        row = Row(request)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            if request.request_id in self._rows:
                raise ValueError(f"request {request.request_id} is already under way")
            self._rows[request.request_id] = row
            self._waiting.append(row)
            self._changed.notify()
        try:
            while token := await received(row):
                yield token
        finally:
            self._leave(row)

    def abort(self, request_id: str) -> None:
        """See Engine. The row leaves its slot before the next step."""
        if row := self._rows.get(request_id):
            self._leave(row)

    def counts(self) -> EngineCounts:
        """See Engine."""
        return EngineCounts(
            underway(self._running), len(self._waiting), self._prefills, self._steps, self._tokens, self._busy_s
        )

    def close(self) -> None:
        """See Engine."""
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
            send([(row, None)])

    @torch.inference_mode()
    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while self._is_wanted():
            start = time.monotonic()
            try:
                self._turn()
            except Exception as error:
                self._drop(error)
            self._busy_s += time.monotonic() - start
        with self._changed:
            send((row, RuntimeError("the engine is closed")) for row in self._rows.values())
        del self._decoder

    def _is_wanted(self) -> bool:
        """Wait for something to do; False when the engine is closed."""
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                self._linger()
            return not self._is_closed

    def _linger(self) -> None:
        deadline, seen = time.monotonic() + 10 * self._gather_s, 0
        while seen != len(self._waiting) and time.monotonic() < deadline and not self._is_closed:
            seen = len(self._waiting)
            self._changed.wait(self._gather_s)

    def _turn(self) -> None:
        self._retire()
        if group := self._admit():
            self._try(group, self._prefill)
        self._retire()
        if self._running:
            self._decoder.fit(longest_of(self._running))
            self._try(self._running, self._step)

    def _retire(self) -> None:
        kept = [slot for slot, row in enumerate(self._running) if not row.is_over]
        if len(kept) < len(self._running):
            self._running = [self._running[slot] for slot in self._decoder.keep(kept)]

    def _admit(self) -> list[Row]:
        """Take the next group out of the queue."""
        with self._changed:
            group = pick(self._waiting, self._running, self._max_batch_tokens, self._max_prefill_tokens)
            if picked := set(group):
                self._waiting = [row for row in self._waiting if row not in picked]
            return group

    def _drop(self, error: Exception) -> None:
        """End everything: it is not known any more which row is where."""
        with self._changed:
            self._waiting = []
            send([(row, error) for row in self._rows.values()])
        self._running = []
        self._decoder.keep([])

    def _try(self, rows: list[Row], work: Callable[[list[Row]], None]) -> None:
        """Do work for rows or, where it fails, for each half of them; a row for which it fails alone ends."""
        try:
            work(rows)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the rows' tensors
            fault = self._told(error)
        else:
            return
        if len(rows) == 1:
            send([(rows[0], fault)])
        else:
            self._try(rows[: len(rows) // 2], work)
            self._try(rows[len(rows) // 2 :], work)

    def _told(self, error: Exception) -> Exception:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate" not in str(error):
            return error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        told = MemoryError(f"not enough memory for one request: lower max_batch_tokens, now {self._max_batch_tokens}")
        told.__cause__ = error
        return told

    def _prefill(self, rows: list[Row]) -> None:
        together = [*self._running, *rows]
        cache, logits = self._decoder.prefill([row.request for row in rows])
        chosen = choose(logits, self._suppressed_ids, {})
        self._decoder.reserve(max(self._max_batch_tokens, len(together) * max(row.length for row in together)))
        self._decoder.fit(longest_of(together))
        self._decoder.join(cache, [row.prompt_length for row in rows])
        self._running = together
        self._prefills += 1
        self._hand_out(rows, *chosen)

    def _step(self, rows: list[Row]) -> None:
        first = self._running.index(rows[0])
        logits = self._decoder.step([row.tokens[-1] for row in rows], [row.position for row in rows], first=first)
        blocked = {place: repeating_ids(row.tokens, row.request.no_repeat_ngram) for place, row in enumerate(rows)}
        chosen = choose(logits, self._suppressed_ids, {place: ids for place, ids in blocked.items() if ids})
        self._steps += 1
        self._hand_out(rows, *chosen)

    def _hand_out(self, rows: Sequence[Row], ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Send each row its next token, and end those that are complete."""
        items: list[tuple[Row, Token | None]] = []
        for row, id, logprob in zip(rows, ids, logprobs, strict=True):
            row.tokens.append(id)
            if id not in self._eos_ids:
                items.append((row, Token(id, logprob)))
            if id in self._eos_ids or len(row.tokens) == row.request.max_new_tokens:
                items.append((row, None))
        self._tokens += sum(item is not None for _, item in items)
        send(items)
