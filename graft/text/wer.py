"""Score transcripts by word and character error rates.

    counts of each clip -> sums over the corpus -> rates with a bootstrap interval

A rate is errors / max(1, reference words) over the whole corpus, never a mean of the clips' rates: a clip with an empty
reference adds its invented words as insertions, and no rate is infinite.

English is normalised as Whisper does it. Any other language gets Whisper's basic normaliser, which lowers case and
removes punctuation and symbols, and here keeps the marks of letters, without which Hindi or Thai is unreadable. In
scripts without spaces each written character is a word, as in the Whisper paper, so that WER and CER nearly agree.
Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2022, appendix C.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import regex

from graft.errors import DataError, require
from graft.text.characters import UNSPACED, compose, is_unspaced

ENGLISH, BASIC, BASIC_BY_CHARACTER = NORMALIZERS = ("english", "basic", "basic, by character")
"""Names of the normalisers in reports."""
NORMALIZERS_IN_WORDS = {
    ENGLISH: "Whisper's English normaliser",
    BASIC: "Whisper's basic normaliser with the marks of letters kept",
    BASIC_BY_CHARACTER: "Whisper's basic normaliser with the marks of letters kept, each character a word",
}
MOST_ENGLISH_MARKED = 0.01
"""Share of letters outside ASCII up to which texts of an unknown language are taken for English; French has 0.03."""
_UNSPACED_CHARACTER = regex.compile(rf"({UNSPACED}[\p{{M}}\p{{Lm}}]*)")
_SPACE_IN_UNSPACED = regex.compile(rf"(?<={UNSPACED}[\p{{M}}\p{{Lm}}]*) | (?={UNSPACED})")


@dataclass(frozen=True)
class WordErrors:
    """Errors of a hypothesis, counted in words or in characters; counts of clips add up with `+` and sum()."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    hits: int = 0

    def __add__(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.hits + other.hits,
        )

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_count(self) -> int:
        return self.substitutions + self.deletions + self.hits

    @property
    def rate(self) -> float:
        return self.errors / max(1, self.reference_count)


@dataclass(frozen=True)
class Score:
    """Error rates of a corpus as fractions.

    wer, its 95 % interval and cer count after the normaliser that is named, wer_raw and cer_raw on texts as written.
    """

    wer: float
    wer_low: float
    wer_high: float
    cer: float
    wer_raw: float
    cer_raw: float
    clips: int
    words: int  # of the normalised references
    normalizer: str = ENGLISH  # one of NORMALIZERS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(references: Sequence[str], hypotheses: Sequence[str], *, language: str | None = None, seed: int = 0) -> Score:
    """Score hypotheses against their references, after the normaliser of their language (choose_normalizer).

    Raises DataError for no clips or unequal lengths, MissingExtra.
    """
    if len(references) != len(hypotheses) or not references:
        raise DataError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: wants as many of both, and at least one"
        )
    references, hypotheses = list(map(compose, references)), list(map(compose, hypotheses))
    normalizer = choose_normalizer(references, language=language)
    normal_references = [normalize(text, normalizer) for text in references]
    normal_hypotheses = [normalize(text, normalizer) for text in hypotheses]
    words = list(map(word_errors, normal_references, normal_hypotheses))
    low, high = bootstrap_interval(words, seed=seed)
    total = sum(words, WordErrors())
    if normalizer == BASIC_BY_CHARACTER:
        texts = (normal_references, normal_hypotheses, references, hypotheses)
        normal_references, normal_hypotheses, raw_references, raw_hypotheses = (
            [_SPACE_IN_UNSPACED.sub("", text) for text in some] for some in texts
        )
        references, hypotheses = ([_part_unspaced(text) for text in some] for some in (references, hypotheses))
    else:
        raw_references, raw_hypotheses = references, hypotheses
    return Score(
        wer=total.rate,
        wer_low=low,
        wer_high=high,
        cer=sum(map(character_errors, normal_references, normal_hypotheses), WordErrors()).rate,
        wer_raw=sum(map(word_errors, references, hypotheses), WordErrors()).rate,
        cer_raw=sum(map(character_errors, raw_references, raw_hypotheses), WordErrors()).rate,
        clips=len(words),
        words=total.reference_count,
        normalizer=normalizer,
    )


