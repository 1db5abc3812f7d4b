"""Score what systems answered: error rates with intervals, comparisons of systems in words, and break-downs.

    predictions -> test sets (pairing) -> counts and resamples (samples) -> scores.json

Scores are one JSON object:

    sets         set -> {clips, normalizer, unit, units, systems, comparisons, breakdowns, label_noise}
      systems    system -> rates with intervals, counts, clips that are missing or failed, speed
    overall      of several sets: their clips pooled (`pooled`), and the mean of their rates (`mean_of_sets`)
    misfits      ids of answers that are not scored, or were given twice
    settings     scorer, seed, resamples, versions of the packages that decide the rates

All rates are fractions. Counts (`counts`: rate -> substitutions, deletions, insertions, hits) add up over shards.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from graft.text.bootstrap import LEVEL
from graft.text.wer import package_versions, references_of, total

from .breakdowns import UNKNOWN, groups_of
from .pairing import Misfits, TestSet, pair
from .predictions import Prediction
from .samples import ALL_RATES, CountedSet, Samples, ScoringSettings, count_set, draw, mean_of, pooled

Category = Literal["exact", "partial", "mismatch"]
CATEGORIES: tuple[Category, ...] = ("exact", "partial", "mismatch")


def score_predictions(
    predictions: Iterable[Prediction], settings: ScoringSettings | None = None, *, own_references: bool = True
) -> dict[str, Any]:
    """Score predictions of any number of sets and systems; returns the content of scores.json.

    `own_references` is that of `pair`. Raises DataError as `pair`, and MissingExtra.
    """
    sets, misfits = pair(predictions, own_references=own_references)
    return score_sets(sets, settings or ScoringSettings(), misfits)


def score_sets(sets: Sequence[TestSet], settings: ScoringSettings, misfits: Misfits | None = None) -> dict[str, Any]:
    """Score test sets; a set of several languages becomes one for each, "NAME LANGUAGE"."""
    counted = [count_set(part, settings) for one in sets for part in by_language(one, settings)]
    scores: dict[str, Any] = {}
    samples: list[Samples] = []
    for place, one in enumerate(counted):
        if one.systems and one.test_set.clips and not one.is_silent:
            samples.append(draw(one, settings, place=place))
            scores[one.name] = _spoken(one, samples[-1], settings)
        else:
            scores[one.name] = _silent(one)
    return {
        "sets": scores,
        "overall": _overall(samples, scores) if len(samples) > 1 else None,
        "misfits": (misfits or Misfits()).to_json(),
        "settings": {
            "scorer": settings.scorer,
            "level": LEVEL,
            "resamples": settings.resamples,
            "seed": settings.seed,
            "packages": package_versions(),
        },
    }


def by_language(one: TestSet, settings: ScoringSettings) -> list[TestSet]:
    """Part a set of several languages into one for each, "NAME LANGUAGE"."""
    languages = [clip.known.language or settings.language for clip in one.clips]
    if len(set(languages)) < 2:
        return [one]
    parts = []
    for language in dict.fromkeys(languages):
        clips = [clip for clip, own in zip(one.clips, languages, strict=True) if own == language]
        systems = [system for system in one.systems if any(system in clip.answers for clip in clips)]
        parts.append(TestSet(f"{one.name} {language or UNKNOWN}".strip(), clips, systems))
    return parts


# A set


def _spoken(one: CountedSet, samples: Samples, settings: ScoringSettings) -> dict[str, Any]:
    """Score a set with speech."""
    groups = {column: groups_of(one.test_set.clips, column) for column in settings.by}
    return {
        "clips": len(one.test_set.clips),
        "left_out": list(one.left_out),
        "language": one.language,
        "normalizer": one.normalizer,
        "unit": one.unit,
        "units": len(set(one.units.tolist())),
        "empty_references": sum(not text.strip() for text in one.references),
        "systems": {
            system: samples.scores(system, ALL_RATES) | _counts(one, system) | _answers(one, system)
            for system in one.systems
        },
        "comparisons": [_compare(one, samples, pair, settings) for pair in itertools.combinations(one.systems, 2)],
        "breakdowns": {
            column: {name: _group(one, clips, settings) for name, clips in found.items()}
            for column, found in groups.items()
            if found
        },
        "label_noise": _label_noise(one) if len(one.systems) > 1 else None,
    }


def _silent(one: CountedSet) -> dict[str, Any]:
    """Count what is written in a set where nobody speaks."""
    clips = one.test_set.clips
    minutes = sum(clip.known.duration_s or 0 for clip in clips) / 60
    systems = {}
    for system in one.systems:
        lengths = np.array([len(clip.text_of(system) or "") for clip in clips])
        systems[system] = {
            "minutes": minutes,
            "chars_per_minute": float(lengths.sum() / minutes) if minutes else None,
            "share_with_text": float(np.mean(lengths > 0)) if clips else 0.0,
        } | _answers(one, system)
    return {"clips": len(clips), "left_out": list(one.left_out), "systems": systems}


def _counts(one: CountedSet, system: str) -> dict[str, Any]:
    words = total(one.counts[system]["wer"])
    categories = Counter(category(clip.reference, clip.text_of(system)) for clip in one.test_set.clips)
    return {
        "words": words.reference_count,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "counts": {rate: table.sum(axis=0).tolist() for rate, table in one.counts[system].items()},
        **{name: categories[name] for name in CATEGORIES},
    }


def category(reference: str, hypothesis: str | None) -> Category:
    """Name how a text fits its reference, in lower case: equal; with the reference somewhere in it; or neither.

    A clip without an answer is a mismatch, and so is any text for an empty reference.
    """
    wanted, text = (" ".join(one.lower().split()) for one in (reference, hypothesis or ""))
    if hypothesis is not None and text == wanted:
        return "exact"
    return "partial" if wanted and wanted in text else "mismatch"


def _answers(one: CountedSet, system: str) -> dict[str, Any]:
    """Count a system's answers, list the clips without one, and measure its speed where all answers tell it."""
    clips = one.test_set.clips
    answers = [(clip, answer) for clip in clips if (answer := clip.answers.get(system))]
    times = [(answer.duration_s or clip.known.duration_s or 0, answer.seconds or 0) for clip, answer in answers]
    return {
        "clips": len(clips),
        "answered": sum(answer.hypothesis is not None for _, answer in answers),
        "missing": [clip.known.id for clip in clips if system not in clip.answers],
        "failed": {
            clip.known.id: answer.error or "no hypothesis" for clip, answer in answers if answer.hypothesis is None
        },
        "flags": dict(Counter(flag for _, answer in answers for flag in answer.flags)),
        **_speed(times),
    }


