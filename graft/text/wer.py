"""Score transcripts by word and character error rates.

    counts of each clip -> sums over the corpus -> rates with a bootstrap interval (graft.text.bootstrap)

A rate is errors / max(1, reference words) over the whole corpus, never a mean of the clips' rates unless it is called
macro: a clip with an empty reference adds its invented words as insertions, and no rate is infinite.

English is normalised as Whisper does it. Any other language gets Whisper's basic normaliser, which lowers case and
removes punctuation and symbols, and here keeps the marks of letters, without which Hindi or Thai is unreadable. In
scripts without spaces each written character is a word, as in the Whisper paper, so that WER and CER nearly agree.
Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2022, appendix C.
"""

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from graft.errors import DataError, require
from graft.text.bootstrap import interval, rate_of, resample_sums
from graft.text.characters import UNSPACED, compose, is_unspaced

ENGLISH, OPENAI_ENGLISH, BASIC, BASIC_BY_CHARACTER = NORMALIZERS = (
    "english",
    "openai english",
    "basic",
    "basic, by character",
)
"""Names of the normalisers in reports."""
NORMALIZERS_IN_WORDS = {
    ENGLISH: "Whisper's English normaliser",
    OPENAI_ENGLISH: "Whisper's English normaliser as OpenAI published it",
    BASIC: "Whisper's basic normaliser with the marks of letters kept",
    BASIC_BY_CHARACTER: "Whisper's basic normaliser with the marks of letters kept, each character a word",
}
MOST_ENGLISH_MARKED = 0.01
"""Share of letters outside ASCII up to which texts of an unknown language are taken for English; French has 0.03."""
RATES = ("wer", "cer", "wer_folded", "cer_folded", "wer_raw", "cer_raw")
"""Rates of words and of characters: after the normaliser, with case folded, and on texts as written."""
PACKAGES = ("whisper-normalizer", "jiwer", "kaldialign")
"""Packages whose versions decide rates."""
_NOT_OPENAIS = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")
"""Patterns that whisper-normalizer replaces and OpenAI's own rules do not."""
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
    normalizer = choose_normalizer(references, language=language)
    by_character = normalizer == BASIC_BY_CHARACTER
    counts = count_clips(references, hypotheses, lambda text: normalize(text, normalizer), by_character=by_character)
    words = counts["wer"]
    sums = resample_sums(np.stack([errors_of(words), references_of(words)], axis=1), seed=seed)
    low, high = interval(rate_of(sums[:, 0], sums[:, 1]))
    rates = {name: total(table).rate for name, table in counts.items()}
    return Score(
        wer=rates["wer"],
        wer_low=low,
        wer_high=high,
        cer=rates["cer"],
        wer_raw=rates["wer_raw"],
        cer_raw=rates["cer_raw"],
        clips=len(words),
        words=total(words).reference_count,
        normalizer=normalizer,
    )


def count_clips(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: Callable[[str], str],
    *,
    by_character: bool = False,
    merges_compounds: bool = False,
) -> dict[str, NDArray[np.int64]]:
    """Count the errors of each clip for each of RATES: (clips, 4) of substitutions, deletions, insertions and hits.

    With `by_character` each character of a script without spaces is a word. With `merges_compounds` words that are
    joined or parted otherwise than in the reference are right (compound_word_errors). Raises MissingExtra.
    """
    pairs = [(compose(reference), compose(text)) for reference, text in zip(references, hypotheses, strict=True)]
    forms: dict[str, Callable[[str], str]] = {"": normalizer, "_folded": str.casefold, "_raw": str}
    count_words = compound_word_errors if merges_compounds else word_errors
    counts = {}
    for form, written in forms.items():
        texts = [(written(reference), written(text)) for reference, text in pairs]
        words = characters = texts
        if by_character:
            words = [(_part_unspaced(reference), _part_unspaced(text)) for reference, text in texts]
            characters = [(_join_unspaced(reference), _join_unspaced(text)) for reference, text in texts]
        counts[f"wer{form}"] = _table(count_words(*one) for one in words)
        counts[f"cer{form}"] = _table(character_errors(*one) for one in characters)
    return counts


