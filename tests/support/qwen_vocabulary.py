"""Build Qwen2-VL's own tokenizer from its published vocabulary, which the package dashscope holds (Apache-2.0)."""

import base64
import importlib.util
from pathlib import Path

import pytest
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""The special tokens of Qwen2-VL, in the order of their ids, which follow the vocabulary's."""
_BYTE_CHARACTERS = bytes_to_unicode()


def qwen_ranks() -> dict[bytes, int]:
    """Read the vocabulary: the bytes of each token and its rank. Skips the test where the package is not installed."""
    found = importlib.util.find_spec("dashscope")  # which is not imported: its own dependencies are not installed
    if found is None or not found.submodule_search_locations:
        pytest.skip("dashscope, which holds Qwen2's vocabulary, is not installed: `make venv` installs it")
    path = Path(found.submodule_search_locations[0], "resources", "qwen.tiktoken")
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def qwen_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merge that makes each token of several bytes, in the order of their ranks."""
    return [_last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Make the tokenizer of Qwen2-VL checkpoints, without the audio tokens."""
    ranks = qwen_ranks()
    merges = [(_written(left), _written(right)) for left, right in qwen_merges(ranks)]
    vocabulary = {_written(token): rank for token, rank in ranks.items()}
    return Qwen2Tokenizer(
        vocab=vocabulary | {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merge a token's bytes by the lower ranks, the lowest first, until two parts are left."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[index] + parts[index + 1], rank) for index in range(len(parts) - 1)]
        best = pairs.index(min(pairs))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _written(token: bytes) -> str:
    return "".join(_BYTE_CHARACTERS[byte] for byte in token)
