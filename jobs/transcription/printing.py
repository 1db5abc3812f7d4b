"""Print transcripts to the terminal: texts and subtitles on stdout, all that is not one of them on stderr."""

import sys
from collections.abc import Sequence
from pathlib import Path

from graft.errors import RecipeError
from graft.inference.segments import Segment
from graft.inference.subtitles import CueLimits, Format
from graft.inference.transcript import Transcript

from ..common.console import printable, printable_text


def printed_format(formats: Sequence[Format], recording_count: int) -> Format:
    """Return the one format to print. Raises RecipeError for several, and for several recordings' subtitles."""
    listed = ",".join(formats)
    if len(formats) != 1:
        raise RecipeError(f"formats={listed} needs out=, the folder for the files: without it one format is printed")
    if formats[0] != "txt" and recording_count > 1:
        raise RecipeError(f"formats={listed} prints one recording, not {recording_count}: give out= for more")
    return formats[0]


class TranscriptPrinter:
    """Print recordings one after the other, with their names where there are several.

    Plain text is printed by segments as they come (`show`), unless channels are told apart. Other formats are printed
    when a recording is done.
    """

    def __init__(self, form: Format, cues: CueLimits, *, recording_count: int, splits_channels: bool) -> None:
        self._form, self._cues = form, cues
        self._has_names = recording_count > 1
        self._splits_channels = splits_channels
        self._name = ""
        self._is_open = False
        """Whether the line of the recording has begun."""

    def begin(self, name: str) -> None:
        """Begin the recording whose segments come next."""
        here = Path.cwd()
        name = name.removeprefix(f"{here}/").removeprefix(f"{here.as_uri()}/")
        self._name, self._is_open = printable(name), False

    def show(self, segment: Segment) -> None:
        """Print a segment's text, where plain text is printed by segments."""
        if self._form == "txt" and not self._splits_channels and (text := _shown(segment.text.strip())):
            print(f" {text}" if self._is_open else f"{self._label(' ')}{text}", end="", flush=True)
            self._is_open = True

    def end(self, transcript: Transcript, error: str | None) -> None:
        """End the recording: print what `show` has not printed, or why it has failed."""
        if self._is_open:
            print(flush=True)
        if error:
            print(f"graft: {self._name}: {printable(error)}", file=sys.stderr)
        elif not self._is_open:
            text = _shown(transcript.to_string(self._form, self._cues))
            label = self._label("\n" if self._splits_channels else " ")
            print(f"{label}{text}", end="", flush=True)
            if not transcript.text:
                print(f"graft: {self._name}: nobody speaks in it", file=sys.stderr)

    def _label(self, separator: str) -> str:
        return f"{self._name}:{separator}" if self._has_names else ""


def _shown(text: str) -> str:
    """Return what is printed of a text: a terminal gets no control characters, a file or a pipe all that is written."""
    return printable_text(text) if sys.stdout.isatty() else text
