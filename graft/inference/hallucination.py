"""Check the text that a model wrote for a chunk for loops, invented speech and answers that were cut.

    text, log-probabilities, duration -> check_quality -> flags -> decoded once more with n-grams blocked -> pick_better

The limits allow what people say: a digit four times in a row, menus, long numbers, the shortest commands. Text that is
too much to be spoken in the chunk's time is checked against stricter limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from graft.text.characters import WORD, compression_ratio, count_words

# Flag: the text repeats itself.
REPETITION = "repetition"
# Flag: the chunk holds no speech, so that the text is invented.
NO_SPEECH = "no_speech"
# Flag: the model was unsure of most of the text, or wrote more words than anyone speaks in the time.
LOW_CONFIDENCE = "low_confidence"
# Flag: the answer was cut at its most tokens: the model rambles, or the speech is faster than the bound allows.
TRUNCATED = "truncated"

# Length in tokens of the n-grams that may occur only once when a chunk is decoded again. With 6 or fewer no loop is
# left that is flagged REPETITION at any pace that people speak; with 3, one chunk in five of real speech could not be
# written.
NO_REPEAT_NGRAM = 5

# Words in the longest phrase that is looked for in loops.
LOOP_WORDS = 8
# Times in a row that a phrase occurs in a loop, at least.
LOOP_TIMES = 4
# Words in the shortest loop: "seven seven seven seven" is a number. Speech that is too fast has no such limit.
LOOP_LEAST_WORDS = 8
# Words per second above which speech is too fast, so that the stricter limits hold.
FAST_WORDS_PER_S = 5.0
# Words per second above which a text cannot have been spoken.
MOST_WORDS_PER_S = 8.0
# Largest compression ratio of a text at a speaker's pace; half a minute of digits reaches 3.5.
ZLIB_RATIO = 4.0
# Largest compression ratio of a text that is too fast.
FAST_ZLIB_RATIO = 2.4
# Characters of the shortest text whose compression ratio is checked.
ZLIB_LEAST_CHARACTERS = 100
# Mean log-probability of a token, in nats, below which the model is unsure.
LEAST_MEAN_LOGPROB = -1.0


@dataclass(frozen=True)
class QualityVerdict:
    """The text of a chunk, the mean natural log-probability of its tokens (None without tokens), and its flags."""

    text: str
    mean_logprob: float | None
    flags: tuple[str, ...]


def check_quality(
    text: str, logprobs: Sequence[float], *, duration_s: float, is_cut: bool, has_speech: bool | None = None
) -> QualityVerdict:
    """Check the text of a chunk by its tokens' log-probabilities and the chunk's duration in seconds.

    `is_cut` says that the answer has as many tokens as it may have; `has_speech` says whether the chunk holds speech,
    None if that is unknown. An empty text can only be flagged as truncated.
    """
    words = WORD.findall(text.casefold())
    words_per_s = count_words(words) / max(duration_s, 1.0)  # chunks of short commands end with the last sound
    is_fast = words_per_s > FAST_WORDS_PER_S
    zlib_ratio = compression_ratio(text) if len(text) >= ZLIB_LEAST_CHARACTERS else 0.0
    mean = sum(logprobs) / len(logprobs) if logprobs else None
    is_unsure = mean is not None and not mean >= LEAST_MEAN_LOGPROB  # true for nan as well
    findings = {
        REPETITION: _has_loop(words, is_fast=is_fast) or zlib_ratio > (FAST_ZLIB_RATIO if is_fast else ZLIB_RATIO),
        NO_SPEECH: has_speech is False,
        LOW_CONFIDENCE: is_unsure or words_per_s > MOST_WORDS_PER_S,
    }
    flags = [flag for flag, is_raised in findings.items() if is_raised and text.strip()]
    return QualityVerdict(text, mean, (*flags, TRUNCATED) if is_cut else tuple(flags))


def pick_better(first: QualityVerdict, second: QualityVerdict) -> QualityVerdict:
    """Return the verdict with fewer flags, among equals the one with the likelier tokens, among equals the first."""
    return min(first, second, key=lambda verdict: (len(verdict.flags), -(verdict.mean_logprob or 0.0)))


def _has_loop(words: Sequence[str], *, is_fast: bool) -> bool:
    """Return whether a phrase occurs at least LOOP_TIMES in a row."""
    characters_per_word = len(words) / count_words(words) if words else 1.0  # 1 in scripts with spaces
    least_words = 0 if is_fast else LOOP_LEAST_WORDS * characters_per_word
    for size in range(1, round(LOOP_WORDS * characters_per_word) + 1):
        run = size  # words so far that repeat with a period of `size`
        for word, before in zip(words[size:], words, strict=False):
            run = run + 1 if word == before else size
            if run >= max(LOOP_TIMES * size, least_words):
                return True
    return False
