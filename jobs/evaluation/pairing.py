"""Put the answers of systems beside the references of their clips.

    predictions in any order -> test sets: clips with a reference, and what each system answered to each of them

What does not fit is handled so, and counted:

    an answer to no clip of the references    is not scored (unknown)
    a clip that a system gave no answer to    has all its words deleted (missing)
    a clip that a system failed on            has all its words deleted, and its error is kept (failed)
    a reference that is given twice           counts once; two that differ are an error
    an answer that is given twice             the last one counts; one without an error counts more (doubled)
    a system without any answer in a set      is not scored there
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from graft.errors import DataError

from .predictions import Prediction

UNNAMED = "all"
"""Name of the set of clips that name none."""
Answers = Mapping[str, Prediction]
"""What systems answered to a clip, by the names of the systems."""


@dataclass(frozen=True)
class Clip:
    """A clip with its reference, and the systems' answers to it."""

    known: Prediction
    """The reference, and what is known of the clip."""
    answers: Answers

    @property
    def reference(self) -> str:
        return self.known.reference or ""

    def text_of(self, system: str) -> str | None:
        """Return a system's hypothesis; None where it is missing or the system failed."""
        answer = self.answers.get(system)
        return answer.hypothesis if answer else None


@dataclass(frozen=True)
class TestSet:
    """The clips of a set in the order of the references, and the systems that answered to at least one of them."""

    name: str
    clips: Sequence[Clip]
    systems: Sequence[str]


@dataclass
class Misfits:
    """What was given and is not scored, by system."""

    unknown: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Ids of answers without a reference."""
    doubled: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Ids of clips with several answers that differ."""

    def to_json(self) -> dict[str, dict[str, list[str]]]:
        return {"unknown": dict(self.unknown), "doubled": dict(self.doubled)}


def pair(predictions: Iterable[Prediction], *, own_references: bool = True) -> tuple[list[TestSet], Misfits]:
    """Pair answers with references.

    A prediction without a system is a reference alone. With own_references=False the references of answers do not
    count, only those. An answer that names no set belongs to the set of the clip with its id. Ids that are paths fit by
    the names of their files where no id of a system fits as it is. Raises DataError for references of a clip that
    differ, for an id that is in several sets, and where there is no reference or no answer to any.
    """
    lines = list(predictions)
    references = _references(line for line in lines if own_references or line.system is None)
    misfits = Misfits()
    places = _Places(references)
    answers: dict[tuple[str, str], dict[str, Prediction]] = {place: {} for place in references}
    by_system = defaultdict[str, list[Prediction]](list)
    for line in lines:
        if line.system is not None:
            by_system[line.system].append(line)
    for system, given in by_system.items():
        for place, answer in places.fit(system, given, misfits):
            _add(answers[place], system, answer, misfits)
    if not any(answers.values()):
        raise DataError(_nothing_fits(references, by_system))
    sets = defaultdict[str, list[Clip]](list)
    for place, known in references.items():
        found = answers[place]
        sets[place[0]].append(Clip(_complete(known, found), found))
    return [
        TestSet(
            name or UNNAMED, clips, [system for system in by_system if any(system in clip.answers for clip in clips)]
        )
        for name, clips in sets.items()
    ], misfits


def _references(lines: Iterable[Prediction]) -> dict[tuple[str, str], Prediction]:
    references: dict[tuple[str, str], Prediction] = {}
    for line in lines:
        if line.reference is not None:
            place = line.set_name or "", line.id
            first = references.setdefault(place, line)
            if (first.reference or "").split() != line.reference.split():
                shown = f" of set {place[0]}" if place[0] else ""
                raise DataError(
                    f"clip {line.id}{shown} has two references, {first.reference!r:.60} and {line.reference!r:.60}: "
                    "give each clip an id of its own, or name its set"
                )
    if not references:
        raise DataError("none of the files holds a reference: give refs=FILE, or the references as the first file")
    return references


class _Places:
    """Find the clips of the references that answers belong to."""

    def __init__(self, references: Mapping[tuple[str, str], Prediction]) -> None:
        self.places = references.keys()
        self.by_id = defaultdict[str, list[tuple[str, str]]](list)
        self.by_name = defaultdict[str, list[tuple[str, str]]](list)
        for place in references:
            self.by_id[place[1]].append(place)
            self.by_name[_file_name(place[1])].append(place)

    def fit(
        self, system: str, given: Sequence[Prediction], misfits: Misfits
    ) -> Iterable[tuple[tuple[str, str], Prediction]]:
        is_exact = any(line.id in self.by_id for line in given)
        for line in given:
            found = self.by_id.get(line.id, []) if is_exact else self.by_name.get(_file_name(line.id), [])
            if line.set_name and any(place[0] for place in self.places):
                found = [place for place in found if place[0] == line.set_name]
            if len(found) > 1:
                names = ", ".join(repr(name) for name, _ in found[:3])
                raise DataError(
                    f"{system}: the id {line.id} is that of clips in several places ({names}): name the set of each "
                    "answer in a column `set`"
                )
            if found:
                yield found[0], line
            else:
                misfits.unknown[system].append(line.id)


def _add(answers: dict[str, Prediction], system: str, answer: Prediction, misfits: Misfits) -> None:
    """Take an answer, or the better one of two."""
    earlier = answers.get(system)
    if earlier is not None and earlier.hypothesis != answer.hypothesis:
        misfits.doubled[system].append(answer.id)
    if earlier is None or answer.hypothesis is not None or earlier.hypothesis is None:
        answers[system] = answer


def _complete(known: Prediction, answers: Answers) -> Prediction:
    """Add what only the answers tell of a clip."""
    missing: dict[str, Any] = {}
    for key in ("duration_s", "language", "speaker", "sex", "source"):
        if getattr(known, key) is None:
            missing[key] = next((value for one in answers.values() if (value := getattr(one, key)) is not None), None)
    more = {key: value for one in answers.values() for key, value in one.more.items()}
    return replace(known, **missing, more=more | dict(known.more))


def _file_name(clip_id: str) -> str:
    """Return the name of an id's file without folders and extension: wav/a.flac@1.5 -> a@1.5."""
    name, at, offset = PurePath(clip_id).name.partition("@")
    stem, dot, extension = name.rpartition(".")
    is_extension = dot and 2 <= len(extension) <= 4 and not extension.isdigit()
    return f"{stem if is_extension else name}{at}{offset}"


def _nothing_fits(
    references: Mapping[tuple[str, str], Prediction], by_system: Mapping[str, Sequence[Prediction]]
) -> str:
    if not by_system:
        return "there are references, but no hypotheses: give hyps=FILE, or the hypotheses as the second file"
    (_, reference_id), (system, given) = next(iter(references)), next(iter(by_system.items()))
    sets = Counter(line.set_name for line in given if line.set_name)
    named = f" of set {sets.most_common(1)[0][0]}" if sets else ""
    return (
        f"no id of a hypothesis is that of a reference: {system} has {given[0].id!r}{named}, the references have "
        f"{reference_id!r}: give both the same ids"
    )
