"""Wrap vLLM for the vLLM engine: its arguments, its client, and greedy answers with barred tokens.

No other file uses vLLM's names.
"""

import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.errors import require
from graft.inference.engines.protocol import EngineRequest, Token
from graft.inference.engines.sampling import repeating_ids

CPU_CACHE_BYTES = 2**30
# Most tokens whose log-probabilities vLLM reports at every step, besides the chosen one.
MOST_WATCHED_IDS = 128


def require_vllm() -> None:
    """Raise MissingExtra without vLLM."""
    require("vllm", extra="vllm")


def vllm_arguments(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    memory_fraction: float,
    max_model_len: int,
    max_requests: int,
    tensor_parallel_size: int,
    cache_bytes: int | None,
) -> Any:
    """Make vLLM's AsyncEngineArgs for a language model in a folder that takes the embeddings of prompts.

    open_vllm_engine documents the parameters.
    """
    is_cpu = device.type == "cpu"
    return require("vllm", extra="vllm").AsyncEngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        enable_prompt_embeds=True,
        enable_prefix_caching=False,  # no clip comes twice, and hashing its embeddings takes longer than prefilling
        gpu_memory_utilization=memory_fraction,
        kv_cache_memory_bytes=cache_bytes or (CPU_CACHE_BYTES if is_cpu else None),
        max_model_len=max_model_len,
        max_num_seqs=max_requests,
        tensor_parallel_size=tensor_parallel_size,
        distributed_executor_backend="mp" if tensor_parallel_size > 1 else None,  # inside Ray, vLLM would choose Ray's
        enforce_eager=is_cpu,  # compiling takes minutes on a CPU
        disable_log_stats=True,
    )


class VllmClient:
    """A vLLM that decodes greedily, without tokens that are suppressed or that repeat an n-gram of their answer.

    `embed` returns the embeddings (count, width) of ids, on the CPU. A client belongs to the event loop that started
    it.
    """

    def __init__(
        self,
        llm: Any,
        *,
        embed: Callable[[Sequence[int]], Tensor],
        eos_ids: Collection[int],
        suppressed_ids: Sequence[int],
    ) -> None:
        self._llm = llm
        self._embed = embed
        self._eos_ids = frozenset(eos_ids)
        self._suppressed_ids = list(suppressed_ids)

    @classmethod
    async def start(cls, arguments: Any, **options: Any) -> "VllmClient":
        """Start vLLM in a process of its own. Raises vLLM's errors."""
        return cls(require("vllm.v1.engine.async_llm", extra="vllm").AsyncLLM.from_engine_args(arguments), **options)

    def shutdown(self) -> None:
        """End vLLM's process."""
        self._llm.shutdown()

    async def decode(self, request: EngineRequest, embeddings: Tensor) -> AsyncGenerator[Token, None]:
        """Yield the tokens of an answer to a prompt's embeddings (count, width).

        Where the next token would repeat an n-gram, vLLM is asked again from there on with such tokens blocked. They
        stay blocked in later steps too, which changes nothing as long as none of them is likelier than the chosen
        token.
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
        prefix = torch.cat([embeddings, self._embed(ids)]) if ids else embeddings  # (count, width)
        prompt = require("vllm.inputs", extra="vllm").embeds_input(prefix)
        async for output in self._llm.generate(prompt, params, f"{request.request_id}-{len(ids)}"):
            (completion,) = output.outputs
            for id, logprobs in zip(completion.token_ids, completion.logprobs or (), strict=True):
                yield id, {other: reported.logprob for other, reported in logprobs.items()}

    def _logprob(self, id: int, logprobs: dict[int, float]) -> float:
        """Return the log-probability of a token among those that are not suppressed."""
        suppressed = sum(math.exp(logprobs[other]) for other in self._suppressed_ids[:MOST_WATCHED_IDS])
        return logprobs[id] - math.log(max(1 - suppressed, math.ulp(0)))
