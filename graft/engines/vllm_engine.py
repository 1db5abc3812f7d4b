"""The engine for GPUs with much to do: encoder and projector in batches in PyTorch, the language model as a plain Qwen2 in vLLM.

    stream() -> waiting -> the oldest and its like: embeddings of their prompts -> vLLM, which batches rows itself -> the row's own stream

A thread with an event loop of its own owns the requests and vLLM's client; another encodes, while vLLM decodes in a process of its own.
"""

import asyncio
import contextlib
import heapq
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.engines import EngineCounts, EngineRequest, Token
from graft.engines.greedy import repeating_ids
from graft.engines.rows import ENCODER_ROWS, Row, send
from graft.errors import require
from graft.model.modeling import GraftForConditionalGeneration
from graft.model.split import language_model_folder, open_hearing_part
from graft.processor import GraftProcessor, collate_features

CPU_CACHE_BYTES = 2**30
MOST_WATCHED_IDS = 128
"""Of as many tokens vLLM tells the log-probabilities at every step, besides the one it chooses."""


def open_vllm_engine(
    path: str | Path,
    *,
    device: str = "cuda",
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    memory_fraction: float = 0.8,
    max_model_len: int = 4_096,
    max_requests: int = 256,
    tensor_parallel_size: int = 1,
    cache_bytes: int | None = None,
) -> tuple["VllmEngine", GraftProcessor]:
    """Open a graft's folder, a merged one or a hub id in vLLM, with its processor; the first time its language model is converted.

    The encoder runs on `device`, vLLM on the first `tensor_parallel_size` devices that the process sees, or on the CPU with its CPU build.
    vLLM takes `memory_fraction` of each, the rest is the encoder's; `cache_bytes` of it are for keys and values, by default what the
    weights leave, on a CPU 1 GiB. `max_model_len` bounds prompt and answer together, in tokens, `max_requests` what is decoded at once.
    `quantization` is vLLM's name of a method ("fp8", "bitsandbytes"). Raises MissingExtra without vLLM, ModelError as open_hearing_part.
    """
    vllm = require("vllm", extra="vllm")
    ears, processor = open_hearing_part(path, dtype=dtype, device=device)
    is_cpu = torch.device(device).type == "cpu"
    arguments = vllm.AsyncEngineArgs(
        model=str(language_model_folder(path)),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=str(next(ears.audio_projector.parameters()).dtype).removeprefix("torch."),
        quantization=quantization,
        enable_prompt_embeds=True,
        enable_prefix_caching=False,  # no clip comes twice, and to hash its embeddings takes longer than to read them
        gpu_memory_utilization=memory_fraction,
        kv_cache_memory_bytes=cache_bytes or (CPU_CACHE_BYTES if is_cpu else None),
        max_model_len=min(max_model_len, ears.config.get_text_config().max_position_embeddings),
        max_num_seqs=max_requests,
        tensor_parallel_size=tensor_parallel_size,
        distributed_executor_backend="mp" if tensor_parallel_size > 1 else None,  # within Ray it would take Ray's
        enforce_eager=is_cpu,  # there to compile takes minutes
        disable_log_stats=True,
    )
    return VllmEngine(ears, arguments, eos_ids=processor.end_ids(ears.generation_config)), processor


