"""Write the segments of a transcript as txt, srt, vtt or tsv.

segments -> pieces between which lines may break, with their times -> parts that fit on a screen -> whole milliseconds,
in order, without overlap in a channel -> text
"""

import html
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import Literal, get_args

from pydantic import Field

from graft.config import Recipe
from graft.inference.segments import Segment
from graft.text.characters import display_columns, split_words

Format = Literal["txt", "srt", "vtt", "tsv", "json"]
# Names of the formats, which are also the suffixes of their files.
FORMATS: tuple[Format, ...] = get_args(Format)

SENTENCE_ENDS = tuple(".?!…。？！｡।")
CLAUSE_ENDS = tuple(",;:、，；：､")
CLOSING = "\"')]”’»」』）"
TURN_PAUSE_S = 0.5
"""Pause after which the text of one channel goes on behind what another channel says meanwhile."""


class CueLimits(Recipe):
    """Limits of what a subtitle shows at a time.

    Longer segments are split between words, best after sentences and at pauses. Where words have no times, a segment's
    time is shared out by the lengths of its parts. Scripts without spaces are split between characters.
    """

    line_characters: int = Field(default=42, ge=10)
    """Most characters in a line of a subtitle, wide ones (Chinese, Japanese, Korean) counted twice; a longer word gets
    a line of its own."""
    lines: int = Field(default=2, ge=1)
    """Most lines that a subtitle shows at a time."""
    duration_s: float = Field(default=7.0, gt=0)
    """Most seconds for which a subtitle is shown."""
    min_duration_s: float = Field(default=1.0, ge=0)
    """Fewest seconds for which a subtitle is shown, or until the next one begins, where both together would break the
    other limits."""


@dataclass(frozen=True)
class _Piece:
    """Text within which no line breaks, its time, what stands before it in a line, and its width in columns."""

    start_s: float
    end_s: float
    text: str
    gap: str
    columns: int


@dataclass(frozen=True)
class Cue:
    """Text of a subtitle and the milliseconds from and until which it is shown."""

    start_ms: int
    end_ms: int
    text: str


def format_segments(
    segments: Sequence[Segment], form: Literal["txt", "srt", "vtt", "tsv"], limits: CueLimits | None = None
) -> str:
    """Write segments in a format; lines end in a line feed.

    srt and vtt hold cues within the limits; tsv is Whisper's format, with milliseconds and text of each segment; txt
    has a line for each segment. Segments without text are left out. Where channels were transcribed separately, all are
    in order of time and name the channel that speaks, and txt has a line for each part of a segment between which
    another channel speaks.
    """
    match form:
        case "txt":
            return "".join(f"{turn}\n" for turn in _turns(segments))
        case "srt":
            # Players take a line with an arrow for the times of a cue.
            return "\n".join(
                f"{number}\n{_show_times(cue, ',')}\n{cue.text.replace('-->', '->')}\n"
                for number, cue in enumerate(make_cues(segments, limits), start=1)
            )
        case "vtt":
            cues = make_cues(segments, limits)
            blocks = (f"{_show_times(cue, '.')}\n{html.escape(cue.text, quote=False)}\n" for cue in cues)
            return "\n".join(["WEBVTT\n", *blocks])
        case "tsv":
            rows = _tsv_rows(segments)
            return "".join(["start\tend\ttext\n", *(f"{row.start_ms}\t{row.end_ms}\t{row.text}\n" for row in rows)])


def make_cues(segments: Sequence[Segment], limits: CueLimits | None = None) -> list[Cue]:
    """Cut segments into subtitles that begin in order of time, each of at least one millisecond.

    Line feeds separate the lines of a cue. Cues of different channels may overlap; those of one channel do not, and
    each names it.
    """
    limits = limits or CueLimits()
    least_s = min(limits.min_duration_s, limits.duration_s)
    cues = [
        Cue(start_ms, end_ms, "\n".join(_break_lines(_labelled(part, channel), limits)))
        for channel, spoken in _by_channel(segments)
        for part, start_ms, end_ms in _show_in_turn(_split_channel(channel, spoken, limits), least_s)
    ]
    return sorted(cues, key=lambda cue: cue.start_ms)


