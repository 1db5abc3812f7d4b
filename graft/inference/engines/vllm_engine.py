"""Decode on GPUs under load: encoder and projector in batches in PyTorch, the language model as a plain Qwen2 in vLLM.

    stream() -> waiting -> embeddings of the oldest prompt and of those like it -> vLLM, which batches rows itself
        -> the row's stream

A thread with an event loop of its own owns the requests and vLLM's client. Another thread encodes while vLLM decodes in
a process of its own. No other file uses vLLM's names.
"""

import asyncio
import contextlib
import heapq
import math
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.checkpoints.language_model import language_model_folder, open_encoder_model
from graft.errors import require
from graft.inference.engines.protocol import EngineCounts, EngineRequest, Token
from graft.inference.engines.sampling import repeating_ids
from graft.inference.engines.scheduler import ENCODER_ROWS, Row, check_prefix, deliver, next_token
from graft.model.modeling import AnyGraft
from graft.processor import GraftProcessor, collate_features

CPU_CACHE_BYTES = 2**30
# Most tokens whose log-probabilities vLLM reports at every step, besides the chosen one.
MOST_WATCHED_IDS = 128


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
    """Open a graft's folder, merged or not, or a hub id in vLLM, with its processor.

    The first time, the language model is converted for vLLM. The encoder runs on `device`, vLLM on the first
    `tensor_parallel_size` devices that the process sees, or on the CPU with vLLM's CPU build. vLLM takes
    `memory_fraction` of each device and leaves the rest to the encoder; `cache_bytes` of it hold keys and values, by
    default all that the weights leave, on a CPU 1 GiB. `max_model_len` bounds prompt and answer together, in tokens;
    `max_requests` bounds the requests that are decoded at once. `quantization` is vLLM's name of a method ("fp8",
    "bitsandbytes"). Raises MissingExtra without vLLM, ModelError as open_encoder_model does.
    """
    vllm = require("vllm", extra="vllm")
    encoder_model, processor = open_encoder_model(path, dtype=dtype, device=device)
    is_cpu = torch.device(device).type == "cpu"
    arguments = vllm.AsyncEngineArgs(
        model=str(language_model_folder(path)),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=str(next(encoder_model.audio_projector.parameters()).dtype).removeprefix("torch."),
        quantization=quantization,
        enable_prompt_embeds=True,
        enable_prefix_caching=False,  # no clip comes twice, and hashing its embeddings takes longer than prefilling
        gpu_memory_utilization=memory_fraction,
        kv_cache_memory_bytes=cache_bytes or (CPU_CACHE_BYTES if is_cpu else None),
        max_model_len=min(max_model_len, encoder_model.config.get_text_config().max_position_embeddings),
        max_num_seqs=max_requests,
        tensor_parallel_size=tensor_parallel_size,
        distributed_executor_backend="mp" if tensor_parallel_size > 1 else None,  # inside Ray, vLLM would choose Ray's
        enforce_eager=is_cpu,  # compiling takes minutes on a CPU
        disable_log_stats=True,
    )
    return VllmEngine(encoder_model, arguments, eos_ids=processor.end_ids(encoder_model.generation_config)), processor


