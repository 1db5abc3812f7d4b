"""Define the parts of a transcript: segments and words, with times in seconds from the start of the audio."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A word, in scripts without spaces a character, and the time in which it is spoken, in seconds."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Segment:
    """One stretch of audio and the text that is spoken in it.

    `mean_logprob` is the mean natural log-probability of the text's tokens, None if unknown. `flags` name the faults
    that `graft.inference.hallucination` found. `words` is empty unless word times were asked for; they are those of
    graft.text.characters.split_words, each begins after the previous one has ended, and all lie within the segment.
    `channel` counts from 1; it is None if channels were mixed.
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
