"""Find the user's cache, and compute digests of files, which it remembers until the files change."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from graft.storage.atomic import atomic_file

SETTLED_S = 3.0
"""Seconds after a file's last change from which its digest is remembered. A file that changed just now may change again
without another time of change: some file systems count in steps of two seconds."""


def cache_path(kind: str, name: str, cache: Path | None = None) -> Path:
    """Return the path of a file or folder in the cache, by default $GRAFT_CACHE or ~/.cache/graft."""
    return (cache or Path(os.environ.get("GRAFT_CACHE") or "~/.cache/graft").expanduser()) / kind / name


def file_digest(path: Path, cache: Path | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    It is computed once, and again when the file's size, inode or times of change differ from those that the cache
    knows. Where the cache cannot be written, it is computed each time. Raises OSError.
    """
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    record, state = cache_path("digests", f"{key}.json", cache), _state(path)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads(record.read_text())
        if known.get("state") == state and (digest := known.get("sha256")):
            return str(digest)
    began_at = time.time()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _state(path) == state and max(state[2:]) < (began_at - SETTLED_S) * 1e9:
        with contextlib.suppress(OSError), atomic_file(record, sync=False) as temporary:
            temporary.write_text(json.dumps({"path": str(path.resolve()), "state": state, "sha256": digest}) + "\n")
    return digest


def _state(path: Path) -> list[int]:
    """Return a file's inode, its size, and its times of change, of which no program can set the second one."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
