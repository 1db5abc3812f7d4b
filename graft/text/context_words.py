"""Words that may occur in what is heard; without torch, so that whoever only passes them on does without."""

from collections.abc import Sequence

from graft.errors import ModelError

MAX_CONTEXT_WORDS = 100


def check_context_words(context: Sequence[str]) -> list[str]:
    """Words that may occur, each once, without spaces, commas and stops around it. Raises ModelError for what is no list of words."""
    if isinstance(context, str):
        raise ModelError(f"context {context!r:.80} is a text: give a list of words")
    words = list(dict.fromkeys(" ".join(word.split()).strip(" ,.") for word in context))
    if len(words) > MAX_CONTEXT_WORDS or max(map(len, words), default=0) > 100 or "" in words:
        raise ModelError(
            f"context of {len(words)} words: give at most {MAX_CONTEXT_WORDS}, none of them empty or over 100 characters"
        )
    return words
