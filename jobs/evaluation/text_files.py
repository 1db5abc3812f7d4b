"""Read references and hypotheses of anybody's: one function for each format, all of them give predictions.

    *.jsonl, *.json   graft's predictions.jsonl, NeMo's manifests with pred_text, those of the Open ASR Leaderboard; or
                      a JSON list: SegLST, or objects as above
    *.csv, *.tsv      a header line that names the columns
    *.trn             NIST's `words of the clip (id)`
    *.stm, *.ctm      NIST's segments and words, joined to one text for each recording and channel
    any other file    Kaldi's `id words of the clip`

A file that holds one text for each clip holds references or hypotheses: the caller says which.
"""

import csv
import glob
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from graft.errors import DataError
from graft.storage.local_paths import local_path

from .predictions import PredictedWord, Prediction, prediction_of

Role = Literal["reference", "hypothesis"]
"""What the one text of a clip is."""
ColumnName = Literal[
    "id", "reference", "hypothesis", "set", "system", "duration_s", "seconds", "language", "speaker", "sex", "source"
]
COLUMNS: dict[ColumnName | Literal["text"], tuple[str, ...]] = {
    "id": ("id", "ID", "utt_id", "utterance_id", "clip_id", "audio_filepath", "audio", "path", "file", "filename"),
    "reference": ("reference", "ref", "ground_truth", "target", "label"),
    "hypothesis": ("hypothesis", "hyp", "pred_text", "prediction", "predicted", "transcription"),
    "text": ("text", "sentence", "transcript", "normalized_text"),
    "set": ("set", "dataset", "split"),
    "system": ("system", "model"),
    "duration_s": ("duration_s", "duration", "audio_length_s"),
    "seconds": ("seconds", "time", "transcription_time_s"),
    "language": ("language", "lang", "locale"),
    "speaker": ("speaker", "speaker_id", "spk_id", "client_id"),
    "sex": ("sex", "gender"),
    "source": ("source", "corpus"),
}
"""Names of a column, graft's own first, then those of NeMo, Common Voice, LargeScaleASR and the Open ASR Leaderboard.
`text` is what `role` says, or the reference where there is a hypothesis beside it."""
_LEADERBOARD_FILE = re.compile(r"MODEL_(?P<system>.+?)_DATASET_(?P<set_name>.+)")
_TRN_LINE = re.compile(r"(?P<text>.*)\((?P<id>[^()]*)\)\s*")
_ALTERNATIVES = re.compile(r"\{\s*([^{}/]*?)\s*/[^{}]*\}")
_NOT_SCORED = "ignore_time_segment_in_scoring"


def read_texts(location: str, role: Role, columns: Mapping[Any, str] | None = None) -> Iterator[Prediction]:
    """Read a file, the files of a glob or those of a folder; a text that may be either is what `role` says.

    `columns` names columns otherwise than COLUMNS do. Raises DataError for files that cannot be read as their format.
    """
    for path in _files(location):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}): give a text file in UTF-8") from error
        if not text.strip():
            raise DataError(f"{path} is empty: give a file with texts")
        named = _LEADERBOARD_FILE.fullmatch(path.stem)
        for one in _reader(path)(text, str(path), role, columns or {}):
            yield replace(one, **named.groupdict()) if named else one


def _files(location: str) -> list[Path]:
    path = local_path(location)
    if path is None:
        raise DataError(f"{location}: copy the file here and give its path")
    found = Path(path).expanduser()
    if found.is_dir():
        files = sorted(one for one in found.rglob("*.jsonl") if one.is_file())
    else:
        files = [found] if found.is_file() else [Path(one) for one in sorted(glob.glob(str(found)))]
    if not files:
        raise DataError(f"{location}: there is no such file{', nor one of *.jsonl in it' if found.is_dir() else ''}")
    return files


