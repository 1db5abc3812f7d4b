"""Lines that workers add to a file are printed as they come."""

import time
from pathlib import Path

import pytest

from jobs.common.console import follow

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
