"""When words are spoken: an Aligner puts times to the words of a text that is known already, by the clip that it was heard in."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

from graft.audio.clip import AudioClip
from graft.inference.transcript import Word

Span = tuple[float, float]
"""Start and end in seconds."""


class Aligner(Protocol):
    """Finds when each word of a text is spoken. Any number of threads may use one at once."""

    @property
    def name(self) -> str:
        """Where the times come from, for whoever reads them."""
        ...

    def align(self, clip: AudioClip, text: str) -> tuple[Word, ...]:
        """Time the words of a text, which are `text.split()`, in seconds from the clip's start; of a text without words none.

        Words come in order: no start is before the one before it, no end before its own start or after the clip's end. What nobody can
        speak in the clip's time (the aligner says how much that is) is not sought in it but spread over it, as `spread` does. Raises
        AudioError for a clip over 30 s.
        """
        ...


def timed(words: Sequence[str], spans: Iterable[Span], duration_s: float) -> tuple[Word, ...]:
    """Put words to their spans, of which none ends after the clip."""
    return tuple(
        Word(min(start_s, duration_s), min(end_s, duration_s), word)
        for word, (start_s, end_s) in zip(words, spans, strict=True)
    )


def spread(words: Sequence[str], duration_s: float) -> tuple[Word, ...]:
    """Share out a clip's time between words by their lengths: times for what can't be heard in it."""
    ends = list(accumulate(map(len, words), initial=0))
    shares = [duration_s * end / ends[-1] for end in ends] if words else []
    return timed(words, pairwise(shares), duration_s)