def _reader(path: Path) -> Any:
    suffix = path.suffix.lower()
    known = {".jsonl": _read_json, ".json": _read_json, ".seglst": _read_json, ".csv": _read_csv}
    known |= {".tsv": partial(_read_csv, delimiter="\t"), ".trn": _read_trn, ".stm": _read_stm, ".ctm": _read_ctm}
    return known.get(suffix, _read_kaldi)


# JSON and tables


def _read_json(text: str, name: str, role: Role, columns: Mapping[Any, str]) -> Iterator[Prediction]:
    if text.lstrip().startswith("["):
        try:
            objects = json.loads(text)
        except ValueError as error:
            raise DataError(f"{name} is no JSON ({error}): correct it") from error
        if objects and all(isinstance(one, Mapping) and {"session_id", "words"} <= one.keys() for one in objects):
            yield from _read_seglst(objects, name, role)
            return
        numbered: Iterable[tuple[str, Any]] = ((f"object {number}", one) for number, one in enumerate(objects, start=1))
    else:
        numbered = _parse_lines(text, name)
    for place, values in numbered:
        yield _read_object(values, f"{name}: {place}", role, columns)


def _parse_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{name}: line {number} is no JSON ({error}): correct it") from error


def _read_csv(
    text: str, name: str, role: Role, columns: Mapping[Any, str], delimiter: str | None = None
) -> Iterator[Prediction]:
    delimiter = delimiter or max(",;\t|", key=text.partition("\n")[0].count)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise DataError(f"{name}: line {rows.line_num} has another number of fields than the header line")
            yield _read_object(row, f"{name}: line {rows.line_num}", role, columns)
    except csv.Error as error:
        raise DataError(f"{name}: line {rows.line_num} is no CSV ({error}): correct it") from error


def _read_object(values: Any, place: str, role: Role, columns: Mapping[Any, str]) -> Prediction:
    """Make a prediction of the object of a line, whose keys may have the names of others."""
    if not isinstance(values, Mapping):
        raise DataError(f"{place} is a {type(values).__name__}, wants an object")
    left, own = dict(values), dict[str, Any]()
    for key, usual in COLUMNS.items():
        names = (columns[key],) if key in columns else usual
        if found := next((one for one in names if left.get(one) is not None), None):
            own[key] = left.pop(found)
    if isinstance(own.get("id"), str) and "/" in own["id"] and left.get("offset"):
        own["id"] += f"@{left['offset']}"  # one of the clips of a recording, as in NeMo's manifests
    text = own.pop("text", None)
    if text is not None and role not in columns:
        known: dict[str, Role] = {"hypothesis": "reference", "reference": "hypothesis"}
        own.setdefault(next((known[key] for key in known if key in own), role), text)
    has_text = own.keys() & {"reference", "hypothesis"}
    if not has_text and not left.get("error"):
        raise DataError(
            f"{place} has no text among {', '.join(map(str, values))}: name its column as columns.{role}=NAME"
        )
    if "id" not in own:
        raise DataError(f"{place} has no id among {', '.join(map(str, values))}: name its column as columns.id=NAME")
    try:
        return prediction_of(left | own)
    except (ValueError, TypeError) as error:
        raise DataError(f"{place} is no prediction ({error}): correct it") from error


# Formats of segments and words


def _read_seglst(objects: Sequence[Mapping[str, Any]], name: str, role: Role) -> Iterator[Prediction]:
    """Join the segments of each session by their start times, those of all its speakers."""
    sessions = defaultdict[str, list[tuple[float, str, str]]](list)
    for number, one in enumerate(objects, start=1):
        try:
            start_s, words, speaker = float(one.get("start_time") or 0), one["words"], str(one.get("speaker", ""))
        except (ValueError, TypeError) as error:
            raise DataError(f"{name}: segment {number} has no start_time ({error}): correct it") from error
        if not isinstance(words, str):
            raise DataError(f"{name}: segment {number}: words is {words!r:.40}, wants a text")
        sessions[str(one["session_id"])].append((start_s, words, speaker))
    for session, segments in sessions.items():
        segments.sort(key=lambda segment: segment[0])
        speakers = {speaker for _, _, speaker in segments} - {""}
        only = speakers.pop() if len(speakers) == 1 else None
        text = " ".join(words for _, words, _ in segments)
        yield _of_text(session, role, text, speaker=only)


