"""Keep a command's output readable: quiet libraries, and the lines that its workers write to a file meanwhile."""

import contextlib
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_S = 0.5
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters by which a name could move the cursor, end a line, or turn the text about it round."""
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


def json_text(values: Any) -> str:
    """Write JSON in one line for every reader: what ends lines in Unicode, or is no character in YAML, is escaped."""
    text = json.dumps(values, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)


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
