"""The choice of a token: the likeliest, but none that is suppressed for all rows or blocked for its own."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def choose(
    logits: Tensor, suppressed_ids: Tensor, blocked_ids: Mapping[int, Sequence[int]]
) -> tuple[list[int], list[float]]:
    """Choose each row's token from logits (rows, vocabulary); returns the ids and their natural log-probabilities.

    Suppressed ids (count,) have no probability; those that are blocked, by the row's number, keep it.
    """
    logits = logits.float().index_fill(1, suppressed_ids, float("-inf"))
    total = logits.logsumexp(dim=-1)
    for row, ids in blocked_ids.items():
        logits[row, ids] = float("-inf")
    best, chosen = logits.max(dim=-1)
    return chosen.tolist(), (best - total).tolist()


def repeating_ids(tokens: Sequence[int], ngram: int) -> list[int]:
    """The ids that would end an n-gram which stands in the tokens already; none for an `ngram` of 0."""
    if not 0 < ngram <= len(tokens):
        return []
    before = tokens[len(tokens) - ngram + 1 :]
    starts = range(len(tokens) - ngram + 1)
    return [tokens[start + ngram - 1] for start in starts if tokens[start : start + ngram - 1] == before]


def repeats(tokens: Sequence[int], ngram: int) -> bool:
    """Whether an n-gram comes twice: where none does, blocking them changes nothing."""
    starts = range(len(tokens) - ngram + 1)
    return len({tuple(tokens[start : start + ngram]) for start in starts}) < len(starts)
