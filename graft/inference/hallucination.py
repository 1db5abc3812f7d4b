"""Guards: what is suspicious about the text that a model wrote for a chunk. Loops, invention, and answers that were cut.

    text, log-probabilities, duration -> judge -> flags -> decoded once more with n-grams blocked -> better

The limits let pass what people say: a digit four times in a row, menus, long numbers, the shortest commands. What could not have been
spoken in the time is judged more strictly.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

REPETITION = "repetition"
"""The model went round in circles."""
NO_SPEECH = "no_speech"
"""Nobody speaks in the chunk: the text is made up."""
LOW_CONFIDENCE = "low_confidence"
"""The model was unsure of most of it, or wrote more than anyone speaks."""
TRUNCATED = "truncated"
"""The answer was cut at its most tokens: the model rambles, or speech is faster than the bound."""

NO_REPEAT_NGRAM = 5
"""Tokens in a row that come once only when a chunk is decoded again. With 6 or fewer no loop is left that is REPETITION at any pace that
people speak; with 3, one chunk in five of real speech could not be written."""

LOOP_WORDS = 8
"""Words of the longest phrase that is looked for in loops."""
LOOP_TIMES = 4
LOOP_LEAST_WORDS = 8
"""Words of the shortest loop: "seven seven seven seven" is a number. Where speech is too fast there is no such bound."""
FAST_WORDS_PER_S = 5.0
MOST_WORDS_PER_S = 8.0
ZLIB_RATIO = 4.0
"""Of how many times shorter a text becomes, the most for texts at a speaker's pace: half a minute of digits comes to 3.5."""
FAST_ZLIB_RATIO = 2.4
"""The most where speech is too fast."""
ZLIB_LEAST_BYTES = 100
LEAST_MEAN_LOGPROB = -1.0


@dataclass(frozen=True)
class QualityVerdict:
    """A chunk's text, the mean natural log-probability of its tokens, None without any, and what is suspicious about it."""

    text: str
    mean_logprob: float | None
    flags: tuple[str, ...]


def check_quality(
    text: str, logprobs: Sequence[float], *, duration_s: float, is_cut: bool, has_speech: bool | None = None
) -> QualityVerdict:
    """Judge the text of a chunk by its tokens' log-probabilities and the chunk's length.

    `is_cut` says that the answer has as many tokens as it may, `has_speech` whether speech was found in the chunk (None: unknown). An
    empty text can only be cut.
    """
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.casefold())
    pace = len(words) / max(duration_s, 1.0)  # a short command ends with its last sound
    mean = sum(logprobs) / len(logprobs) if logprobs else None
    is_unsure = mean is not None and not mean >= LEAST_MEAN_LOGPROB  # nan is not
    found = {
        REPETITION: _is_loop(words, pace) or _is_uniform(text, pace),
        NO_SPEECH: has_speech is False,
        LOW_CONFIDENCE: is_unsure or pace > MOST_WORDS_PER_S,
    }
    flags = [flag for flag, is_so in found.items() if is_so and text.strip()]
    return QualityVerdict(text, mean, (*flags, TRUNCATED) if is_cut else tuple(flags))


def pick_better(first: QualityVerdict, again: QualityVerdict) -> QualityVerdict:
    """The one with fewer flags; of equally many the likelier; the first if they are as good."""
    return min(first, again, key=lambda one: (len(one.flags), -(one.mean_logprob or 0.0)))


def _is_loop(words: Sequence[str], pace: float) -> bool:
    """Whether a phrase comes at least LOOP_TIMES in a row."""
    least_words = 0 if pace > FAST_WORDS_PER_S else LOOP_LEAST_WORDS
    for size in range(1, LOOP_WORDS + 1):
        run = size
        for word, before in zip(words[size:], words, strict=False):
            run = run + 1 if word == before else size
            if run >= max(LOOP_TIMES * size, least_words):
                return True
    return False


def _is_uniform(text: str, pace: float) -> bool:
    data = text.encode()
    most = FAST_ZLIB_RATIO if pace > FAST_WORDS_PER_S else ZLIB_RATIO
    return len(data) >= ZLIB_LEAST_BYTES and len(data) > most * len(zlib.compress(data))
