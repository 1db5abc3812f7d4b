"""Score transcripts by word and character error rates.

    counts of each clip -> sums over the corpus -> rates with a bootstrap interval

A rate is errors / max(1, reference words) over the whole corpus, never a mean of the clips' rates: a clip with an empty
reference adds its invented words as insertions, and no rate is infinite.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from graft.errors import DataError, require


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

    wer, its 95 % interval and cer count after Whisper's English normaliser, wer_raw and cer_raw on texts as written.
    """

    wer: float
    wer_low: float
    wer_high: float
    cer: float
    wer_raw: float
    cer_raw: float
    clips: int
    words: int  # of the normalised references

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def score(references: Sequence[str], hypotheses: Sequence[str], *, seed: int = 0) -> Score:
    """Score hypotheses against their references. Raises DataError for no clips or unequal lengths, MissingExtra."""
    if len(references) != len(hypotheses) or not references:
        raise DataError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: wants as many of both, and at least one"
        )
    normal_references = [normalize_english(text) for text in references]
    normal_hypotheses = [normalize_english(text) for text in hypotheses]
    words = list(map(word_errors, normal_references, normal_hypotheses))
    low, high = bootstrap_interval(words, seed=seed)
    total = sum(words, WordErrors())
    return Score(
        wer=total.rate,
        wer_low=low,
        wer_high=high,
        cer=sum(map(character_errors, normal_references, normal_hypotheses), WordErrors()).rate,
        wer_raw=sum(map(word_errors, references, hypotheses), WordErrors()).rate,
        cer_raw=sum(map(character_errors, references, hypotheses), WordErrors()).rate,
        clips=len(words),
        words=total.reference_count,
    )


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


@functools.cache
def _english_normalizer() -> Callable[[str], str]:
    return require("whisper_normalizer.english", extra="score").EnglishTextNormalizer()
