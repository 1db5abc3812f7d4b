"""Count the tokens of millions of texts by their words: a corpus has far fewer distinct words than it has words.

The counts are exact for tokenizers that never join characters across a space to one token, as those of Qwen2, Llama 3
and GPT-2 do not. Some texts of every block are tokenized as a whole, too; where one differs, the whole block is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 2**18
"""Texts that are counted together."""
CHECKED = 256
"""Texts of a block that are tokenized as a whole, too."""
MOST_WORDS = 2**21
"""Words whose counts are kept from block to block; scripts without spaces have more."""

Lengths = Callable[[Sequence[str]], np.ndarray]


def count_tokens(texts: Any, lengths: Lengths, *, write: Callable[[str], str], template: str) -> np.ndarray:
    """Count the tokens of `template` around each text of a LargeStringArray: int32 (texts,).

    `lengths` counts the tokens of strings. `write` writes a text in its style, word by word with single spaces between
    them, and `template` ends with the placeholder {text}.
    """
    words = _Words(lengths, write, template)
    counts = np.empty(len(texts), np.int32)
    for start in range(0, len(texts), BLOCK):
        block = texts[start : start + BLOCK]
        counts[start : start + len(block)] = _count_block(block, words)
    return counts


class _Words:
    """Counts the tokens of words, and remembers them."""

    def __init__(self, lengths: Lengths, write: Callable[[str], str], template: str) -> None:
        self._lengths, self._write, self._template = lengths, write, template
        self.empty_count = int(lengths([template.format(text="")])[0])
        self._known: Any = pa.array([], pa.large_string())
        self._counts = np.zeros(0, np.int32)

    def whole(self, texts: Any) -> np.ndarray:
        """Count the tokens of texts as a whole."""
        return self._lengths([self._template.format(text=self._write(text)) for text in texts.to_pylist()])

    def later(self, words: Any) -> np.ndarray:
        """Count the tokens of words that follow a space, 0 for those that are not written: int32 (words,)."""
        if len(self._known) > MOST_WORDS:
            self._known, self._counts = self._known[:0], self._counts[:0]
        missing = words.filter(pc.is_null(pc.index_in(words, self._known)))
        if len(missing):
            written = map(self._write, missing.to_pylist())
            counts = self._lengths([f" {word}" if word else "" for word in written])
            self._known = pa.concat_arrays([self._known, missing])
            self._counts = np.concatenate([self._counts, counts.astype(np.int32)])
        return self._counts[pc.index_in(words, self._known).to_numpy()]


def _count_block(texts: Any, words: _Words) -> np.ndarray:
    split = pc.split_pattern(texts, " ")
    sizes = np.diff(split.offsets.to_numpy())  # (texts,), at least 1
    encoded = split.flatten().dictionary_encode()
    found = encoded.indices.to_numpy()  # (words,)
    later = words.later(encoded.dictionary)
    counts = np.add.reduceat(later[found], np.cumsum(sizes) - sizes)
    is_written = later[found] > 0
    owners = np.repeat(np.arange(len(texts)), sizes)[is_written]  # the texts of written words
    is_first = np.diff(owners, prepend=-1) != 0
    begun, firsts = owners[is_first], found[is_written][is_first]  # each text with a word, and its first word
    distinct, places = np.unique(firsts, return_inverse=True)
    counts[begun] += (words.whole(encoded.dictionary.take(pa.array(distinct))) - later[distinct])[places]
    counts[np.delete(np.arange(len(texts)), begun)] += words.empty_count
    checked = np.unique(np.linspace(0, len(texts) - 1, CHECKED).astype(int))
    if not np.array_equal(words.whole(texts.take(pa.array(checked))), counts[checked]):
        return words.whole(texts)
    return counts
