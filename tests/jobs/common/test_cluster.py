"""What a command's stderr gets while it connects to Ray."""

import os

import pytest

from jobs.common.cluster import _without_log_level_line

LEVEL_LINE = b"[I 1 1] logging.cc:303: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\n"


def test_only_the_line_of_the_log_level_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with _without_log_level_line():
        os.write(2, LEVEL_LINE + b"an error\nand a cut line")
    assert capfd.readouterr().err == "an error\nand a cut line"

    def fail() -> None:
        os.write(2, b"why it failed\n" + LEVEL_LINE)
        raise RuntimeError

    with pytest.raises(RuntimeError), _without_log_level_line():
        fail()
    assert capfd.readouterr().err == "why it failed\n"
