"""Read and write what systems answered to clips: predictions.jsonl, a JSON object a line.

    {"set": "dev", "system": "graft", "id": "call-1", "reference": "good morning", "hypothesis": "good morning",
     "duration_s": 1.5, "language": "en", "speaker": "anna", "sex": "f", "source": "calls", "seconds": 0.1,
     "words": [{"text": "good", "start_s": 0.1, "end_s": 0.4, "confidence": 0.98}, ...], "flags": [], "error": null}

Only `id` and one of the texts must be there. A clip that failed has an `error` and no hypothesis. Further keys are
kept: scores can be broken down by them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from graft.errors import DataError

KEYS = ("set", "system", "id", "reference", "hypothesis", "duration_s", "language", "speaker", "sex", "source")
LAST_KEYS = ("seconds", "words", "flags", "error")
_TEXTS = (*KEYS[:5], *KEYS[6:], "error")
_NUMBERS = ("duration_s", "seconds")


@dataclass(frozen=True)
class PredictedWord:
    """A word of a hypothesis; its times are seconds from the clip's start, its confidence goes from 0 to 1."""

    text: str
    start_s: float | None = None
    end_s: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Prediction:
    """What a system answered to a clip, and what is known of the clip.

    A line of references alone has no system and no hypothesis, one of answers alone no reference. `set_name` and
    `system` are None where the file does not say them.
    """

    id: str
    set_name: str | None = None
    system: str | None = None
    reference: str | None = None
    hypothesis: str | None = None
    """None where the system gave no answer, as for audio that cannot be read; "" is an answer."""
    duration_s: float | None = None
    language: str | None = None
    speaker: str | None = None
    sex: str | None = None
    source: str | None = None
    """Corpus or recording that the clip comes from."""
    seconds: float | None = None
    """Time that the system took."""
    words: tuple[PredictedWord, ...] = ()
    flags: tuple[str, ...] = ()
    """Faults that the system itself names, such as a loop."""
    error: str | None = None
    """Why there is no hypothesis."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further columns."""

    def to_json(self) -> dict[str, Any]:
        """Return the object of a line, without what is not known."""
        words = [{key: value for key, value in vars(word).items() if value is not None} for word in self.words]
        own = vars(self) | {"set": self.set_name, "words": words, "flags": list(self.flags)}
        line = {key: own[key] for key in (*KEYS, *LAST_KEYS) if own[key] not in (None, [])}
        return line | {key: value for key, value in self.more.items() if key not in line}


def write_predictions(predictions: Iterable[Prediction], file: IO[str]) -> None:
    """Write a line for each prediction."""
    for prediction in predictions:
        file.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")


def read_predictions(lines: Iterable[str], name: str) -> Iterator[Prediction]:
    """Read the lines of predictions.jsonl; `name` is that of the file. Raises DataError for a line that is none."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield prediction_of(json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"{name}: line {number} is no prediction ({error}): correct it") from error


def prediction_of(values: Mapping[str, Any]) -> Prediction:
    """Make a prediction of a line's object. Raises ValueError that says what is wrong with it."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a {type(values).__name__}, wants an object")
    texts: dict[str, Any] = {key: _text(values, key) for key in _TEXTS}
    numbers: dict[str, Any] = {key: _number(values, key) for key in _NUMBERS}
    set_name, clip_id = texts.pop("set"), texts.pop("id")
    if not clip_id:
        raise ValueError("no id")
    return Prediction(
        id=clip_id,
        set_name=set_name,
        **texts,
        **numbers,
        words=tuple(_word(word) for word in values.get("words") or ()),
        flags=tuple(map(str, values.get("flags") or ())),
        more={key: value for key, value in values.items() if key not in (*KEYS, *LAST_KEYS)},
    )


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is None or isinstance(value, str):
        return value
    if key in ("reference", "hypothesis") or isinstance(value, Mapping | list):
        raise ValueError(f"{key} is {value!r:.40}, wants a text")
    return str(value)


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    if value is None or value == "":
        return None
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{key} is {value!r}, wants a number of seconds")
    return number


def _word(values: Any) -> PredictedWord:
    if not isinstance(values, Mapping) or not isinstance(values.get("text"), str):
        raise ValueError(f"{values!r:.40} is no word, wants an object with a text")
    times = {key: _number(values, key) for key in ("start_s", "end_s", "confidence")}
    return PredictedWord(values["text"], **times)
