"""What comes out: words in segments in a transcript, with times in seconds from the start of the audio."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Word:
    """A word and when it is spoken."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Segment:
    """One stretch of audio and what is said in it.

    `mean_logprob` is the mean natural log-probability of its tokens, None if unknown; `flags` name what the guards found
    suspicious, empty if nothing; `words` is empty unless word times were asked for, and else, joined by spaces, is `text`: each begins when
    the one before it has ended, all within the segment; `channel` counts from 1, None if channels were mixed.
    """

    start_s: float
    end_s: float
    text: str
    mean_logprob: float | None = None
    flags: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    channel: int | None = None


@dataclass(frozen=True)
class Transcript:
    """The text of a whole recording, its parts in order, the recording's length in seconds and which model wrote it.

    `aligner` says where the times of words come from, None if words have none.
    """

    text: str
    duration_s: float
    segments: tuple[Segment, ...]
    model: str
    aligner: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them; the keys are always the same."""
        return asdict(self)


def stitch(segments: Iterable[Segment], *, duration_s: float, model: str, aligner: str | None = None) -> Transcript:
    """Put the segments of one recording in order of time and join their texts with single spaces."""
    ordered = tuple(sorted(segments, key=lambda segment: (segment.start_s, segment.channel or 0)))
    text = " ".join(part for segment in ordered if (part := segment.text.strip()))
    return Transcript(text, duration_s, ordered, model, aligner)
