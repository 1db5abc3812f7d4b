"""Lay scores out for people: a table of rates, then what was compared, left out and set aside, in sentences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.text.wer import NORMALIZERS_IN_WORDS

from .honesty import honesty_lines

MOST_GROUPS = 12
"""A column with more groups is in scores.json alone."""
PIPELINES = {
    "speech": "speech (detected and cut into chunks, as graft transcribe does)",
    "windows": "windows (all of each clip, without the speech detector)",
}
FEW_UNITS = 10
"""An interval over fewer clips or speakers is rough."""
MOST_NAMED = 3


def report_table(report: Mapping[str, Any]) -> str:
    """Lay a report out for people: its scores, the verdicts on expected rates, the pipeline and the speed."""
    lines = [score_table(report), *honesty_lines(report.get("honesty", {"checks": []}))]
    if vision := report.get("vision"):
        lines.append(f"vision: {vision['verdict']}")
    for v in report["expected"]:
        verdict = "agrees with" if v["agrees"] else "does not agree with"
        found = "of no clip" if v["found"] is None else f"{v['found']:.2%}"
        lines.append(f"{v['set']}: {v['rate']} {found} {verdict} the expected {v['low']:.2%} to {v['high']:.2%}")
    lines.append(f"pipeline: {PIPELINES[report['pipeline']]}")
    speeds = ", ".join(f"{kind} {rtfx:.1f}" for kind, rtfx in report["rtfx"].items())
    return "\n".join([*lines, f"seconds of audio per second: {speeds}"])


def score_table(scores: Mapping[str, Any]) -> str:
    """Lay scores out: the rates of each set and system, then sentences about them."""
    sets = scores["sets"]
    lines = [*rate_rows(scores), *silent_rows(sets)]
    for name, one in sets.items():
        lines += notes(name, one, scores["settings"])
    for comparison in (scores["overall"] or {}).get("comparisons", []):
        lines.append(f"mean of sets: {comparison['mean_of_sets']['verdict']}")
    for system, found in (scores["overall"] or {"systems": {}})["systems"].items():
        if found["rtfx"] is not None:
            lines.append(f"all sets: {system} transcribes {found['rtfx']:.1f} seconds of audio per second")
    lines += _misfits(scores["misfits"])
    for name, one in sets.items():
        for column, groups in one.get("breakdowns", {}).items():
            lines += _breakdown(name, column, groups)
    return "\n".join(lines)


def rate_rows(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield a heading and a row for each set with speech and each system, then rows of all sets."""
    rows = [(name, system, one) for name, system, one in _systems(scores["sets"]) if "wer" in one]
    if not rows:
        return
    names, systems = (max([least, *(len(row[at]) for row in rows)]) for at, least in ((0, 12), (1, 8)))
    counts = f"{'sub':>5} {'del':>5} {'ins':>5}  {'exact':>6}"
    headings = f"{'clips':>6} {'words':>7}  {'WER':>6}  {'95 % interval':<16} {'CER':>6}  {'raw WER':>7}  {counts}"
    yield f"{'set':<{names}} {'model':<{systems}} {headings}"
    for name, system, one in rows:
        counts = f"{one['substitutions']:>5} {one['deletions']:>5} {one['insertions']:>5}"
        sizes = f"{one['clips']:>6} {one['words']:>7}"
        exact = f"{one['exact'] / one['clips']:>6.1%}"
        yield f"{name:<{names}} {system:<{systems}} {sizes}  {_rates(one)}  {counts}  {exact}"
    for basis, title in (("pooled", "all clips"), ("mean_of_sets", "mean of sets")):
        for system, found in (scores["overall"] or {"systems": {}})["systems"].items():
            yield f"{title:<{names}} {system:<{systems}} {'':>6} {'':>7}  {_rates(found[basis])}"


def silent_rows(sets: Mapping[str, Any]) -> Iterator[str]:
    """Yield a heading and a row for each set without speech and each system."""
    rows = [(name, system, one) for name, system, one in _systems(sets) if "chars_per_minute" in one]
    if not rows:
        return
    names, systems = (max([least, *(len(row[at]) for row in rows)]) for at, least in ((0, 12), (1, 8)))
    yield f"{'no speech':<{names}} {'model':<{systems}} {'clips':>6} {'min':>6}  {'chars/min':>9}  {'with text':>9}"
    for name, system, one in rows:
        rate = f"{one['chars_per_minute']:>9.1f}" if one["chars_per_minute"] is not None else f"{'unknown':>9}"
        written = f"{rate}  {one['share_with_text']:>9.1%}"
        yield f"{name:<{names}} {system:<{systems}} {one['clips']:>6} {one['minutes']:>6.1f}  {written}"