def _speed(times: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Sum the seconds of audio and of transcription, where all are known, and divide them."""
    if not times or min(map(min, times)) <= 0:
        return {"audio_s": None, "seconds": None, "rtfx": None}
    audio_s, seconds = (sum(one) for one in zip(*times, strict=True))
    return {"audio_s": audio_s, "seconds": seconds, "rtfx": audio_s / seconds}


def _compare(one: CountedSet, samples: Samples, pair: tuple[str, str], settings: ScoringSettings) -> dict[str, Any]:
    """Compare the WER of two systems: on all clips, and on those that both answered."""
    answered = np.array([all(clip.text_of(system) is not None for system in pair) for clip in one.test_set.clips])
    result: dict[str, Any] = {"systems": list(pair), "all": {"clips": len(answered)} | _verdict(samples, pair)}
    if answered.all() or not answered.any():
        return result | {"both": result["all"] if answered.all() else None}
    both = draw(one, settings, clips=answered, systems=pair, rates=("wer",))
    return result | {"both": {"clips": int(answered.sum())} | _verdict(both, pair)}


def _verdict(samples: Samples, pair: tuple[str, str]) -> dict[str, Any]:
    found = samples.difference(*pair)
    return {**vars(found), "verdict": found.verdict(*pair)}


def _group(one: CountedSet, clips: "np.ndarray[Any, Any]", settings: ScoringSettings) -> dict[str, Any]:
    """Score the clips that share a value of a column."""
    rates = ("wer", "cer")
    samples = draw(one, settings, clips=clips, rates=rates)
    words = references_of(one.counts[one.systems[0]]["wer"])[clips].sum()
    systems = {system: samples.scores(system, rates) for system in one.systems}
    return {"clips": int(clips.sum()), "words": int(words), "systems": systems}


def _label_noise(one: CountedSet) -> dict[str, Any]:
    """Set aside the clips where more than half of the systems, two at least, write the same other than the label."""
    suspects = []
    for place, reference in enumerate(one.references):
        text, count = Counter(one.texts[system][place] for system in one.systems).most_common(1)[0]
        agree = count >= 2 and 2 * count > len(one.systems)
        suspects.append(agree and bool(text.strip()) and text.split() != reference.split())
    kept = ~np.array(suspects)
    systems = {}
    for system in one.systems:
        words = one.counts[system]["wer"]
        systems[system] = {"wer": total(words).rate, "wer_kept": total(words[kept]).rate}
    ids = [clip.known.id for clip, is_one in zip(one.test_set.clips, suspects, strict=True) if is_one]
    return {"set_aside": ids, "systems": systems}


# All sets together


def _overall(samples: Sequence[Samples], sets: Mapping[str, Any]) -> dict[str, Any]:
    """Score all sets together, for the systems that answered in each: their clips pooled, and the mean of the sets."""
    bases = {"pooled": pooled(samples), "mean_of_sets": mean_of(samples)}
    systems = list(dict.fromkeys(system for system, _ in bases["pooled"].found))
    spoken = [one["systems"] for one in sets.values() if "normalizer" in one]
    speeds = {
        system: _speed([(one[system]["audio_s"] or 0, one[system]["seconds"] or 0) for one in spoken])
        for system in systems
    }
    return {
        "systems": {
            system: {basis: one.scores(system, ALL_RATES) for basis, one in bases.items()} | speeds[system]
            for system in systems
        },
        "comparisons": [
            {"systems": list(pair)} | {basis: _verdict(one, pair) for basis, one in bases.items()}
            for pair in itertools.combinations(systems, 2)
        ],
    }
