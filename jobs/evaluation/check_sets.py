"""Choose the clips that check an evaluation: with the audio of another clip, and with words that may occur."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graft.data.splits import comparable_text
from graft.text.instructions import rare_words

from .test_sets import Item

SWAPPED, CONTEXT = "swapped", "context words"
"""Sets of the checks."""
MOST_WORDS = 20
"""Most words that are given as context, about as many as people give."""
LEAST_WORDS = 3
LEAST_LETTERS = 5
"""Letters of a word that is given: shorter ones often stand in others."""


@dataclass(frozen=True)
class ContextClips:
    """Clips with a rare word each, and the list of all these words, which is given with every clip."""

    items: Sequence[Item]
    words: Sequence[str]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Choose up to `count` items that lie evenly in a set."""
    if len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def swapped(items: Sequence[Item]) -> list[Item]:
    """Return the items with the audio of the next one each; none for a single item."""
    others = [*items[1:], *items[:1]] if len(items) > 1 else []
    return [
        replace(
            item, set_name=SWAPPED, audio_id=other.audio_id, clip=other.clip, duration_s=other.duration_s, is_check=True
        )
        for item, other in zip(items, others, strict=False)
    ]


def context_clips(items: Sequence[Item]) -> ContextClips | None:
    """Choose clips with rare words, each of which stands in the reference of one clip; None where there are too few."""
    rare = set(rare_words([item.text for item in items]))
    chosen: dict[str, Item] = {}
    for item in items:
        words = [word for word in map(_bare, item.text.split()) if word in rare and len(word) >= LEAST_LETTERS]
        if words and len(chosen) < MOST_WORDS:
            chosen.setdefault(max(words, key=len), item)
    if len(chosen) < LEAST_WORDS:
        return None
    return ContextClips([replace(item, set_name=CONTEXT, is_check=True) for item in chosen.values()], list(chosen))


def _bare(word: str) -> str:
    """Return a word without the punctuation around it, or "" where there is some in it."""
    bare = word.strip(".,;:!?\"'()[]")
    return bare if comparable_text(bare) == bare.lower() else ""
