"""Check the context of a request: words that may occur in its audio.

This module stays apart from graft.text.prompts, which imports torch, because a Serve ingress checks requests without
torch.
"""

from collections.abc import Sequence

from graft.errors import ModelError

MAX_CONTEXT_WORDS = 100
MAX_WORD_LENGTH = 100


def check_context_words(context: Sequence[str]) -> list[str]:
    """Clean a list of words: each once, without spaces, commas and stops around it.

    Raises ModelError for anything else.
    """
    if isinstance(context, str):
        raise ModelError(f"context {context!r:.80} is a text: give a list of words")
    words = list(dict.fromkeys(" ".join(word.split()).strip(" ,.") for word in context))
    if len(words) > MAX_CONTEXT_WORDS or max(map(len, words), default=0) > MAX_WORD_LENGTH or "" in words:
        raise ModelError(
            f"context of {len(words)} words: give at most {MAX_CONTEXT_WORDS}, "
            f"none of them empty or over {MAX_WORD_LENGTH} characters"
        )
    return words