class VllmEngine:
    """Decodes greedily with vLLM: the same tokens as the transformers engine's, up to rounding.

    `encoder_model` embeds prompts, `arguments` are vLLM's AsyncEngineArgs for its language model. A request waits
    `gather_s` seconds for others to be encoded with. A clip on which the encoder fails ends alone, with the encoder's
    error; an error of vLLM ends the streams that it concerns. Call `close` to release the model.
    """

    def __init__(
        self,
        encoder_model: AnyGraft,
        arguments: Any,
        *,
        eos_ids: Collection[int],
        gather_s: float = 0.01,
    ) -> None:
        self._encoder_model = encoder_model
        self._device = encoder_model.audio_tower.conv1.weight.device
        self._max_tokens, self._max_requests = arguments.max_model_len, arguments.max_num_seqs
        self._eos_ids = frozenset(eos_ids)
        self._suppressed_ids = list(encoder_model.generation_config.suppress_tokens or [])
        self._gather_s = gather_s
        self._rows: dict[str, Row] = {}  # the engine's event loop owns it and the next six
        self._waiting: list[Row] = []
        self._encoding: list[Row] = []
        self._decoding: dict[Row, asyncio.Task[None]] = {}
        self._stepped: set[Row] = set()
        self._prefills = self._steps = self._tokens = 0
        self._busy_s = self._busy_since = 0.0
        self._changed = asyncio.Event()
        self._is_closed = False
        self._closing = threading.Lock()  # guards the field above
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-encode")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="graft-engine", daemon=True)
        self._thread.start()
        try:
            self._llm = asyncio.run_coroutine_threadsafe(self._start_vllm(arguments), self._loop).result()
        except BaseException:
            self._stop()
            raise
        self._worker = asyncio.run_coroutine_threadsafe(self._work(), self._loop)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """Stream an answer, as Engine says.

        Raises ValueError for an id under way or too long a request, RuntimeError for a closed engine.
        """
        row = Row(request)
        check_prefix(request)
        self._call(self._arrive, row)
        try:
            while token := await next_token(row):
                yield token
        finally:
            with contextlib.suppress(RuntimeError):  # the engine is closed, which has ended the row
                self._call(self._leave, row)

    def abort(self, request_id: str) -> None:
        """End a request, as Engine says."""
        with contextlib.suppress(RuntimeError):
            self._call(self._abort, request_id)

    def counts(self) -> EngineCounts:
        """Return the engine's state and totals, as Engine says.

        vLLM does not report its steps: one is counted when a row that had a token in the current step gets another.
        """
        running, waiting = len(self._decoding), len(self._waiting) + len(self._encoding)
        busy_s = self._busy_s + (time.monotonic() - self._busy_since if self._rows else 0)
        return EngineCounts(running, waiting, self._prefills, self._steps, self._tokens, busy_s)

    def close(self) -> None:
        """Stop decoding, as Engine says."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._stop()
        del self._llm, self._encoder_model

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._encoder.shutdown()
        self._loop.close()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function in the engine's thread, after those of earlier calls."""
        with self._closing:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            self._loop.call_soon_threadsafe(function, *arguments)

    # The methods from here on run in the engine's event loop.

    async def _start_vllm(self, arguments: Any) -> Any:
        """Start vLLM in a process of its own; its client belongs to this event loop."""
        return require("vllm.v1.engine.async_llm", extra="vllm").AsyncLLM.from_engine_args(arguments)

    def _arrive(self, row: Row) -> None:
        request = row.request
        length = row.prompt_length + request.max_new_tokens
        if request.request_id in self._rows:
            deliver([(row, ValueError(f"request {request.request_id} is already under way"))])
        elif length > self._max_tokens:
            remedy = f"raise max_model_len, now {self._max_tokens}"
            deliver([(row, ValueError(f"prompt and answer may have {length} tokens: {remedy}"))])
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
            deliver([(row, None)])

    async def _end(self) -> None:
        self._worker.cancel()
        deliver([(row, RuntimeError("the engine is closed")) for row in self._rows.values()])
        tasks = list(self._decoding.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown()
        multiprocessing.active_children()  # waits for a process of vLLM that has crashed, which its shutdown may not do

    async def _work(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._gather_s)
            self._changed.clear()
            while group := self._next_group():
                self._encoding = group
                results = await self._loop.run_in_executor(self._encoder, self._embed_each, group)
                self._encoding = []
                self._prefills += 1
                for row, embeddings in zip(group, results, strict=True):
                    if isinstance(embeddings, Exception):
                        deliver([(row, embeddings)])  # nobody reads it where the row is over already
                    elif not row.is_over:
                        self._decoding[row] = self._loop.create_task(self._decode(row, embeddings))

    def _next_group(self) -> list[Row]:
        """Take the next rows to encode out of the queue; none until as many as are encoded together can go on to vLLM.

        While many rows wait, the encoder's batches so are full.
        """
        room = self._max_requests + ENCODER_ROWS - len(self._decoding)
        if room < min(len(self._waiting), ENCODER_ROWS):
            return []
        group = heapq.nsmallest(
            ENCODER_ROWS, self._waiting, key=lambda row: abs(row.prompt_length - self._waiting[0].prompt_length)
        )
        picked = set(group)
        self._waiting = [row for row in self._waiting if row not in picked]
        return group

    async def _decode(self, row: Row, embeddings: Tensor) -> None:
        end: Exception | None = None
        try:
            async with contextlib.aclosing(self._answer(row.request, embeddings)) as answer:
                async for token in answer:
                    self._tokens += 1
                    if row in self._stepped or not self._stepped:
                        self._stepped.clear()
                        self._steps += 1
                    self._stepped.add(row)
                    deliver([(row, token)])
        except Exception as error:
            end = error
        self._decoding.pop(row, None)
        self._changed.set()
        deliver([(row, end)])

    async def _answer(self, request: EngineRequest, embeddings: Tensor) -> AsyncGenerator[Token, None]:
        """Yield the tokens of the answer to a prompt's embeddings (count, width), on the CPU.

        Where the next token would repeat an n-gram, vLLM is asked again from there on with such tokens blocked. They
        stay blocked in later steps too, which changes nothing as long as none of them is likelier than the chosen
        token.
        """
        ids = list(request.prefix_ids)
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
                    # The log-probability is the one among the tokens that are not suppressed.
                    suppressed = sum(math.exp(logprobs[other]) for other in self._suppressed_ids[:MOST_WATCHED_IDS])
                    yield Token(id, logprobs[id] - math.log(max(1 - suppressed, math.ulp(0))))

    async def _choices(
        self, request: EngineRequest, embeddings: Tensor, ids: Sequence[int], blocked: Collection[int]
    ) -> AsyncGenerator[tuple[int, dict[int, float]], None]:
        """Have vLLM continue after these ids.

        Yields each token that it chooses, with the raw log-probabilities of that token and of the barred ones.
        """
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
            logprobs=None if watched else 0,  # 0: that of the chosen token alone
            logprob_token_ids=watched or None,
            skip_clone=True,
        )
        prefix = torch.cat([embeddings, self._embed_ids(ids)]) if ids else embeddings  # (count, width)
        prompt = require("vllm.inputs", extra="vllm").embeds_input(prefix)
        async for output in self._llm.generate(prompt, params, f"{request.request_id}-{len(ids)}"):
            (completion,) = output.outputs
            for id, logprobs in zip(completion.token_ids, completion.logprobs or (), strict=True):
                yield id, {other: reported.logprob for other, reported in logprobs.items()}

    @torch.inference_mode()
    def _embed_ids(self, ids: Sequence[int]) -> Tensor:
        return self._encoder_model.embed(torch.tensor([ids], device=self._device))[0].cpu()

    # The methods from here on run in the encoder's thread.

    @torch.inference_mode()
    def _embed_each(self, rows: Sequence[Row]) -> list[Tensor | Exception]:
        """Embed prompts together or, where that fails, each half of them; a row that fails alone gets the error."""
        requests = [row.request for row in rows]
        try:
            # One prompt after the other in a single row (1, ids of all): no padding.
            ids = torch.tensor([[id for request in requests for id in request.prompt_ids]])
            audio = collate_features([request.features for request in requests])
            inputs = {"input_ids": ids, **{name: torch.from_numpy(array) for name, array in audio.items()}}
            embeddings = self._encoder_model.embed(**{name: one.to(self._device) for name, one in inputs.items()})[0]
            return list(embeddings.cpu().split([row.prompt_length for row in rows]))
        except Exception as error:
            if len(rows) == 1:
                return [error.with_traceback(None)]  # the traceback would hold the rows' tensors
        half = len(rows) // 2
        return self._embed_each(rows[:half]) + self._embed_each(rows[half:])
