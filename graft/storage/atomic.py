"""Write files and folders so that their names only ever show whole content.

hidden temporary sibling -> written in full -> flushed to disk -> renamed; it is removed when writing fails
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a whole file; text is written as UTF-8. Raises OSError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write; the file moves to `path` when the block ends well.

    Missing parent folders are made. Any number of processes may write one file at once; the last one to finish wins.
    Without `sync` a power failure may leave a cut file: this is for caches whose readers notice one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short: names of up to 255 bytes can be written
    try:
        yield temporary
        if sync:
            _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it moves to `path` when the block ends well.

    Missing parent folders are made. Only one process may write a folder at a time: what a killed one left is removed.
    With `replace` a folder that is there already is removed at the end; without it, OSError is raised then, unless that
    folder is empty.
    """
    path = Path(path)
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        if replace and path.is_dir():
            path.replace(old)  # a rename cannot replace a folder that holds files
        temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the operating system write a file's content to disk before the rename does."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
