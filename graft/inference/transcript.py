"""Define a Transcript, the text of a recording with its segments, which writes itself in the formats of FORMATS."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.audio.defects import AudioDefect, merge_defects
from graft.errors import OutputError
from graft.inference.segments import Segment
from graft.inference.subtitles import FORMATS, CueLimits, Format, format_segments
from graft.storage.atomic import write_atomic


@dataclass(frozen=True)
class Transcript:
    """The text of a whole recording, its segments in order, its duration in seconds and the name of the model.

    `aligner` names the source of the words' times; it is None if words have no times. `defects` say what is wrong with
    the recording, and when. `language` (ISO 639-1) is the one that was named, or that a Whisper found out; None where
    it is not known.
    """

    text: str
    duration_s: float
    segments: tuple[Segment, ...]
    model: str
    aligner: str | None = None
    defects: tuple[AudioDefect, ...] = ()
    language: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the keys are always the same."""
        return asdict(self)

    def to_string(self, form: Format, cues: CueLimits | None = None) -> str:
        """Write the transcript in a format; lines end in a line feed.

        txt is the text; srt and vtt hold cues within the limits of `cues`; tsv is Whisper's format, with milliseconds
        and text of each segment; json holds all of the transcript. Segments without text appear in json alone. Where
        channels were transcribed separately, all formats but json are in order of time and name the channel that
        speaks, and txt has a line for each segment, or for each part of it between which another channel speaks. Raises
        ValueError for another format.
        """
        match form:
            case "json":
                return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
            case "txt" if all(segment.channel is None for segment in self.segments):
                return self.text + "\n"
            case "txt" | "srt" | "vtt" | "tsv":
                return format_segments(self.segments, form, cues)
            case _:
                raise ValueError(f"format is {form!r}, not one of {', '.join(FORMATS)}")

    def save(self, path: str | os.PathLike[str], cues: CueLimits | None = None) -> None:
        """Write the transcript, as `to_string` does, to a file whose suffix names the format: .txt, .srt and so on.

        Missing folders are made. Raises OutputError for another suffix and for a file that cannot be written.
        """
        suffix = Path(path).suffix.lower()
        form = next((form for form in FORMATS if suffix == f".{form}"), None)
        if form is None:
            raise OutputError(f"{path} has the suffix of no format: give one of .{', .'.join(FORMATS)}")
        try:
            write_atomic(path, self.to_string(form, cues))
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}: choose another path") from error


def stitch(
    segments: Iterable[Segment],
    *,
    duration_s: float,
    model: str,
    aligner: str | None = None,
    defects: Iterable[AudioDefect] = (),
    language: str | None = None,
) -> Transcript:
    """Make a transcript of one recording's segments: order them by time and join their texts with single spaces."""
    ordered = tuple(sorted(segments, key=lambda segment: (segment.start_s, segment.channel or 0)))
    text = " ".join(part for segment in ordered if (part := segment.text.strip()))
    return Transcript(text, duration_s, ordered, model, aligner, merge_defects(defects), language)
