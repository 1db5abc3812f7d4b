"""Define an Aligner: it finds when each word of a text that is known already is spoken in a clip."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

from graft.audio.clip import AudioClip
from graft.inference.segments import Word

# Start and end in seconds.
Span = tuple[float, float]


class Aligner(Protocol):
    """Finds when each word of a text is spoken. Any number of threads may use one aligner at once."""

    @property
    def name(self) -> str:
        """Name of the model and the method, as it stands in transcripts."""
        ...

    def find_language(self, clip: AudioClip) -> str | None:
        """Return the language (ISO 639-1) that is spoken in a clip; None from a model that does not find it out.

        Raises AudioError for a clip over 30 s.
        """
        ...

    def align(self, clip: AudioClip, text: str, language: str | None = None) -> tuple[Word, ...]:
        """Return the words of a text in a language, as split_words does, with times in seconds from the clip's start.

        Words come in order: no word starts before the previous one starts, ends before it starts itself, or ends after
        the clip. A text too long to be spoken in the clip (each aligner states its limit) is not aligned:
        `spread_words` shares the clip out between its words. Raises AudioError for a clip over 30 s.
        """
        ...


def timed_words(words: Sequence[str], spans: Iterable[Span], duration_s: float) -> tuple[Word, ...]:
    """Give words their spans; a span that passes the end of the clip is cut there."""
    return tuple(
        Word(min(start_s, duration_s), min(end_s, duration_s), word)
        for word, (start_s, end_s) in zip(words, spans, strict=True)
    )


def spread_words(words: Sequence[str], duration_s: float) -> tuple[Word, ...]:
    """Share a clip's time out between words in proportion to their lengths, for texts that cannot be aligned."""
    ends = list(accumulate(map(len, words), initial=0))
    shares = [duration_s * end / ends[-1] for end in ends] if words else []
    return timed_words(words, pairwise(shares), duration_s)