def errors_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum the errors of counts: (clips, 4) -> (clips,)."""
    return counts[:, :3].sum(axis=1)


def references_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the words of the references: (clips, 4) -> (clips,)."""
    return counts[:, [0, 1, 3]].sum(axis=1)


def total(counts: NDArray[np.int64]) -> WordErrors:
    """Sum counts over clips: (clips, 4) -> one."""
    return WordErrors(*map(int, counts.sum(axis=0)))


def choose_normalizer(references: Sequence[str], *, language: str | None = None) -> str:
    """Choose one of NORMALIZERS for texts of a language (ISO 639-1), which may be unknown.

    Texts of an unknown language are taken for English where nearly all of their letters are in ASCII.
    """
    text = compose(" ".join(references))
    if language == "en":
        return ENGLISH
    if language is None:
        letters = [character for character in text if character.isalpha()]
        if sum(not letter.isascii() for letter in letters) <= MOST_ENGLISH_MARKED * len(letters):
            return ENGLISH
    return BASIC_BY_CHARACTER if is_unspaced(text) else BASIC


def normalize(text: str, normalizer: str) -> str:
    """Normalise a text by one of NORMALIZERS.

    The English ones write lower case, no punctuation, digits, American spelling and full contractions. The package
    whisper-normalizer also writes out kinda, sorta and dunno, and reads "cause" as "because"; OpenAI's own rules do
    not. Raises MissingExtra.
    """
    if normalizer in (ENGLISH, OPENAI_ENGLISH):
        return _english_normalizer(is_openais=normalizer == OPENAI_ENGLISH)(text)
    basic = " ".join(_basic_normalizer()(text).split())
    return _part_unspaced(basic) if normalizer == BASIC_BY_CHARACTER else basic


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Align by words, which are split at white space and otherwise kept as they are (jiwer). Raises MissingExtra."""
    return _count("process_words", reference, hypothesis)


def character_errors(reference: str, hypothesis: str) -> WordErrors:
    """Align by characters, single spaces between words included (jiwer). Raises MissingExtra."""
    return _count("process_characters", reference, hypothesis)


def compound_word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Align by words, of which neighbours may be joined: "white paper" and "whitepaper" agree (kaldialign).

    Raises MissingExtra.
    """
    kaldialign = require("kaldialign", extra="score")
    words = reference.split()
    result = kaldialign.edit_distance(words, hypothesis.split(), merge_compounds=True)
    errors = result["sub"], result["del"], result["ins"]
    return WordErrors(*errors, hits=len(words) - result["sub"] - result["del"])


def _count(process: str, reference: str, hypothesis: str) -> WordErrors:
    jiwer = require("jiwer", extra="score")
    # jiwer splits at spaces only, so that tabs and line breaks would join words.
    result = getattr(jiwer, process)(" ".join(reference.split()), " ".join(hypothesis.split()))
    return WordErrors(result.substitutions, result.deletions, result.insertions, result.hits)


def _part_unspaced(text: str) -> str:
    """Write a space around each character of a script without spaces."""
    return " ".join(_UNSPACED_CHARACTER.sub(r" \1 ", text).split())


def _table(counts: Iterable[WordErrors]) -> NDArray[np.int64]:
    rows = [(one.substitutions, one.deletions, one.insertions, one.hits) for one in counts]
    return np.array(rows, np.int64).reshape(-1, 4)


def _join_unspaced(text: str) -> str:
    """Leave out the spaces beside characters of scripts without spaces."""
    return _SPACE_IN_UNSPACED.sub("", text)


@functools.cache
def _english_normalizer(*, is_openais: bool) -> Callable[[str], str]:
    normalizer = require("whisper_normalizer.english", extra="score").EnglishTextNormalizer()
    for pattern in _NOT_OPENAIS if is_openais else ():
        del normalizer.replacers[pattern]
    return normalizer


@functools.cache
def _basic_normalizer() -> Callable[[str], str]:
    return require("whisper_normalizer.basic", extra="score").BasicTextNormalizer(preserve_marks=True)
