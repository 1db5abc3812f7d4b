"""A Transcript as people and players read it: txt, srt, vtt, tsv or json.

segments -> cues that fit on a screen, where word times are known -> whole milliseconds, in order and apart -> the format's text
"""

import html
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Literal, get_args

from pydantic import Field

from graft.config import Recipe
from graft.inference.transcript import Segment, Transcript, Word

Format = Literal["txt", "srt", "vtt", "tsv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""Also the suffixes of files that hold them."""

SENTENCE_ENDS = (".", "?", "!", "…")
CLAUSE_ENDS = (",", ";", ":")
CLOSING = "\"')]”’»"


class CueLimits(Recipe):
    """How much a subtitle shows at a time. Longer segments are split between words if their times are known, else only into lines."""

    line_characters: int = Field(default=42, ge=10)
    """Characters in a line; a longer word has a line of its own."""
    lines: int = Field(default=2, ge=1)
    """Lines shown at a time."""
    duration_s: float = Field(default=7.0, gt=0)
    """Seconds for which they are shown."""


@dataclass(frozen=True)
class Cue:
    """Text that is shown from one millisecond to another."""

    start_ms: int
    end_ms: int
    text: str


def format_transcript(transcript: Transcript, form: Format, limits: CueLimits | None = None) -> str:
    """Write a transcript in a format, lines ending in a line feed.

    txt is its text; srt and vtt hold cues within the limits; tsv is Whisper's, with milliseconds and text of each segment; json is
    all that a transcript holds. Segments without text are in json alone. Where channels are apart, all but json say which one speaks, and
    txt has a line for each segment.
    """
    match form:
        case "txt":
            return _plain(transcript)
        case "srt":
            return "\n".join(_srt_block(number, cue) for number, cue in enumerate(cues_of(transcript, limits), start=1))
        case "vtt":
            return "\n".join(["WEBVTT\n", *map(_vtt_block, cues_of(transcript, limits))])
        case "tsv":
            rows = _timed(
                Word(segment.start_s, segment.end_s, _labelled(segment, segment.text))
                for segment in transcript.segments
            )
            return "".join(["start\tend\ttext\n", *(f"{row.start_ms}\t{row.end_ms}\t{row.text}\n" for row in rows)])
        case "json":
            return json.dumps(transcript.to_dict(), indent=2, ensure_ascii=False) + "\n"


def cues_of(transcript: Transcript, limits: CueLimits | None = None) -> list[Cue]:
    """Cut a transcript into subtitles: in order, none overlapping, each of at least a millisecond, their lines parted by line feeds."""
    limits = limits or CueLimits()
    cues = _timed(piece for segment in transcript.segments for piece in _pieces(segment, limits))
    return [Cue(cue.start_ms, cue.end_ms, "\n".join(_lines(cue.text, limits))) for cue in cues]


def _plain(transcript: Transcript) -> str:
    spoken = [segment for segment in transcript.segments if segment.text.strip()]
    if all(segment.channel is None for segment in spoken):
        return transcript.text + "\n"
    return "".join(f"{_labelled(segment, _one_line(segment.text))}\n" for segment in spoken)


def _labelled(segment: Segment, text: str) -> str:
    return text if segment.channel is None or not text.strip() else f"channel {segment.channel}: {text}"


def _pieces(segment: Segment, limits: CueLimits) -> list[Word]:
    """The segment's words, joined to as much as a cue shows; the segment as a whole where it has none."""
    words = [Word(word.start_s, word.end_s, text) for word in segment.words if (text := _one_line(word.text))]
    if not words:
        return [Word(segment.start_s, segment.end_s, _labelled(segment, segment.text))]
    words[0] = replace(words[0], text=_labelled(segment, words[0].text))
    parts = _parts(words, limits)
    return [
        Word(part[0].start_s, min(part[-1].end_s, part[0].start_s + limits.duration_s), _joined(part)) for part in parts
    ]


def _parts(words: Sequence[Word], limits: CueLimits) -> list[Sequence[Word]]:
    """Halve words where it is best until each part fits."""
    fits = (
        words[-1].end_s - words[0].start_s <= limits.duration_s and len(_lines(_joined(words), limits)) <= limits.lines
    )
    if fits or len(words) == 1:
        return [words]
    margin = max(1, len(words) // 4)
    cut = max(range(margin, len(words) - margin + 1), key=lambda place: _goodness(words, place))
    return [*_parts(words[:cut], limits), *_parts(words[cut:], limits)]


def _goodness(words: Sequence[Word], place: int) -> float:
    """How good it is to break before a word: best after a sentence, at a pause, in the middle."""
    before = words[place - 1].text.rstrip(CLOSING)
    end = 1.0 if before.endswith(SENTENCE_ENDS) else 0.5 if before.endswith(CLAUSE_ENDS) else 0.0
    pause_s = words[place].start_s - words[place - 1].end_s
    return end + min(max(pause_s, 0.0), 1.0) - abs(2 * place / len(words) - 1)


def _timed(pieces: Iterable[Word]) -> list[Cue]:
    """Pieces with text, in whole milliseconds: each begins after the one before has begun, and ends by the time the next begins."""
    texts = [(piece, text) for piece in pieces if (text := _one_line(piece.text))]
    starts: list[int] = []
    for piece, _ in texts:
        starts.append(max(round(piece.start_s * 1000), starts[-1] + 1 if starts else 0))
    nexts = [*starts[1:], sys.maxsize][: len(starts)]
    return [
        Cue(start, min(max(round(piece.end_s * 1000), start + 1), following), text)
        for (piece, text), start, following in zip(texts, starts, nexts, strict=True)
    ]


def _lines(text: str, limits: CueLimits) -> list[str]:
    """Break text at spaces into as few lines as it takes, all about equally long."""
    fewest = _wrapped(text, limits.line_characters)
    narrower = (_wrapped(text, width) for width in range(len(text) // len(fewest), limits.line_characters))
    return next((lines for lines in narrower if len(lines) == len(fewest)), fewest)


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _srt_block(number: int, cue: Cue) -> str:
    text = cue.text.replace("-->", "->")  # players take a line with an arrow for the times of the next
    return f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n{text}\n"


def _vtt_block(cue: Cue) -> str:
    return f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{html.escape(cue.text, quote=False)}\n"


def _clock(milliseconds: int, mark: str) -> str:
    """HH:MM:SS,mmm, with more digits from 100 hours on."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{rest:03}"


def _joined(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


def _one_line(text: str) -> str:
    return " ".join(text.split())
