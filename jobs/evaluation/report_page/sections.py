"""Prepare the sections of the page that tell the scores: plain values, which the template lays out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..score_table import notes
from .evaluation import Evaluation
from .plots import Plot, group_plot, speed_plot


def head_section(evaluation: Evaluation) -> dict[str, Any]:
    """Say what was evaluated: the model, its systems, sets and clips, and how it was transcribed and scored."""
    scores = evaluation.scores
    settings = scores["settings"]
    return {
        "model": str(scores.get("model") or (evaluation.systems[0] if evaluation.systems else "no system")),
        "systems": list(evaluation.systems),
        "sets": [one.name for one in evaluation.sets],
        "clips": sum(len(one.test_set.clips) for one in evaluation.sets),
        "hours": sum(clip.known.duration_s or 0 for one in evaluation.sets for clip in one.test_set.clips) / 3600,
        "pipeline": scores.get("pipeline"),
        "settings": {
            "scorer": settings["scorer"],
            "resamples": settings["resamples"],
            "level": settings["level"],
            "seed": settings["seed"],
            **settings["packages"],
        },
    }


def rate_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the rates of each set with speech and system, then those of all sets together."""
    rows = [
        {"set": name, "system": system, "is_first": not place, "is_sum": False, **found}
        for name, one in scores["sets"].items()
        for place, (system, found) in enumerate(one["systems"].items())
        if "wer" in found
    ]
    speeds = scores.get("rtfx") or {}
    for row in rows:
        row["rtfx"] = row.get("rtfx") or speeds.get(row["system"])
    overall = (scores["overall"] or {"systems": {}})["systems"]
    for basis, title in (("pooled", "all clips"), ("mean_of_sets", "mean of sets")):
        for place, (system, found) in enumerate(overall.items()):
            rows.append(
                {"set": title, "system": system, "is_first": not place, "is_sum": True, **found[basis], "rtfx": None}
            )
    return rows


def sound_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List what each system writes on sets in which nobody speaks."""
    return [
        {"set": name, "system": system, "is_first": not place, **found}
        for name, one in scores["sets"].items()
        for place, (system, found) in enumerate(one["systems"].items())
        if "chars_per_minute" in found
    ]


def notes_of(scores: Mapping[str, Any], system: str) -> list[dict[str, str]]:
    """List sentences about the scores, the verdicts on pairs of systems first.

    `kind` is note, or that of a verdict: good or bad for `system`, or even where it shows nothing or is about others.
    """
    verdicts = [*_verdicts(scores, system), *_expected(scores)]
    told = {one["text"] for one in verdicts}
    others = [text for name, one in scores["sets"].items() for text in notes(name, one, scores["settings"])]
    return verdicts + [{"kind": "note", "text": text} for text in others if text not in told]


def plots_of(evaluation: Evaluation) -> list[Plot]:
    """Draw the WER over the speed, and by the groups of each set. Raises MissingExtra."""
    scores, systems = evaluation.scores, evaluation.systems
    found = []
    if points := _points(scores, systems):
        found.append(speed_plot(points))
    for name, one in scores["sets"].items():
        told = [system for system in systems if system in one["systems"]]
        for column, groups in one.get("breakdowns", {}).items():
            if len(groups) > 1:
                found.append(group_plot(name, column, groups, told))
    return found


def _points(scores: Mapping[str, Any], systems: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the WER over all sets, or the only one, and the speed of each system of which both are known."""
    overall = (scores["overall"] or {"systems": {}})["systems"]
    only: Mapping[str, Any] = next((one["systems"] for one in scores["sets"].values() if "normalizer" in one), {})
    points = {}
    for system in systems:
        wer = overall[system]["mean_of_sets"]["wer"] if system in overall else only.get(system, {}).get("wer")
        rtfx = (scores.get("rtfx") or {}).get(system) or only.get(system, {}).get("rtfx")
        if wer is not None and rtfx:
            points[system] = (wer, rtfx)
    return points


def data_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List how long the clips of each set are, and what a cut at 30 s would lose, in a sentence."""
    rows = []
    for name, one in data.items():
        cut = one["cut"]
        lost = "loses nothing"
        if cut["clips"]:
            clips = f"{cut['clips']} clip{'s' * (cut['clips'] != 1)}"
            lost = f"cuts {clips}, and loses about {cut['words']:.0f} words ({cut['word_share']:.1%})"
        rows.append({"set": name, **one, "lost": lost})
    return rows


def _verdicts(scores: Mapping[str, Any], system: str) -> Iterator[dict[str, str]]:
    """Yield the paired comparisons in words, those of all sets together first."""
    for comparison in (scores["overall"] or {}).get("comparisons", []):
        yield _verdict("mean of sets", comparison["systems"], comparison["mean_of_sets"], system)
    for name, one in scores["sets"].items():
        for comparison in one.get("comparisons", []):
            yield _verdict(name, comparison["systems"], comparison["all"], system)


def _verdict(name: str, systems: Sequence[str], found: Mapping[str, Any], system: str) -> dict[str, str]:
    is_even = system not in systems or found["verdict"].startswith("no difference")
    is_better = (found["difference"] < 0) == (systems[0] == system)
    return {
        "kind": "even" if is_even else "good" if is_better else "bad",
        "text": f"{name}: {found['verdict']}",
    }


def _expected(scores: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the model's rates beside published ones."""
    for one in scores.get("expected") or []:
        agrees = "agrees with" if one["agrees"] else "does not agree with"
        found = "of no clip" if one["found"] is None else f"{one['found']:.2%}"
        text = f"{one['set']}: {one['rate']} {found} {agrees} the expected {one['low']:.2%} to {one['high']:.2%}"
        yield {"kind": "good" if one["agrees"] else "bad", "text": text}