def _tsv_rows(segments: Sequence[Segment]) -> list[Cue]:
    whole = [
        (channel, [[_Piece(one.start_s, one.end_s, text, "", 0)] for one in spoken if (text := _one_line(one.text))])
        for channel, spoken in _by_channel(segments)
    ]
    rows = [
        Cue(start_ms, end_ms, _text_of(_labelled(part, channel)))
        for channel, parts in whole
        for part, start_ms, end_ms in _show_in_turn(parts)
    ]
    return sorted(rows, key=lambda row: row.start_ms)


def _turns(segments: Sequence[Segment]) -> Iterator[str]:
    """Yield a line for each segment, or for each part of it between which another channel speaks."""
    phrases = [
        (phrase[0].start_s, segment.channel or 0, place, phrase)
        for place, segment in enumerate(segments)
        if segment.text.strip()
        for phrase in _split_phrases(_pieces_of(segment))
    ]
    phrases.sort(key=lambda phrase: phrase[:3])
    for (channel, _), turn in groupby(phrases, key=lambda phrase: phrase[1:3]):
        pieces = [piece for *_, phrase in turn for piece in phrase]
        yield _text_of(_labelled(pieces, channel or None))


def _split_phrases(pieces: Sequence[_Piece]) -> Iterator[Sequence[_Piece]]:
    """Split pieces after sentences and at pauses."""
    start = 0
    for place, (one, other) in enumerate(pairwise(pieces), start=1):
        if one.text.rstrip(CLOSING).endswith(SENTENCE_ENDS) or other.start_s - one.end_s >= TURN_PAUSE_S:
            yield pieces[start:place]
            start = place
    yield pieces[start:]


def _by_channel(segments: Sequence[Segment]) -> Iterator[tuple[int | None, list[Segment]]]:
    """Yield each channel that was transcribed, and its segments."""
    for channel in sorted({segment.channel for segment in segments}, key=lambda channel: channel or 0):
        yield channel, [segment for segment in segments if segment.channel == channel]


def _pieces_of(segment: Segment) -> list[_Piece]:
    """Cut a segment into the pieces between which a line may break, its words, each with its time.

    In a segment without words the time is shared out by the widths of the pieces.
    """
    written = split_words(segment.text)
    if [word.text for word in segment.words] == [text for _, text in written]:
        timed = zip(segment.words, written, strict=True)
        return [
            _Piece(word.start_s, max(word.start_s, word.end_s), text, gap, display_columns(text))
            for word, (gap, text) in timed
        ]
    words = segment.words if any(word.text.strip() for word in segment.words) else (segment,)
    pieces = []
    for word in words:
        cut = [(gap, text, display_columns(text)) for gap, text in split_words(word.text)]
        total, before = sum(columns for *_, columns in cut), 0
        for gap, text, columns in cut:
            start_s, end_s = (
                word.start_s + max(word.end_s - word.start_s, 0.0) * done / total for done in (before, before + columns)
            )
            pieces.append(_Piece(start_s, end_s, text, gap, columns))
            before += columns
    return pieces


def _split_channel(channel: int | None, segments: Sequence[Segment], limits: CueLimits) -> list[Sequence[_Piece]]:
    """Split the segments of a channel into parts that fit a cue; those that are too short are joined where they fit."""

    def fits(pieces: Sequence[_Piece]) -> bool:
        is_short = pieces[-1].end_s - pieces[0].start_s <= limits.duration_s
        return is_short and len(_wrap(_labelled(pieces, channel), limits.line_characters)) <= limits.lines

    parts = [part for segment in segments if (pieces := _pieces_of(segment)) for part in _split(pieces, fits)]
    joined: list[Sequence[_Piece]] = []
    nexts = [*(part[0].start_s for part in parts[1:]), float("inf")]
    for part, next_s in zip(parts, nexts, strict=False):
        start_s = part[0].start_s
        is_short = joined and min(start_s - joined[-1][0].start_s, next_s - start_s) < limits.min_duration_s
        if is_short and fits([*joined[-1], *part]):
            joined[-1] = [*joined[-1], *part]
        else:
            joined.append(part)
    return [_cut_time(part, limits.duration_s) for part in joined]