class VllmEngine:
    """Greedy decoding with vLLM: the same tokens as the transformers engine's, up to rounding.

    `ears` embeds prompts, `arguments` are vLLM's AsyncEngineArgs for its language model. A request waits `gather_s` for others to be
    encoded with. A clip on which the encoder fails ends alone, with its error; what vLLM fails at ends the streams that it is about. Call
    `close` to release the model.
    """

    def __init__(self, ears: GraftForConditionalGeneration, arguments: Any, *, eos_ids: Collection[int], gather_s: float = 0.01) -> None:
        self._ears = ears
        self._device = ears.audio_tower.conv1.weight.device
        self._eos_ids = frozenset(eos_ids)
        self._suppressed_ids = list(ears.generation_config.suppress_tokens or [])
        self._max_tokens, self._max_requests = arguments.max_model_len, arguments.max_num_seqs
        self._gather_s = gather_s
        self._rows: dict[str, Row] = {}  # this and the next six are the loop's own
        self._waiting: list[Row] = []
        self._encoding: list[Row] = []
        self._decoding: dict[Row, asyncio.Task[None]] = {}
        self._stepped: set[Row] = set()
        self._prefills = self._steps = self._tokens = 0
        self._busy_s = self._busy_since = 0.0
        self._changed = asyncio.Event()
        self._is_closed = False
        self._closing = threading.Lock()  # guards the one above
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-encode")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="graft-engine", daemon=True)
        self._thread.start()
        try:
            self._llm = asyncio.run_coroutine_threadsafe(_started(arguments), self._loop).result()
        except BaseException:
            self._stop()
            raise
        self._worker = asyncio.run_coroutine_threadsafe(self._work(), self._loop)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """See Engine. Raises ValueError for an id that is under way or too long a request, RuntimeError when the engine is closed."""
        row = Row(request, asyncio.get_running_loop(), asyncio.Queue())
        self._call(self._arrive, row)
        try:
            while (item := await row.outbox.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            with contextlib.suppress(RuntimeError):  # closed, and so over
                self._call(self._leave, row)

    def abort(self, request_id: str) -> None:
        """See Engine."""
        with contextlib.suppress(RuntimeError):
            self._call(self._abort, request_id)

    def counts(self) -> EngineCounts:
        """See Engine. vLLM does not tell its steps: a new one is counted when a row that had a token in the last has another."""
        running, waiting = len(self._decoding), len(self._waiting) + len(self._encoding)
        busy_s = self._busy_s + (time.monotonic() - self._busy_since if self._rows else 0)
        return EngineCounts(running, waiting, self._prefills, self._steps, self._tokens, busy_s)

    def close(self) -> None:
        """See Engine."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._stop()
        del self._llm, self._ears

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._encoder.shutdown()
        self._loop.close()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the engine's thread do something, in the order of the calls."""
        with self._closing:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            self._loop.call_soon_threadsafe(function, *arguments)

    # What follows runs in the engine's loop.

    def _arrive(self, row: Row) -> None:
        request = row.request
        length = row.prompt_length + request.max_new_tokens
        if request.request_id in self._rows:
            send([(row, ValueError(f"request {request.request_id} is already under way"))])
        elif length > self._max_tokens:
            send([(row, ValueError(f"prompt and answer may have {length} tokens: raise max_model_len, now {self._max_tokens}"))])
        else:
            self._busy_since = self._busy_since if self._rows else time.monotonic()
            self._rows[request.request_id] = row
            self._waiting.append(row)
            self._changed.set()

    def _abort(self, request_id: str) -> None:
        if row := self._rows.get(request_id):
            self._leave(row)

    def _leave(self, row: Row) -> None:
        if self._rows.get(row.request.request_id) is row:
            del self._rows[row.request.request_id]
            self._busy_s += 0 if self._rows else time.monotonic() - self._busy_since
        if row in self._waiting:
            self._waiting.remove(row)
        if task := self._decoding.pop(row, None):
            task.cancel()
            self._changed.set()
        if not row.is_over:
            send([(row, None)])

    async def _end(self) -> None:
        self._worker.cancel()
        send([(row, RuntimeError("the engine is closed")) for row in self._rows.values()])
        tasks = list(self._decoding.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown()

    async def _work(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._gather_s)
            self._changed.clear()
            while group := self._next_group():
                self._encoding = group
                embedded = await self._loop.run_in_executor(self._encoder, self._embedded, group)
                self._encoding = []
                self._prefills += 1
                for row, embeddings in zip(group, embedded, strict=True):
                    self._begin(row, embeddings)

    def _next_group(self) -> list[Row]:
        """Take rows out of the queue, as soon as as many of them can go on as are encoded at once: while many wait, batches are full."""
        room = self._max_requests + ENCODER_ROWS - len(self._decoding)
        if room < min(len(self._waiting), ENCODER_ROWS):
            return []
        group = heapq.nsmallest(ENCODER_ROWS, self._waiting, key=lambda row: abs(row.prompt_length - self._waiting[0].prompt_length))
        picked = set(group)
        self._waiting = [row for row in self._waiting if row not in picked]
        return group

    def _begin(self, row: Row, embeddings: Tensor | Exception) -> None:
        if row.is_over:
            return
        if isinstance(embeddings, Exception):
            send([(row, embeddings)])
        else:
            self._decoding[row] = self._loop.create_task(self._decode(row, embeddings))

    async def _decode(self, row: Row, embeddings: Tensor) -> None:
        end: Exception | None = None
        try:
            async with contextlib.aclosing(self._answer(row.request, embeddings)) as answer:
                async for token in answer:
                    self._count(row)
                    send([(row, token)])
        except Exception as error:
            end = error
        self._decoding.pop(row, None)
        self._changed.set()
        send([(row, end)])

    def _count(self, row: Row) -> None:
        self._tokens += 1
        if row in self._stepped or not self._stepped:
            self._stepped.clear()
            self._steps += 1
        self._stepped.add(row)

    async def _answer(self, request: EngineRequest, embeddings: Tensor) -> AsyncGenerator[Token, None]:
        """Decode, and where the next token would repeat an n-gram ask vLLM once more from there on, with such tokens blocked.

        That they stay blocked later on does no harm as long as none of them is likelier than the token chosen.
        """
        ids: list[int] = []
        while len(ids) < request.max_new_tokens:
            blocked = set(repeating_ids(ids, request.no_repeat_ngram))
            async with contextlib.aclosing(self._choices(request, embeddings, ids, blocked)) as choices:
                async for id, logprobs in choices:
                    repeating = set(repeating_ids(ids, request.no_repeat_ngram))
                    if id in repeating or any(logprobs[other] > logprobs[id] for other in blocked - repeating):
                        break
                    if id in self._eos_ids:
                        return
                    ids.append(id)
                    yield Token(id, self._logprob(id, logprobs))

    async def _choices(
        self, request: EngineRequest, embeddings: Tensor, ids: Sequence[int], blocked: Collection[int]
    ) -> AsyncGenerator[tuple[int, dict[int, float]], None]:
        """Have vLLM go on after these ids; yields its choices, each with the raw log-probabilities of it and of what it may not choose."""
        vllm = require("vllm", extra="vllm")
        barred = [*self._suppressed_ids, *blocked]
        watched = barred[:MOST_WATCHED_IDS]
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request.max_new_tokens - len(ids) if watched == barred else 1,
            stop_token_ids=sorted(self._eos_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
            logit_bias=dict.fromkeys(barred, float("-inf")) or None,
            logprobs=None if watched else 0,  # without any, that of the choice
            logprob_token_ids=watched or None,
            skip_clone=True,
        )
        prompt = require("vllm.inputs", extra="vllm").embeds_input(self._with_ids(embeddings, ids))
        async for output in self._llm.generate(prompt, params, f"{request.request_id}-{len(ids)}"):
            (completion,) = output.outputs
            for id, logprobs in zip(completion.token_ids, completion.logprobs or (), strict=True):
                yield id, {other: found.logprob for other, found in logprobs.items()}

    def _logprob(self, id: int, logprobs: dict[int, float]) -> float:
        """That among the tokens which are not suppressed."""
        suppressed = sum(math.exp(logprobs[other]) for other in self._suppressed_ids[:MOST_WATCHED_IDS])
        return logprobs[id] - math.log(max(1 - suppressed, math.ulp(0)))

    @torch.inference_mode()
    def _with_ids(self, embeddings: Tensor, ids: Sequence[int]) -> Tensor:
        if not ids:
            return embeddings
        return torch.cat([embeddings, self._ears.embed(torch.tensor([ids], device=self._device))[0].cpu()])

    # What follows runs in the encoder's thread.

    @torch.inference_mode()
    def _embedded(self, rows: Sequence[Row]) -> list[Tensor | Exception]:
        """Embed prompts together or, where that fails, each half of them; a row for which it fails alone has its error."""
        try:
            return list(self._embed([row.request for row in rows]))
        except Exception as error:
            if len(rows) == 1:
                return [error.with_traceback(None)]  # it would hold the rows' tensors
        half = len(rows) // 2
        return self._embedded(rows[:half]) + self._embedded(rows[half:])

    def _embed(self, requests: Sequence[EngineRequest]) -> Sequence[Tensor]:
        ids = torch.tensor([[id for request in requests for id in request.prompt_ids]])  # one after the other: no padding
        audio = collate_features([request.features for request in requests])
        inputs = {"input_ids": ids, **{name: torch.from_numpy(array) for name, array in audio.items()}}
        embeddings = self._ears.embed(**{name: tensor.to(self._device) for name, tensor in inputs.items()})[0]
        return embeddings.cpu().split([len(request.prompt_ids) for request in requests])


async def _started(arguments: Any) -> Any:
    return require("vllm.v1.engine.async_llm", extra="vllm").AsyncLLM.from_engine_args(arguments)
