"""What a job prints: its own lines, and those that its workers write to a file meanwhile."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.5


def quiet_libraries() -> None:
    """Keep the progress bars and hints of libraries out of a job's output; for a process's entry point, before they are imported."""
    # Ray's C++ prints an error for every actor pool of Ray Data, about nothing that goes wrong (ray-project/ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name in (
        "DeepSpeed",
        "bitsandbytes.backends.cpu.ops",
    ):  # they hint at import, and DeepSpeed sets its level anew then
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


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
    while True:
        is_last = done.wait(POLL_S)
        if path.is_file():
            with path.open() as file:
                file.seek(position)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            position += len(whole.encode())
            print(whole, end="", flush=True)
        if is_last:
            return
