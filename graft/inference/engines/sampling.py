"""Choose each row's next token: the likeliest that is neither suppressed for all rows nor blocked for its own.

A row may also be given the only tokens that it has to choose from.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor


def choose_tokens(
    logits: Tensor,
    suppressed_ids: Tensor,
    blocked_ids: Mapping[int, Sequence[int]],
    only_ids: Mapping[int, Sequence[int]] | None = None,
) -> tuple[list[int], list[float]]:
    """Choose a token for each row of logits (rows, vocabulary); returns the ids and their natural log-probabilities.

    Suppressed ids (count,) have no probability. Blocked ids, given by row index, keep theirs but are not chosen. Rows
    in `only_ids` choose among these, whatever is suppressed, which have all of the probability.
    """
    all_logits = logits.float()
    logits = all_logits.index_fill(1, suppressed_ids, float("-inf"))
    for row, ids in (only_ids or {}).items():
        logits[row] = float("-inf")
        logits[row, ids] = all_logits[row, ids]
    total = logits.logsumexp(dim=-1)
    for row, ids in blocked_ids.items():
        logits[row, ids] = float("-inf")
    best, chosen = logits.max(dim=-1)
    return chosen.tolist(), (best - total).tolist()


def repeating_ids(tokens: Sequence[int], ngram: int) -> list[int]:
    """Return the ids that as the next token would complete an n-gram that occurs already; none for an `ngram` of 0."""
    if not 0 < ngram <= len(tokens):
        return []
    last = tokens[len(tokens) - ngram + 1 :]
    starts = range(len(tokens) - ngram + 1)
    return [tokens[start + ngram - 1] for start in starts if tokens[start : start + ngram - 1] == last]


def has_repeated_ngram(tokens: Sequence[int], ngram: int) -> bool:
    """Return whether an n-gram occurs twice; where none does, blocking n-grams changes nothing."""
    starts = range(len(tokens) - ngram + 1)
    return len({tuple(tokens[start : start + ngram]) for start in starts}) < len(starts)
