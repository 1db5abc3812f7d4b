"""The engine that works everywhere: a thread that owns the model and decodes one left-padded batch after another.

    stream() -> waiting -> _admit: rows of like length within a token budget -> prefill -> step, step, ... -> each row's own stream

A row leaves its batch the moment it ends or is aborted. In fp32 the rows beside it never change its tokens.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from graft.engines import EngineRequest, Token
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import collate_features, pad_prompts

ENCODER_ROWS = 32
"""Clips that are encoded together: 30 s windows of a whole batch would need more memory than its cache."""


@dataclass(eq=False)
class _Row:
    """A request on its way through the engine and the stream that waits for its tokens."""

    request: EngineRequest
    loop: asyncio.AbstractEventLoop
    outbox: "asyncio.Queue[Token | Exception | None]"
    token_count: int = 0
    is_over: bool = False

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    def send(self, item: Token | Exception | None) -> None:
        """Hand over a token, or end the stream with an error or None."""
        if not isinstance(item, Token):
            self.is_over = True
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.is_over = True


class TransformersEngine:
    """Greedy decoding with transformers, batched.

    Tokens equal those of `model.generate(..., do_sample=False)`; ids in the generation config's `suppress_tokens` never come.
    `max_batch_tokens` bounds the rows times the longest row (prompt and answer) of a batch, one row aside; a batch waits for more requests
    as long as another comes every `gather_s` seconds, at most ten times as long. Call `close` to release the model.
    """

    def __init__(
        self,
        model: GraftForConditionalGeneration,
        *,
        pad_id: int,
        eos_ids: Collection[int],
        max_batch_tokens: int = 16_384,
        gather_s: float = 0.01,
    ) -> None:
        self._model = model.eval()
        self._pad_id = pad_id
        self._eos_ids = frozenset(eos_ids)
        self._suppressed_ids = list(model.generation_config.suppress_tokens or [])
        self._max_batch_tokens = max_batch_tokens
        self._gather_s = gather_s
        self._rows: dict[str, _Row] = {}
        self._waiting: list[_Row] = []
        self._is_closed = False
        self._changed = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._work, name="graft-engine", daemon=True)
        self._thread.start()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """See Engine. Raises ValueError for an id that is under way, RuntimeError when the engine is closed."""
        row = _Row(request, asyncio.get_running_loop(), asyncio.Queue())
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            if request.request_id in self._rows:
                raise ValueError(f"request {request.request_id} is already under way")
            self._rows[request.request_id] = row
            self._waiting.append(row)
            self._changed.notify()
        try:
            while (item := await row.outbox.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """See Engine. The row leaves its batch before the next step."""
        with self._changed:
            row = self._rows.pop(request_id, None)
            if row in self._waiting:
                self._waiting.remove(row)
        if row is not None:
            row.send(None)

    def close(self) -> None:
        """See Engine."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while rows := self._admit():
            try:
                self._decode(rows)
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold the batch's tensors
                _end(rows, error)
        with self._changed:
            _end(list(self._rows.values()), RuntimeError("the engine is closed"))
        del self._model

    def _admit(self) -> list[_Row]:
        """Wait for requests and take a batch of them out of the queue; nothing when the engine is closed."""
        with self._changed:
            while not self._is_closed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                self._linger()
                if self._waiting and not self._is_closed:
                    rows = _pick(self._waiting, self._max_batch_tokens)
                    self._waiting = [row for row in self._waiting if row not in rows]
                    return rows
            return []

    def _linger(self) -> None:
        deadline, seen = time.monotonic() + 10 * self._gather_s, 0
        while seen != len(self._waiting) and time.monotonic() < deadline and not self._is_closed:
            seen = len(self._waiting)
            self._changed.wait(self._gather_s)

    @torch.inference_mode()
    def _decode(self, rows: list[_Row]) -> None:
        batch = _Batch(self._model, rows)
        logits = batch.prefill(self._pad_id)
        while True:
            ids = self._hand_out(batch.rows, logits)
            kept = [index for index, row in enumerate(batch.rows) if not row.is_over]
            if not kept:
                return
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            if len(kept) < len(batch.rows):
                batch.keep(kept)
                ids = ids[kept]
            logits = batch.step(ids)

    def _hand_out(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """Choose each row's next token from (rows, vocabulary), send it, and end the rows that are complete; returns the ids (rows,)."""
        logits = logits.to(torch.float32, copy=True)
        logits[:, self._suppressed_ids] = float("-inf")
        best, ids = logits.max(dim=-1)
        logprobs = best - logits.logsumexp(dim=-1)
        for row, id, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            if id not in self._eos_ids:
                row.send(Token(id, logprob))
                row.token_count += 1
            if id in self._eos_ids or row.token_count == row.request.max_new_tokens:
                row.send(None)
        return ids


class _Batch:
    """Rows that decode in step, their attention mask (rows, tokens so far) and their cache."""

    def __init__(self, model: GraftForConditionalGeneration, rows: list[_Row]) -> None:
        self.rows = rows
        self._model = model
        self._mask = torch.empty(0)
        self._cache = DynamicCache(config=model.config.get_text_config())

    def prefill(self, pad_id: int) -> Tensor:
        """Encode the clips, read the prompts; returns the logits (rows, vocabulary) of each row's first token."""
        ids, mask = pad_prompts([row.request.prompt_ids for row in self.rows], pad_id)
        self._mask = torch.from_numpy(mask).to(self._model.device)
        embeddings = []
        for start in range(0, len(self.rows), ENCODER_ROWS):
            part = slice(start, start + ENCODER_ROWS)
            audio = collate_features([row.request.features for row in self.rows[part]])
            inputs = {"input_ids": ids[part], **audio}
            embeddings.append(self._model.embed(**{name: torch.from_numpy(array).to(self._model.device) for name, array in inputs.items()}))
        return self._forward(torch.cat(embeddings), (self._mask.cumsum(dim=1) - 1).clamp(min=0))

    def step(self, ids: Tensor) -> Tensor:
        """Append a token to every row; returns the logits (rows, vocabulary) of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        return self._forward(self._model.get_input_embeddings()(ids[:, None]), self._mask.sum(dim=1, keepdim=True) - 1)

    def keep(self, kept: list[int]) -> None:
        """Drop all other rows and their part of the cache."""
        self.rows = [self.rows[index] for index in kept]
        self._mask = self._mask[kept]
        self._cache.batch_select_indices(torch.tensor(kept, device=self._mask.device))

    def _forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        # Explicit positions (rows, length), equal in time, height and width: the model's own would depend on its last call (rope_deltas).
        output = self._model(
            inputs_embeds=embeddings,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _pick(waiting: Sequence[_Row], max_batch_tokens: int) -> list[_Row]:
    """The row that has waited longest and those nearest to it in length, as many as fit."""
    picked: list[_Row] = []
    longest = 0
    for row in sorted(waiting, key=lambda row: abs(row.length - waiting[0].length)):
        longest = max(longest, row.length)
        if picked and longest * (len(picked) + 1) > max_batch_tokens:
            break
        picked.append(row)
    return picked


def _end(rows: Sequence[_Row], error: Exception) -> None:
    for row in rows:
        row.send(error)