def choose_normalizer(references: Sequence[str], *, language: str | None = None) -> str:
    """Choose one of NORMALIZERS for texts of a language (ISO 639-1), which may be unknown.

    Texts of an unknown language are taken for English where nearly all of their letters are in ASCII.
    """
    text = " ".join(references)
    if language == "en":
        return ENGLISH
    if language is None:
        letters = [character for character in text if character.isalpha()]
        if sum(not letter.isascii() for letter in letters) <= MOST_ENGLISH_MARKED * len(letters):
            return ENGLISH
    return BASIC_BY_CHARACTER if is_unspaced(text) else BASIC


def normalize(text: str, normalizer: str) -> str:
    """Normalise a text by one of NORMALIZERS. Raises MissingExtra."""
    if normalizer == ENGLISH:
        return normalize_english(text)
    basic = " ".join(_basic_normalizer()(text).split())
    return _part_unspaced(basic) if normalizer == BASIC_BY_CHARACTER else basic


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Align by words, which are split at white space and otherwise kept as they are (jiwer). Raises MissingExtra."""
    return _count("process_words", reference, hypothesis)


def character_errors(reference: str, hypothesis: str) -> WordErrors:
    """Align by characters, single spaces between words included (jiwer). Raises MissingExtra."""
    return _count("process_characters", reference, hypothesis)


def normalize_english(text: str) -> str:
    """Normalise a text as Whisper does: lower case, no punctuation, digits, American spelling, full contractions.

    The package whisper-normalizer also writes out kinda, sorta and dunno, and reads "cause" as "because", unlike
    OpenAI's own rules. Raises MissingExtra.
    """
    return _english_normalizer()(text)


def bootstrap_interval(
    counts: Sequence[WordErrors], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Estimate the percentile interval of the corpus rate over resampled clips: counts (clips,) -> (low, high).

    Raises DataError for no clips. Source: Bisani & Ney, Bootstrap estimates for confidence intervals in ASR performance
    evaluation, ICASSP 2004.
    """
    if not counts:
        raise DataError("no clips to estimate an interval from")
    errors = np.array([count.errors for count in counts])
    words = np.array([count.reference_count for count in counts])
    random = np.random.default_rng(seed)
    rates = np.empty(resamples)
    block = max(1, 4_000_000 // len(counts))  # resamples at a time, so that memory stays at tens of MB
    for start in range(0, resamples, block):
        drawn = random.integers(len(counts), size=(min(block, resamples - start), len(counts)))  # (resamples, clips)
        rates[start : start + block] = errors[drawn].sum(axis=1) / np.maximum(1, words[drawn].sum(axis=1))
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _count(process: str, reference: str, hypothesis: str) -> WordErrors:
    jiwer = require("jiwer", extra="score")
    # jiwer splits at spaces only, so that tabs and line breaks would join words.
    result = getattr(jiwer, process)(" ".join(reference.split()), " ".join(hypothesis.split()))
    return WordErrors(result.substitutions, result.deletions, result.insertions, result.hits)


def _part_unspaced(text: str) -> str:
    """Write a space around each character of a script without spaces."""
    return " ".join(_UNSPACED_CHARACTER.sub(r" \1 ", text).split())


@functools.cache
def _english_normalizer() -> Callable[[str], str]:
    return require("whisper_normalizer.english", extra="score").EnglishTextNormalizer()


@functools.cache
def _basic_normalizer() -> Callable[[str], str]:
    return require("whisper_normalizer.basic", extra="score").BasicTextNormalizer(preserve_marks=True)
