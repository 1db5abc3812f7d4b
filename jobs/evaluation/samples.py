"""Count the errors of systems in a test set, and resample them.

test set -> counts of each clip and system -> rates, their resamples -> intervals and differences
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graft.text.bootstrap import RESAMPLES, Difference, interval, rate_of, resample_sums
from graft.text.wer import (
    BASIC_BY_CHARACTER,
    ENGLISH,
    OPENAI_ENGLISH,
    RATES,
    choose_normalizer,
    count_clips,
    errors_of,
    normalize,
    references_of,
)

from .pairing import TestSet

Scorer = Literal["graft", "open-asr"]
Floats = NDArray[np.float64]
MACRO = ("wer_macro", "cer_macro")
"""Means of the clips' rates, after the normaliser."""
ALL_RATES = (*RATES, *MACRO)
IGNORED = "ignore time segment in scoring"
"""Reference that marks a clip which the Open ASR Leaderboard leaves out."""


@dataclass(frozen=True)
class ScoringSettings:
    """How predictions are scored."""

    scorer: Scorer = "graft"
    """open-asr is the rule of the Open ASR Leaderboard: OpenAI's English normaliser, words that are joined or parted
    otherwise are right, clips without reference words are left out."""
    normalizer: str | None = None
    """One of graft.text.wer.NORMALIZERS; None chooses it by the language of each set."""
    english: tuple[str, Callable[[str], str]] | None = None
    """A function that normalises English in place of the named ones, and its name in the scores."""
    language: str | None = None
    """Language of clips that name none."""
    by: Sequence[str] = ("source", "speaker", "sex", "duration")
    """Columns by which the rates are broken down."""
    seed: int = 0
    resamples: int = RESAMPLES


@dataclass(frozen=True)
class CountedSet:
    """A test set with the counts of each system's clips; a clip without an answer has all its words deleted."""

    test_set: TestSet
    language: str | None
    normalizer: str
    counts: Mapping[str, Mapping[str, NDArray[np.int64]]]
    """system -> rate -> (clips, 4)"""
    references: Sequence[str]
    """Normalised references."""
    texts: Mapping[str, Sequence[str]]
    """Normalised texts of each system."""
    left_out: Sequence[str]
    """Ids of clips that the scorer leaves out."""

    @property
    def name(self) -> str:
        return self.test_set.name

    @property
    def systems(self) -> Sequence[str]:
        return self.test_set.systems

    @property
    def is_silent(self) -> bool:
        """Whether nobody speaks in any clip, so that there is no rate of words."""
        return not any(clip.reference.strip() for clip in self.test_set.clips)

    @functools.cached_property
    def unit(self) -> Literal["speaker", "clip"]:
        """What is resampled: speakers where at least two are known, else clips."""
        speakers = {clip.known.speaker for clip in self.test_set.clips} - {None, ""}
        return "speaker" if len(speakers) > 1 else "clip"

    @functools.cached_property
    def units(self) -> NDArray[np.int64]:
        """The number of each clip's unit: (clips,). A clip of an unknown speaker is a unit of its own."""
        clips, numbers = self.test_set.clips, dict[Any, int]()
        if self.unit == "clip":
            return np.arange(len(clips))
        keys = [clip.known.speaker or place for place, clip in enumerate(clips)]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def count_set(test_set: TestSet, settings: ScoringSettings) -> CountedSet:
    """Normalise and count a test set of one language. Raises MissingExtra."""
    references = [clip.reference for clip in test_set.clips]
    language = (test_set.clips[0].known.language if test_set.clips else None) or settings.language
    name = settings.normalizer or choose_normalizer(references, language=language)
    is_open_asr = settings.scorer == "open-asr"
    if is_open_asr and not settings.normalizer and name == ENGLISH:
        name = OPENAI_ENGLISH
    by_character = name == BASIC_BY_CHARACTER
    function: Callable[[str], str] = functools.partial(normalize, normalizer=name)
    if settings.english and name in (ENGLISH, OPENAI_ENGLISH):
        name, function = settings.english
    normal = functools.cache(function)  # systems often write the same
    left_out: list[str] = []
    if is_open_asr:
        kept = [normal(text).strip() not in ("", IGNORED) for text in references]
        left_out = [clip.known.id for clip, is_kept in zip(test_set.clips, kept, strict=True) if not is_kept]
        test_set = replace(
            test_set, clips=[clip for clip, is_kept in zip(test_set.clips, kept, strict=True) if is_kept]
        )
        references = [clip.reference for clip in test_set.clips]
    texts = {system: [clip.text_of(system) or "" for clip in test_set.clips] for system in test_set.systems}
    counts = {
        system: count_clips(references, some, normal, by_character=by_character, merges_compounds=is_open_asr)
        for system, some in texts.items()
    }
    normal_texts = {system: list(map(normal, some)) for system, some in texts.items()}
    return CountedSet(test_set, language, name, counts, list(map(normal, references)), normal_texts, left_out)


