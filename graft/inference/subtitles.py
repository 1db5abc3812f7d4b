"""Write a Transcript as txt, srt, vtt, tsv or json.

segments -> cues that fit on a screen, where word times are known -> whole milliseconds, in order, without overlap ->
text
"""

import html
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from textwrap import wrap
from typing import Literal, get_args

from pydantic import Field

from graft.config import Recipe
from graft.inference.transcript import Segment, Transcript, Word

Format = Literal["txt", "srt", "vtt", "tsv", "json"]
# Names of the formats, which are also the suffixes of their files.
FORMATS: tuple[Format, ...] = get_args(Format)

SENTENCE_ENDS = (".", "?", "!", "…")
CLAUSE_ENDS = (",", ";", ":")
CLOSING = "\"')]”’»"


class CueLimits(Recipe):
    """Limits of what a subtitle shows at a time.

    Longer segments are split between words where the words' times are known, and else only into lines.
    """

    line_characters: int = Field(default=42, ge=10)
    """Most characters in a line of a subtitle; a longer word gets a line of its own."""
    lines: int = Field(default=2, ge=1)
    """Most lines that a subtitle shows at a time."""
    duration_s: float = Field(default=7.0, gt=0)
    """Most seconds for which a subtitle is shown."""


@dataclass(frozen=True)
class Cue:
    """Text of a subtitle and the milliseconds from and until which it is shown."""

    start_ms: int
    end_ms: int
    text: str


def format_transcript(transcript: Transcript, form: Format, limits: CueLimits | None = None) -> str:
    """Write a transcript in a format; lines end in a line feed.

    txt is the text; srt and vtt hold cues within the limits; tsv is Whisper's format, with milliseconds and text of
    each segment; json holds all of the transcript. Segments without text appear in json alone. Where channels were
    transcribed separately, all formats but json name the channel that speaks, and txt has a line for each segment.
    """
    match form:
        case "txt":
            spoken = [segment for segment in transcript.segments if segment.text.strip()]
            if all(segment.channel is None for segment in spoken):
                return transcript.text + "\n"
            return "".join(f"{_name_channel(segment, _one_line(segment.text))}\n" for segment in spoken)
        case "srt":
            # Players take a line with an arrow for the times of a cue.
            return "\n".join(
                f"{number}\n{_show_times(cue, ',')}\n{cue.text.replace('-->', '->')}\n"
                for number, cue in enumerate(make_cues(transcript, limits), start=1)
            )
        case "vtt":
            cues = make_cues(transcript, limits)
            blocks = (f"{_show_times(cue, '.')}\n{html.escape(cue.text, quote=False)}\n" for cue in cues)
            return "\n".join(["WEBVTT\n", *blocks])
        case "tsv":
            rows = _to_milliseconds(_whole_segment(segment) for segment in transcript.segments)
            return "".join(["start\tend\ttext\n", *(f"{row.start_ms}\t{row.end_ms}\t{row.text}\n" for row in rows)])
        case "json":
            return json.dumps(transcript.to_dict(), indent=2, ensure_ascii=False) + "\n"


def make_cues(transcript: Transcript, limits: CueLimits | None = None) -> list[Cue]:
    """Cut a transcript into subtitles, in order, without overlap, each of at least one millisecond.

    Line feeds separate the lines of a cue.
    """
    limits = limits or CueLimits()
    cues = _to_milliseconds(part for segment in transcript.segments for part in _split_segment(segment, limits))
    return [Cue(cue.start_ms, cue.end_ms, "\n".join(_break_lines(cue.text, limits))) for cue in cues]


def _name_channel(segment: Segment, text: str) -> str:
    """Put the segment's channel before a text, if it has one."""
    return text if segment.channel is None or not text.strip() else f"channel {segment.channel}: {text}"


def _whole_segment(segment: Segment) -> Word:
    return Word(segment.start_s, segment.end_s, _name_channel(segment, segment.text))


def _split_segment(segment: Segment, limits: CueLimits) -> list[Word]:
    """Split a segment into parts that a cue can show; a segment without words stays whole."""
    words = [Word(word.start_s, word.end_s, text) for word in segment.words if (text := _one_line(word.text))]
    if not words:
        return [_whole_segment(segment)]
    words[0] = replace(words[0], text=_name_channel(segment, words[0].text))
    return [
        Word(
            part[0].start_s,
            min(part[-1].end_s, part[0].start_s + limits.duration_s),
            " ".join(word.text for word in part),
        )
        for part in _split_words(words, limits)
    ]


def _split_words(words: Sequence[Word], limits: CueLimits) -> list[Sequence[Word]]:
    """Split words in two at the best place, again and again, until each part fits the limits."""
    is_short = words[-1].end_s - words[0].start_s <= limits.duration_s
    text = " ".join(word.text for word in words)
    if len(words) == 1 or (is_short and len(_break_lines(text, limits)) <= limits.lines):
        return [words]
    margin = max(1, len(words) // 4)
    cut = max(range(margin, len(words) - margin + 1), key=lambda index: _rate_break(words, index))
    return [*_split_words(words[:cut], limits), *_split_words(words[cut:], limits)]


def _rate_break(words: Sequence[Word], index: int) -> float:
    """Rate a break before a word: higher after a sentence or a clause, at a pause, and in the middle."""
    before = words[index - 1].text.rstrip(CLOSING)
    end = 1.0 if before.endswith(SENTENCE_ENDS) else 0.5 if before.endswith(CLAUSE_ENDS) else 0.0
    pause_s = words[index].start_s - words[index - 1].end_s
    return end + min(max(pause_s, 0.0), 1.0) - abs(2 * index / len(words) - 1)


def _to_milliseconds(parts: Iterable[Word]) -> list[Cue]:
    """Round the times of parts with text to milliseconds.

    Each cue begins after the previous one has begun, and ends before or when the next one begins.
    """
    texts = [(part, text) for part in parts if (text := _one_line(part.text))]
    rounded = (round(part.start_s * 1000) for part, _ in texts)
    starts = list(accumulate(rounded, lambda before, start: max(start, before + 1)))
    nexts = [*starts[1:], sys.maxsize][: len(starts)]
    return [
        Cue(start, min(max(round(part.end_s * 1000), start + 1), following), text)
        for (part, text), start, following in zip(texts, starts, nexts, strict=True)
    ]


def _break_lines(text: str, limits: CueLimits) -> list[str]:
    """Break text at spaces into as few lines as possible, of about equal lengths."""
    fewest = _wrap(text, limits.line_characters)
    narrower = (_wrap(text, width) for width in range(len(text) // len(fewest), limits.line_characters))
    return next((lines for lines in narrower if len(lines) == len(fewest)), fewest)


def _wrap(text: str, width: int) -> list[str]:
    return wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _show_times(cue: Cue, mark: str) -> str:
    """Format a cue's times as HH:MM:SS,mmm --> HH:MM:SS,mmm; hours have more digits from 100 on."""
    clocks = (divmod(milliseconds, 1000) for milliseconds in (cue.start_ms, cue.end_ms))
    return " --> ".join(
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{rest:03}" for seconds, rest in clocks
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