def notes(name: str, one: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences about a set: normaliser and intervals, comparisons, clips without an answer, label noise."""
    if "normalizer" in one:
        yield f"{name}: {_method(one, settings)}"
    if one.get("empty_references"):
        yield f"{name}: {one['empty_references']} clips have no words in the reference: each word there is an insertion"
    if one["left_out"]:
        yield f"{name}: {len(one['left_out'])} clips without reference words are left out ({_named(one['left_out'])})"
    for comparison in one.get("comparisons", []):
        yield f"{name}: {comparison['all']['verdict']}"
        if comparison["both"] is None:
            yield f"{name}: no clip was answered by both"
        elif comparison["both"]["clips"] < comparison["all"]["clips"]:
            yield f"{name}, the {comparison['both']['clips']} clips that both answered: {comparison['both']['verdict']}"
    for system, found in one["systems"].items():
        for kind, ids in (("has no answer to", found["missing"]), ("failed on", found["failed"])):
            if ids:
                yield f"{name}: {system} {kind} {len(ids)} clips ({_named(list(ids))}): all their words are deletions"
        if found["flags"]:
            counts = ", ".join(f"{count} {flag}" for flag, count in found["flags"].items())
            yield f"{name}: {system} itself flags answers: {counts}"
        if found["rtfx"] is not None:
            yield f"{name}: {system} transcribes {found['rtfx']:.1f} seconds of audio per second"
    if (noise := one.get("label_noise")) and noise["set_aside"]:
        rates = ", ".join(
            f"{system} {rates['wer_kept']:.1%} instead of {rates['wer']:.1%}"
            for system, rates in noise["systems"].items()
        )
        count = len(noise["set_aside"])
        yield f"{name}: systems agree against the label of {count} clips; without those the WER is {rates}"


def _method(one: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    normalizer = one["normalizer"]
    version = settings["packages"].get("whisper-normalizer")
    title = NORMALIZERS_IN_WORDS.get(normalizer, normalizer)
    package = f" (whisper-normalizer {version})" if normalizer in NORMALIZERS_IN_WORDS and version else ""
    units = f"{one['units']} {one['unit']}s"
    rough = ", which are few: they are rough" if one["units"] < FEW_UNITS else ""
    return f"rates after {title}{package}; intervals over {units}{rough}"


def _misfits(misfits: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[str]:
    for system, ids in misfits["unknown"].items():
        yield f"{system} has answers to {len(ids)} ids that no reference has ({_named(ids)}): they are not scored"
    for system, ids in misfits["doubled"].items():
        yield f"{system} has several answers to {len(ids)} clips ({_named(ids)}): the last one counts"


def _breakdown(name: str, column: str, groups: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the groups of a column."""
    if len(groups) < 2:
        return
    if len(groups) > MOST_GROUPS:
        yield f"{name} by {column}: {len(groups)} groups, which scores.json lists (out=FOLDER)"
        return
    systems = list(next(iter(groups.values()))["systems"])
    title = f"{name} by {column}"
    width = max(len(title), *map(len, groups))
    columns = [max(24, len(system)) for system in systems]
    heads = "  ".join(f"{system:<{size}}" for system, size in zip(systems, columns, strict=True))
    yield f"\n{title:<{width}} {'clips':>6} {'words':>7}  {heads}".rstrip()
    for group, found in groups.items():
        rates = [f"{rates['wer']:.1%} {_interval(rates)}" for rates in found["systems"].values()]
        cells = [f"{rate:<{size}}" for rate, size in zip(rates, columns, strict=True)]
        yield f"{group:<{width}} {found['clips']:>6} {found['words']:>7}  {'  '.join(cells)}".rstrip()


def _rates(one: Mapping[str, float]) -> str:
    return f"{one['wer']:>6.1%}  {_interval(one):<16} {one['cer']:>6.1%}  {one['wer_raw']:>7.1%}"


def _interval(one: Mapping[str, float]) -> str:
    return f"[{one['wer_low']:.1%}, {one['wer_high']:.1%}]"


def _systems(sets: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, one in sets.items():
        yield from ((name, system, found) for system, found in one["systems"].items())


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else ""
    return f"{', '.join(ids[:MOST_NAMED])}{more}"