@dataclass(frozen=True)
class Samples:
    """Rates of systems: errors and reference words, of the clips as they are and of the resamples.

    For a macro rate they are the sum of the clips' rates and their number.
    """

    found: Mapping[tuple[str, str], tuple[float, float]]
    """(system, rate) -> errors and words."""
    drawn: Mapping[tuple[str, str], tuple[Floats, Floats]]
    """(system, rate) -> the same for each resample: (resamples,) each."""
    units: int
    """Number of speakers or clips that were drawn from."""

    def rate(self, system: str, rate: str) -> float:
        """Return a rate of the clips."""
        errors, words = self.found[system, rate]
        return errors / max(1.0, words)

    def rates(self, system: str, rate: str) -> Floats:
        """Return a rate of each resample."""
        return rate_of(*self.drawn[system, rate])

    def scores(self, system: str, rates: Sequence[str]) -> dict[str, float]:
        """Return rates, each with its interval: rate, rate_low, rate_high."""
        scores: dict[str, float] = {}
        for rate in rates:
            low, high = interval(self.rates(system, rate))
            scores |= {rate: self.rate(system, rate), f"{rate}_low": low, f"{rate}_high": high}
        return scores

    def difference(self, first: str, second: str, rate: str = "wer") -> Difference:
        """Compare two systems on the same resamples."""
        low, high = interval(self.rates(first, rate) - self.rates(second, rate))
        return Difference(self.rate(first, rate) - self.rate(second, rate), low, high, self.units)


def draw(
    one: CountedSet,
    settings: ScoringSettings,
    *,
    clips: NDArray[np.bool_] | None = None,
    systems: Sequence[str] | None = None,
    rates: Sequence[str] = ALL_RATES,
    place: int = 0,
) -> Samples:
    """Resample a set, or some clips of it: by its units, or by clips where those are all of one unit.

    `place` is the number of the set, so that each set has draws of its own.
    """
    chosen = np.ones(len(one.test_set.clips), bool) if clips is None else clips
    keys = [(system, rate) for system in systems or one.systems for rate in rates]
    columns = [column for system, rate in keys for column in _columns(one.counts[system], rate)]
    table = np.stack(columns, axis=1)[chosen]  # (clips, 2 * keys)
    numbers = np.unique(one.units[chosen], return_inverse=True)[1]
    units = numbers if numbers.any() else None
    sums = resample_sums(table, units, seed=(settings.seed, place), resamples=settings.resamples)
    whole = table.sum(axis=0)
    return Samples(
        {key: (float(whole[2 * at]), float(whole[2 * at + 1])) for at, key in enumerate(keys)},
        {key: (sums[:, 2 * at], sums[:, 2 * at + 1]) for at, key in enumerate(keys)},
        len(table) if units is None else int(units.max()) + 1,
    )


def pooled(samples: Sequence[Samples]) -> Samples:
    """Put the clips of several sets together, each resampled by itself; for the systems that are in all of them."""
    found = {key: np.sum([one.found[key] for one in samples], axis=0) for key in _shared(samples)}
    drawn = {key: np.sum([one.drawn[key] for one in samples], axis=0) for key in _shared(samples)}
    return Samples(
        {key: (float(errors), float(words)) for key, (errors, words) in found.items()},
        {key: (errors, words) for key, (errors, words) in drawn.items()},
        sum(one.units for one in samples),
    )


def mean_of(samples: Sequence[Samples]) -> Samples:
    """Take the mean of several sets' rates; for the systems that are in all of them."""
    ones = np.ones(len(next(iter(samples[0].drawn.values()))[0]))
    return Samples(
        {key: (float(np.mean([one.rate(*key) for one in samples])), 1.0) for key in _shared(samples)},
        {key: (np.mean([one.rates(*key) for one in samples], axis=0), ones) for key in _shared(samples)},
        sum(one.units for one in samples),
    )


def _shared(samples: Sequence[Samples]) -> list[tuple[str, str]]:
    return [key for key in samples[0].found if all(key in one.found for one in samples)]


def _columns(counts: Mapping[str, NDArray[np.int64]], rate: str) -> tuple[Floats, Floats]:
    """Return what is summed for a rate: its numerator and its denominator for each clip."""
    if rate in MACRO:
        own = counts[rate.removesuffix("_macro")]
        return rate_of(errors_of(own), references_of(own)), np.ones(len(own))
    return errors_of(counts[rate]).astype(float), references_of(counts[rate]).astype(float)
