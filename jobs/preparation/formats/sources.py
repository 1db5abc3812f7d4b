"""Find the files that a source names: one file, a folder, a glob, or numbered shards in braces.

    data/{000..127}.tar, data/audio__OP_0..127_CL_.tar, data/*.parquet, a folder -> files

In a folder, one kind of file is taken: tables, tar files or manifests. A folder of Hugging Face `datasets` names its
files itself.
"""

import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from graft.errors import AudioError, DataError
from graft.storage.local_paths import local_path
from graft.storage.locations import StoredFile, find_files, pin_revision, redact_uri
from graft.storage.source import open_source

MOST_FILES = 100_000
"""Most files that braces may name."""
KINDS = (("*.parquet", ".parquet"), ("*.arrow", ".arrow"), ("cuts.*.jsonl.gz", ".jsonl.gz"), ("*.tar", ".tar"))
"""Files that a folder may hold, and their suffixes; the first kind is taken that fits all files of one suffix."""
STATE, SPLITS, NEMO_MANIFEST = "state.json", "dataset_dict.json", "tarred_audio_manifest.json"
"""Files by which the folders of `datasets` and NeMo's tarred sets are known."""

_FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".txt", ".tar", ".tgz", ".parquet", ".arrow")
_NEMO_BRACES = re.compile(r"_OP_(.*?)_CL_")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def list_files(location: str) -> list[str]:
    """Return the locations of the files that a source names, with those on the hub at their present commits.

    A file is not looked up: who opens it says that it is missing. Raises DataError for a folder or glob that is
    missing or holds no manifest, or several kinds.
    """
    path = local_path(location)
    if path is not None and os.path.lexists(path):
        return _in_folder(location) if os.path.isdir(path) else [location]
    expanded = expand_braces(location)
    return [file for one in expanded for file in _files_of(one)]


def expand_braces(location: str) -> list[str]:
    """Return the locations that braces name: `{0..7}`, `{000..127}`, `{a,b}`, and NeMo's `_OP_0..7_CL_`.

    Raises DataError for more than MOST_FILES.
    """
    parts = _BRACES.split(_NEMO_BRACES.sub(r"{\1}", location))  # texts, and between them what braces hold
    choices = [_choices(part, location) if index % 2 else [part] for index, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MOST_FILES:
        raise _too_many(location)
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(braces: str, location: str) -> list[str]:
    choices = list[str]()
    for choice in braces.split(","):
        numbers = _RANGE.fullmatch(choice)
        if not numbers:
            choices.append(choice)
            continue
        first, last = int(numbers[1][:20]), int(numbers[2][:20])
        if abs(last - first) >= MOST_FILES:
            raise _too_many(location)
        step = 1 if last >= first else -1
        choices += [f"{number:0{len(numbers[1])}d}" for number in range(first, last + step, step)]
    return choices


def _too_many(location: str) -> DataError:
    return DataError(f"manifest {redact_uri(location)}: its braces name over {MOST_FILES:,} files: name fewer")


def _files_of(location: str) -> list[str]:
    path = local_path(location)
    if path is not None:
        if os.path.isdir(path):
            return _in_folder(location)
        return _matching(location) if not os.path.lexists(path) and any(sign in path for sign in "*?[") else [location]
    if location.startswith(("http://", "https://")):
        return [location]
    is_hub = location.startswith("hf://")
    name = PurePosixPath(location.rstrip("/") if is_hub else location.partition("?")[0].rstrip("/")).name
    if any(sign in name for sign in ("*?[" if is_hub else "*[")):
        return _matching(location)
    is_file = PurePosixPath(name).suffix.lower() in _FILE_SUFFIXES
    return [pin_revision(location)] if is_file else _in_folder(location)


def _matching(location: str) -> list[str]:
    found = sorted(file.uri for file in _find(location))
    if not found:
        raise DataError(f"manifest {redact_uri(location)}: no file is called so: correct the pattern")
    return found


def _find(location: str, pattern: str = "**") -> list[StoredFile]:
    """Find files; those of a relative path have relative paths, which ids of clips are made from."""
    found = find_files(location, pattern)
    path = local_path(location)
    if path is None or location != path or os.path.isabs(os.path.expanduser(path)):
        return found
    return [file if "://" in file.uri else replace(file, uri=os.path.relpath(file.uri)) for file in found]


def _in_folder(location: str) -> list[str]:
    """Return the files of a folder that are to be read, or the location where it is a file after all."""
    place = redact_uri(location)
    found = {file.name: file for file in _find(location, "*")}
    if list(found) == [PurePosixPath(location.partition("?")[0]).name]:
        return [next(iter(found.values())).uri]
    if SPLITS in found:
        raise DataError(
            f"manifest {place}: this folder of `datasets` holds {_split_names(found[SPLITS])}: give a source for each "
            "of its folders, as {manifest: FOLDER/train, split: train}"
        )
    if STATE in found:
        return _dataset_files(found, place)
    if NEMO_MANIFEST in found:
        return [found[NEMO_MANIFEST].uri]
    kinds = [
        [file.uri for name, file in sorted(found.items()) if PurePosixPath(name).match(pattern)]
        for pattern, suffix in KINDS
    ]
    named = [files for files in kinds if files]
    if len(named) > 1 and kinds[2] and named == [kinds[2], kinds[3]]:  # lhotse's shar: cuts and their recordings
        return kinds[2]
    if len(named) != 1:
        patterns = ", ".join(pattern for pattern, _ in KINDS)
        raise DataError(
            f"manifest {place}: this folder holds {'several' if named else 'none'} of {patterns}: name the files, as "
            f"{place.rstrip('/')}/*.parquet, or the manifest in it"
        )
    return named[0]


def _dataset_files(found: dict[str, StoredFile], place: str) -> list[str]:
    """Return the tables of a folder that `datasets` saved, in their order."""
    state = _read_json(found[STATE])
    if state.get("_indices_data_files"):
        raise DataError(f"manifest {place}: its rows are in an order of their own: save it after flatten_indices()")
    entries = state.get("_data_files")
    names = [str(entry.get("filename")) for entry in entries or [] if isinstance(entry, dict)]
    if missing := [name for name in names if name not in found] or ([] if names else [STATE]):
        raise DataError(f"manifest {place}: {STATE} names no file that is there, but {missing[0]}: save it again")
    return [found[name].uri for name in names]


def _split_names(file: StoredFile) -> str:
    splits = _read_json(file).get("splits")
    return f"the splits {', '.join(map(str, splits))}" if isinstance(splits, list) else "splits"


def _read_json(file: StoredFile) -> dict[str, Any]:
    """Read a small JSON file of a folder; one that is none is taken for empty."""
    try:
        with open_source(file.uri) as source:
            values = json.loads(source.read(2**20))
            source.check()
    except (AudioError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
