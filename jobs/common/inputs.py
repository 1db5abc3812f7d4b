"""Find the files and folders that a recipe names and that do not exist, before a cluster starts for them.

Only what is named in full is looked up: globs, hub ids and locations on other machines are left to the command.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from graft.config import Recipe
from graft.errors import DataError
from graft.keys import Input, inputs_of
from graft.storage.local_paths import local_path

MOST_NAMED = 10
"""Most missing files that a message names."""
SHARDS = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}|_OP_.*_CL_")
"""Numbers of several files in a name."""


def check_inputs(recipe: Recipe) -> None:
    """Raise a DataError that names the files and folders of a recipe that do not exist, with the nearest names."""
    inputs = list(inputs_of(recipe))
    missing = [one for one in inputs if not _exists(one)]
    if not missing:
        return
    named = [f"{one.key}={one.value}{_hint(one.value)}" for one in missing[:MOST_NAMED]]
    more = [f"{len(missing) - MOST_NAMED} more"] if len(missing) > MOST_NAMED else []
    advice = "".join(f'; write {key}=["{name}"] for a name with a comma' for key, name in _split_names(inputs))
    raise DataError(f"no such file or folder: {', '.join([*named, *more])}{advice}")


def _exists(one: Input) -> bool:
    """Tell whether a path exists; true of what is no path of this machine, or may be a hub id."""
    path = _local_path(one.value)
    if path is None or os.path.exists(path):
        return True
    if one.is_file:
        # Brackets often stand in names of files: they are only a glob where they match something.
        is_pattern = any(sign in path for sign in "*?") or SHARDS.search(path) is not None
        return is_pattern or ("[" in path and bool(glob.glob(path)))
    first = path.split("/")[0]
    return not (path.startswith(("/", ".")) or path.count("/") > 1 or ("/" in path and os.path.isdir(first)))


def _local_path(value: str) -> str | None:
    """Return the path of a local file; None for a location on another machine."""
    path = local_path(value)
    return None if path is None else os.path.expanduser(path)


def _hint(value: str) -> str:
    """Name the nearest file beside a missing one, or the first folder of its path that does not exist."""
    path = Path(_local_path(value) or value)
    for folder in reversed(path.parents):
        if not folder.is_dir():
            path = folder
            break
    beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    if close:
        return f" (did you mean {path.parent / close[0]}?)"
    return "" if path == Path(_local_path(value) or value) else f" (there is no folder {path})"


def _split_names(inputs: Sequence[Input]) -> Iterator[tuple[str, str]]:
    """Yield keys and names of files with a comma that was taken to stand between two."""
    for key, group in groupby(inputs, key=lambda one: one.key):
        values = [one.value for one in group]
        for first in range(len(values)):
            for last in range(first + 2, min(len(values), first + 4) + 1):
                names = [comma.join(values[first:last]) for comma in (", ", ",")]
                yield from ((key, name) for name in names if os.path.exists(name))
