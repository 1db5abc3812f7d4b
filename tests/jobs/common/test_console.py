"""Lines that workers add to a file are printed as they come, and nothing that is printed controls the terminal."""

import sys
import time
from pathlib import Path

import pytest

from graft.inference.segments import Segment
from graft.inference.subtitles import CueLimits
from graft.inference.transcript import stitch
from jobs.common.console import follow, printable, printable_text
from jobs.transcription.printing import TranscriptPrinter

POLL_S = 0.05


def test_a_line_that_is_cut_within_a_character_is_printed_once_it_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.common.console.POLL_S", POLL_S)
    log = tmp_path / "log.txt"
    log.write_text("old\n")
    whole = "größer\n".encode()
    with follow(log), log.open("ab", buffering=0) as file:
        file.write(b"first\n" + whole[:3])
        time.sleep(4 * POLL_S)
        file.write(whole[3:] + b"\xff no text\nno end")
        time.sleep(4 * POLL_S)
    assert capsys.readouterr().out == "first\ngrößer\n\ufffd no text\n"


def test_names_and_texts_do_not_control_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e"
    # Marks of direction and joiners belong to texts in Arabic and Persian.
    text = "1\t\u200fمی\u200cخواهم\u061c\n2"
    assert printable_text(text) == text
    assert printable_text("a\x1b]0;title\x07\r\x9b1m\u202eb\n") == "a\\x1b]0;title\\x07\\r\\x9b1m\\u202eb\n"


def test_transcripts_do_not_control_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transcript = stitch([Segment(0.0, 1.0, "one\x1b[2J two")], duration_s=1.0, model="m")
    for is_terminal, shown in ((True, "one\\x1b[2J two\n"), (False, "one\x1b[2J two\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        printer = TranscriptPrinter("txt", CueLimits(), recording_count=1, splits_channels=False)
        printer.begin("a.wav")
        printer.show(transcript.segments[0])
        printer.end(transcript, None)
        assert capsys.readouterr().out == shown
