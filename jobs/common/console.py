"""Keep a command's output readable: quiet libraries, and the lines that its workers write to a file meanwhile."""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

POLL_S = 0.5
TERMINAL_S, LOG_S = 2.0, 60.0
"""Seconds between two lines of progress, on a terminal, where each is written over the last one, and elsewhere."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters by which a name could move the cursor, end a line, or turn the text about it round."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters by which a text could control a terminal; those that mark the direction of Arabic or Hebrew are none."""
QUIET_VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def quiet_libraries() -> None:
    """Keep the progress bars and hints of libraries out of a command's output; call it before they are imported."""
    for name, value in QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    # These two print hints at import. A filter holds, because DeepSpeed sets the level of its logger anew.
    for name in ("DeepSpeed", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def printable(line: str) -> str:
    """Write the control characters in a line, such as those in names of files, as Python's escapes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


def printable_text(text: str) -> str:
    """Write the control characters in a text of several lines as Python's escapes; line feeds and tabs stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_text(values: Any) -> str:
    """Write JSON in one line for every reader: what ends lines in Unicode, or is no character in YAML, is escaped."""
    text = json.dumps(values, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)


class ProgressLine:
    """Prints a line that `line` returns now and then while a context lasts, and once more at its end."""

    def __init__(self, line: Callable[[], str], out: TextIO | None = None) -> None:
        self._line = line
        self._out = out or sys.stdout
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="graft-progress", daemon=True)

    def __enter__(self) -> "ProgressLine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._print("\n")

    def _watch(self) -> None:
        while not self._ended.wait(TERMINAL_S if self._out.isatty() else LOG_S):
            self._print("\r" if self._out.isatty() else "\n")

    def _print(self, end: str) -> None:
        print(self._line(), end=end, file=self._out, flush=True)


def time_left(seconds: float) -> str:
    """Write how long something takes as a clock does: 01:02:03."""
    whole = round(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextlib.contextmanager
def follow(path: Path) -> Iterator[None]:
    """Print the lines that are added to a file while the block runs, as `tail -f` does; the file need not exist yet."""
    done = threading.Event()
    start = path.stat().st_size if path.is_file() else 0
    thread = threading.Thread(target=_print_lines, args=(path, start, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _print_lines(path: Path, position: int, done: threading.Event) -> None:
    """Print complete lines from a position of a file on until `done` is set, and those that are there then."""
    while True:
        is_last = done.wait(POLL_S)
        if path.is_file():
            with path.open("rb") as file:  # the end may lie within a character
                file.seek(position)
                data = file.read()
            complete = data[: data.rfind(b"\n") + 1]
            position += len(complete)
            print(complete.decode(errors="replace"), end="", flush=True)
        if is_last:
            return
