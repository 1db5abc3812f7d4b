"""List the clips of an evaluation with the differences of each answer from the reference, word by word.

counted sets -> a row for each clip -> the clips that the page lists, those with audio, those of the label audit

The words are those that are scored, after the normaliser.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graft.errors import require
from graft.text.wer import errors_of, references_of

from ..pairing import Clip
from ..predictions import Prediction
from ..samples import CountedSet

Part = tuple[str, str, str]
"""A part of a word difference: "=", "~" (substituted), "-" (deleted) or "+" (inserted), reference words, own words."""
SIGNS = {"equal": "=", "substitute": "~", "delete": "-", "insert": "+"}


@dataclass(frozen=True)
class Answer:
    """What a system answered to a clip, and how far it is from the reference."""

    text: str | None
    """None where the system failed or gave no answer."""
    errors: int
    difference: Sequence[Part]
    confidence: float | None
    """Mean probability of the tokens, as the geometric mean, or of the words; None where it is not known."""
    flags: Sequence[str] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        confidence = None if self.confidence is None else round(self.confidence, 4)
        found = vars(self) | {"confidence": confidence, "flags": list(self.flags)}
        return {key: value for key, value in found.items() if value not in (None, [])} | {"text": self.text}


@dataclass(frozen=True)
class ClipRow:
    """A clip with the answers of all systems."""

    set_name: str
    known: Prediction
    words: int
    """Words of the normalised reference."""
    answers: dict[str, Answer]
    agreeing: int
    """Number of systems that agree with each other against the reference; 0 where fewer than two do."""

    @property
    def key(self) -> tuple[str, str]:
        return self.set_name, self.known.id

    def to_json(self) -> dict[str, Any]:
        known = {key: getattr(self.known, key) for key in ("id", "duration_s", "speaker", "source", "sex", "language")}
        found = {key: value for key, value in known.items() if value not in (None, "")}
        answers = {name: one.to_json() for name, one in self.answers.items()}
        return found | {
            "set": self.set_name,
            "reference": self.known.reference or "",
            "words": self.words,
            "agreeing": self.agreeing,
            "answers": answers,
        }


def clip_rows(sets: Sequence[CountedSet]) -> list[ClipRow]:
    """List the clips of all sets in their order. Raises MissingExtra."""
    return [row for one in sets for row in _rows(one)]


def most_errors_first(rows: Sequence[ClipRow]) -> list[ClipRow]:
    """Sort clips by the errors of all systems, then by those of the first one."""
    return sorted(rows, key=lambda row: -sum(answer.errors for answer in row.answers.values()))


def telling(rows: Sequence[ClipRow], system: str, count: int) -> list[ClipRow]:
    """Choose the clips whose audio is kept.

    They are, in turn, those on which the system makes the most errors, those on which the systems differ most, and
    those of the label audit.
    """
    orders = [
        _ranked(rows, lambda row: row.answers[system].errors if system in row.answers else 0),
        _ranked(rows, _gap),
        audited(rows, system),
    ]
    in_turn = (row for place in itertools.zip_longest(*orders) for row in place if row is not None)
    chosen = dict.fromkeys(row.key for row in in_turn) | dict.fromkeys(row.key for row in rows)
    by_key = {row.key: row for row in rows}
    return [by_key[key] for key in itertools.islice(chosen, count)]


def audited(rows: Sequence[ClipRow], system: str) -> list[ClipRow]:
    """Rank the clips on which a system disagrees with the label and is sure, or systems agree against the label."""

    def doubt(row: ClipRow) -> float:
        answer = row.answers.get(system)
        if answer is None or not answer.errors or not (answer.text or "").strip():
            return 0.0
        return 2.0 * row.agreeing / len(row.answers) + (answer.confidence or 0.0)

    return _ranked(rows, doubt)


def _ranked(rows: Sequence[ClipRow], value: Callable[[ClipRow], float]) -> list[ClipRow]:
    """Return the rows with a value above 0, the greatest first."""
    return sorted((row for row in rows if value(row) > 0), key=lambda row: -value(row))


def _gap(row: ClipRow) -> int:
    errors = [answer.errors for answer in row.answers.values()]
    return max(errors) - min(errors) if errors else 0


def _rows(one: CountedSet) -> Iterator[ClipRow]:
    words = references_of(one.counts[one.systems[0]]["wer"]).tolist() if one.systems else []
    errors = {system: errors_of(one.counts[system]["wer"]).tolist() for system in one.systems}
    for place, clip in enumerate(one.test_set.clips if one.systems else ()):
        reference = one.references[place]
        texts = {system: one.texts[system][place] for system in one.systems}
        answers = {
            system: _answer(clip, system, errors[system][place], word_difference(reference, text))
            for system, text in texts.items()
        }
        yield ClipRow(one.name, clip.known, words[place], answers, _agreeing(reference, list(texts.values())))


def _answer(clip: Clip, system: str, errors: int, difference: Sequence[Part]) -> Answer:
    given = clip.answers.get(system)
    if given is None:
        return Answer(None, errors, difference, None, error="no answer")
    return Answer(given.hypothesis, errors, difference, _confidence(given), given.flags, given.error)


def _confidence(answer: Prediction) -> float | None:
    mean_logprob = answer.more.get("mean_logprob")
    if isinstance(mean_logprob, int | float) and not isinstance(mean_logprob, bool) and mean_logprob <= 0:
        return math.exp(mean_logprob)
    found = [word.confidence for word in answer.words if word.confidence is not None]
    return sum(found) / len(found) if found else None


def _agreeing(reference: str, texts: Sequence[str]) -> int:
    text, count = Counter(texts).most_common(1)[0]
    return count if count > 1 and text.strip() and text.split() != reference.split() else 0


def word_difference(reference: str, text: str) -> list[Part]:
    """Align two normalised texts by words, as they are scored (jiwer). Raises MissingExtra."""
    words, own = reference.split(), text.split()
    aligned = require("jiwer", extra="score").process_words(" ".join(words), " ".join(own)).alignments
    return [
        (
            SIGNS[chunk.type],
            " ".join(words[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(own[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in (aligned[0] if aligned else ())
    ]