def _read_trn(text: str, name: str, role: Role, columns: Mapping[Any, str]) -> Iterator[Prediction]:
    """Read NIST's trn, in which `{ a / b }` are alternatives, of which the first counts."""
    for number, line in _lines(text):
        found = _TRN_LINE.fullmatch(line)
        if not found or not found["id"].strip():
            raise DataError(f"{name}: line {number} does not end in an id in parentheses: correct it")
        words = _ALTERNATIVES.sub(lambda one: "" if one[1] == "@" else one[1], found["text"])
        yield _of_text(found["id"].strip(), role, " ".join(words.split()))


def _read_kaldi(text: str, name: str, role: Role, columns: Mapping[Any, str]) -> Iterator[Prediction]:
    for _, line in _lines(text):
        clip_id, _, words = line.strip().partition(" ")
        if "\t" in clip_id:
            clip_id, _, words = line.strip().partition("\t")
        yield _of_text(clip_id, role, words.strip())


def _read_stm(text: str, name: str, role: Role, columns: Mapping[Any, str]) -> Iterator[Prediction]:
    """Read NIST's stm: file, channel, speaker, start, end, <labels>, words."""
    segments = []
    for number, line in _lines(text):
        fields = line.split(maxsplit=5)
        if len(fields) < 5:
            raise DataError(
                f"{name}: line {number} has {len(fields)} fields, wants file channel speaker start end words"
            )
        words = re.sub(r"^<[^>]*>\s*", "", fields[5]) if len(fields) > 5 else ""
        if words.strip().lower() != _NOT_SCORED:
            segments.append(((fields[0], fields[1]), _time(fields[3], name, number), PredictedWord(words.strip())))
    yield from _join(segments, role)


def _read_ctm(text: str, name: str, role: Role, columns: Mapping[Any, str]) -> Iterator[Prediction]:
    """Read NIST's ctm: file, channel, start, duration, word, confidence."""
    segments = []
    for number, line in _lines(text):
        fields = line.split()
        if len(fields) < 5:
            raise DataError(f"{name}: line {number} has {len(fields)} fields, wants file channel start duration word")
        start_s, duration_s = (_time(one, name, number) for one in fields[2:4])
        confidence = _time(fields[5], name, number) if len(fields) > 5 and fields[5] != "NA" else None
        word = PredictedWord(fields[4], start_s, start_s + duration_s, confidence)
        segments.append(((fields[0], fields[1]), start_s, word))
    yield from _join(segments, role, keeps_words=True)


def _join(
    segments: Iterable[tuple[tuple[str, str], float, PredictedWord]], role: Role, *, keeps_words: bool = False
) -> Iterator[Prediction]:
    """Join the segments of each channel by their times; a recording with one channel has its own name as id."""
    channels = defaultdict[tuple[str, str], list[tuple[float, PredictedWord]]](list)
    for key, start_s, word in segments:
        channels[key].append((start_s, word))
    files = [file for file, _ in channels]
    for (file, channel), parts in channels.items():
        words = [word for _, word in sorted(parts, key=lambda part: part[0])]
        clip_id = file if files.count(file) == 1 else f"{file}-{channel}"
        text = " ".join(chain.from_iterable(word.text.split() for word in words))
        yield _of_text(clip_id, role, text, words=tuple(words) if keeps_words else ())


def _of_text(clip_id: str, role: Role, text: str, **known: Any) -> Prediction:
    texts: dict[str, Any] = {role: text}
    return Prediction(clip_id, **texts, **known)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number the lines that are neither empty nor a comment of NIST's."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith(";;"):
            yield number, line.rstrip("\r")


def _time(text: str, name: str, number: int) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DataError(f"{name}: line {number}: {text!r} is no number: correct it") from error