def _cut_time(part: Sequence[_Piece], duration_s: float) -> Sequence[_Piece]:
    """End a part, which is one piece where it is longer, after the most seconds that it may be shown."""
    return [*part[:-1], replace(part[-1], end_s=min(part[-1].end_s, part[0].start_s + duration_s))]


def _split(pieces: Sequence[_Piece], fits: Callable[[Sequence[_Piece]], bool]) -> list[Sequence[_Piece]]:
    """Split pieces in two at the best place, again and again, until each part fits."""
    if len(pieces) == 1 or fits(pieces):
        return [pieces]
    margin = max(1, len(pieces) // 4)
    cut = max(range(margin, len(pieces) - margin + 1), key=lambda index: _rate_break(pieces, index))
    return [*_split(pieces[:cut], fits), *_split(pieces[cut:], fits)]


def _rate_break(pieces: Sequence[_Piece], index: int) -> float:
    """Rate a break before a piece: higher after a sentence or a clause, at a pause or a space, and in the middle."""
    before = pieces[index - 1].text.rstrip(CLOSING)
    end = 1.0 if before.endswith(SENTENCE_ENDS) else 0.5 if before.endswith(CLAUSE_ENDS) else 0.0
    pause_s = pieces[index].start_s - pieces[index - 1].end_s
    space = 0.5 if pieces[index].gap else 0.0
    return end + space + min(max(pause_s, 0.0), 1.0) - abs(2 * index / len(pieces) - 1)


def _show_in_turn(
    parts: Sequence[Sequence[_Piece]], least_s: float = 0.0
) -> Iterator[tuple[Sequence[_Piece], int, int]]:
    """Yield the parts of one channel with their starts and ends in milliseconds.

    Each begins after the previous one has begun, and ends before or when the next one begins; until then it is shown
    for at least `least_s`.
    """
    rounded = (round(part[0].start_s * 1000) for part in parts)
    starts = list(accumulate(rounded, lambda before, start: max(start, before + 1)))
    nexts = [*starts[1:], sys.maxsize]
    for part, start, following in zip(parts, starts, nexts, strict=False):
        least = max(round(least_s * 1000), 1)
        yield part, start, min(max(round(part[-1].end_s * 1000), start + least), following)


def _labelled(pieces: Sequence[_Piece], channel: int | None) -> Sequence[_Piece]:
    """Put the name of a channel, if there is one, before pieces."""
    if channel is None:
        return pieces
    name, start_s = f"channel {channel}:", pieces[0].start_s
    return [_Piece(start_s, start_s, name, "", len(name)), replace(pieces[0], gap=" "), *pieces[1:]]


def _text_of(pieces: Sequence[_Piece]) -> str:
    return "".join(piece.gap + piece.text for piece in pieces).strip()


def _break_lines(pieces: Sequence[_Piece], limits: CueLimits) -> list[str]:
    """Break pieces into as few lines as possible, of about equal lengths."""
    fewest = _wrap(pieces, limits.line_characters)
    width = sum(len(piece.gap) + piece.columns for piece in pieces)
    narrower = (_wrap(pieces, columns) for columns in range(width // len(fewest), limits.line_characters))
    return next((lines for lines in narrower if len(lines) == len(fewest)), fewest)


def _wrap(pieces: Sequence[_Piece], columns: int) -> list[str]:
    """Fill lines of at most so many columns; a piece that is longer gets a line of its own."""
    lines: list[str] = []
    used = columns
    for piece in pieces:
        used += len(piece.gap) + piece.columns
        if not lines or used > columns:
            lines.append(piece.text)
            used = piece.columns
        else:
            lines[-1] += piece.gap + piece.text
    return lines


def _show_times(cue: Cue, mark: str) -> str:
    """Format a cue's times as HH:MM:SS,mmm --> HH:MM:SS,mmm; hours have more digits from 100 on."""
    clocks = (divmod(milliseconds, 1000) for milliseconds in (cue.start_ms, cue.end_ms))
    return " --> ".join(
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{rest:03}" for seconds, rest in clocks
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
