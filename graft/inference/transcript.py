"""Define a Transcript: segments with words, and times in seconds from the start of the audio."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from graft.audio.defects import AudioDefect, merge_defects


@dataclass(frozen=True)
class Word:
    """A word and the time in which it is spoken, in seconds."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Segment:
    """One stretch of audio and the text that is spoken in it.

    `mean_logprob` is the mean natural log-probability of the text's tokens, None if unknown. `flags` name the faults
    that `graft.inference.hallucination` found. `words` is empty unless word times were asked for; joined by spaces the
    words are `text`, each begins after the previous one has ended, and all lie within the segment. `channel` counts
    from 1; it is None if channels were mixed.
    """

    start_s: float
    end_s: float
    text: str
    mean_logprob: float | None = None
    flags: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    channel: int | None = None


@dataclass(frozen=True)
class ScoredToken:
    """A token as the model wrote it, in UTF-8, of which it may be a part, and its natural log-probability."""

    data: bytes
    logprob: float


@dataclass(frozen=True)
class ScoredSegment(Segment):
    """A segment with the tokens of its text and the number of tokens in its prompt.

    The tokens joined are `text`, up to the white space between words and around them.
    """

    tokens: tuple[ScoredToken, ...] = ()
    prompt_token_count: int = 0


@dataclass(frozen=True)
class Transcript:
    """The text of a whole recording, its segments in order, its duration in seconds and the name of the model.

    `aligner` names the source of the words' times; it is None if words have no times. `defects` say what is wrong with
    the recording, and when.
    """

    text: str
    duration_s: float
    segments: tuple[Segment, ...]
    model: str
    aligner: str | None = None
    defects: tuple[AudioDefect, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the keys are always the same."""
        return asdict(self)


def stitch(
    segments: Iterable[Segment],
    *,
    duration_s: float,
    model: str,
    aligner: str | None = None,
    defects: Iterable[AudioDefect] = (),
) -> Transcript:
    """Make a transcript of one recording's segments: order them by time and join their texts with single spaces."""
    ordered = tuple(sorted(segments, key=lambda segment: (segment.start_s, segment.channel or 0)))
    text = " ".join(part for segment in ordered if (part := segment.text.strip()))
    return Transcript(text, duration_s, ordered, model, aligner, merge_defects(defects))
