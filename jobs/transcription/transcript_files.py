"""Name, write and remove the files of transcripts below out/files.

a recording's name -> its own path below files/, also where case does not count -> the list of what was written (work/)
-> a later run removes what is of recordings that are gone, changed or failed
"""

import contextlib
import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.errors import OutputError
from graft.inference.subtitles import FORMATS, Format
from graft.storage.atomic import atomic_file, write_atomic

LIST_FILE = "files.parquet"
FORMATS_KEY = b"formats"
"""Entry of the list's metadata: the formats that a run writes, while it lasts."""
WRITTEN = pa.schema(
    [
        ("file", pa.string()),  # path below files/
        ("recording_id", pa.string()),  # of the recording as it was when the file was written
    ]
)

PART_BYTES, PATH_BYTES = 220, 1000
"""Bytes of a folder or name, and of a path, that are kept of a recording's name: file systems take 255, and 1,024."""
_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Backslashes, control characters, ends of lines, and bytes that are not UTF-8."""
_MARKED = re.compile(r"~[0-9a-f]{12}$")
_FILE_ENDINGS = tuple(f".{form}" for form in FORMATS)
_BLOCK = 65_536
"""Number of names that are Python strings at a time."""


def file_stem(recording: str) -> str:
    """Return the path of a recording's files below files/, without the ending of their format.

    It is the recording's name, suffix included: no two recordings share one. A name that would lead out of the folder,
    or that file systems refuse, is mended and marked with a digest of it.
    """
    safe = _safe_path(recording)
    return recording if safe == recording and not _MARKED.search(recording) else _marked(safe, recording)


def file_stems(recordings: pa.ChunkedArray, written: pa.Table | None = None) -> pa.ChunkedArray:
    """Return the path of each recording's files: its `file_stem`, which is marked where another's looks the same.

    Call.wav and call.wav, or two spellings of an accent, are one name to some file systems. The first recording keeps
    the name, or the one of which there is a file in `written` (WRITTEN): one that comes later renames no older one.
    """
    names = recordings.unique()
    stems = _mapped(file_stem, names)
    keys = _mapped(_caseless, stems)
    keys = keys.dictionary_encode().combine_chunks().indices.to_numpy() if len(keys) else np.zeros(0, np.int64)
    is_shared = np.bincount(keys, minlength=1)[keys] > 1
    if not is_shared.any():
        return stems.take(pc.index_in(recordings, names))
    places = np.flatnonzero(is_shared)
    sharing = stems.take(pa.array(places))
    listed = (written or WRITTEN.empty_table())["file"]
    files = [pc.is_in(pc.binary_join_element_wise(sharing, form, "."), listed) for form in FORMATS]
    is_written = np.logical_or.reduce([one.to_numpy() for one in files])
    changed, keepers = stems.to_pylist(), set[int]()
    # Within a name, those with files come first, then the order of the recordings counts.
    for place in places[np.lexsort((places, ~is_written))].tolist():
        if keys[place] in keepers:
            changed[place] = _marked(changed[place], names[place].as_py())
        keepers.add(keys[place])
    return pa.chunked_array([pa.array(changed, pa.string())]).take(pc.index_in(recordings, names))


def _mapped(function: Callable[[str], str], names: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    blocks = (names.slice(start, _BLOCK).to_pylist() for start in range(0, len(names), _BLOCK))
    return pa.chunked_array([pa.array(map(function, block), pa.string()) for block in blocks], pa.string())


def _marked(stem: str, recording: str) -> str:
    digest = hashlib.sha256(recording.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{stem}~{digest[:12]}"


def _caseless(name: str) -> str:
    """Return what names share that are one to a file system which knows neither case nor normal forms of Unicode."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def write_transcript_file(folder: Path, stem: str, form: Format, text: str) -> None:
    """Write one file of a recording below `folder`. Raises OutputError where it leads out, or cannot be written."""
    path = folder / f"{stem}.{form}"
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{path} leads out of {folder}: remove the link, then run the same command again")
        if not (path.is_file() and path.read_bytes() == text.encode()):
            write_atomic(path, text)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}: mend that, then run the same command again"
        ) from error


def planned_files(recordings: pa.Table, formats: Sequence[str]) -> pa.Table:
    """List the files (WRITTEN) of recordings with the columns `stem` and `recording_id`."""
    files = [pc.binary_join_element_wise(recordings["stem"], form, ".") for form in formats]
    parts = [pa.table([file, recordings["recording_id"]], schema=WRITTEN) for file in files]
    return pa.concat_tables([WRITTEN.empty_table(), *parts])


def listed_files(home: Path) -> pa.Table:
    """Return the files (WRITTEN) that runs have listed in `home`."""
    return _read_list(home / LIST_FILE)[0]


def remember_files(home: Path, done: pa.Table, formats: Sequence[Format]) -> pa.Table:
    """List the files (WRITTEN) that earlier runs have written, before one begins that writes `formats`.

    A run keeps in `home` what the runs before it wrote and its own formats. Where it is killed, it has written those of
    the recordings in its plan that are `done` (`stem`, `recording_id`), or the next run does.
    """
    listed, formats_then = _read_list(home / LIST_FILE)
    written = planned_files(done, formats_then)
    earlier = pa.concat_tables([_without(listed, written), written])
    _write_list(home / LIST_FILE, earlier, formats)
    return earlier


def remove_other_files(home: Path, folder: Path, earlier: pa.Table, done: pa.Table, formats: Sequence[Format]) -> None:
    """Remove the files of other recordings, when a run has written those of `done` (`stem`, `recording_id`).

    Only `earlier` files are removed. Those of `done` in other formats than this run's stay.
    """
    written, possible = planned_files(done, formats), planned_files(done, FORMATS)
    others = _without(earlier, written)
    is_kept = pc.and_(
        pc.is_in(others["recording_id"], done["recording_id"]), pc.is_in(others["file"], possible["file"])
    )
    if leaving := others.filter(pc.invert(is_kept))["file"].to_pylist():
        # To some file systems a name in another case is that of a file which was just written.
        same = {_caseless(file): file for file in pc.unique(written["file"]).to_pylist()}
        for file in leaving:
            if not _is_one_file(folder / file, folder / same.get(_caseless(file), file)):
                _remove(folder, file)
    _write_list(home / LIST_FILE, pa.concat_tables([others.filter(is_kept), written]), ())


def _safe_path(recording: str) -> str:
    parts = [_safe_part(part) for part in recording.split("/") if part not in ("", ".")]
    *folders, name = parts or ["_"]
    # A folder is never called like another recording's file.
    folders = [f"{folder}_" if folder.lower().endswith(_FILE_ENDINGS) else folder for folder in folders]
    path = "/".join([*folders, name])
    return path if len(path.encode()) <= PATH_BYTES else name


def _safe_part(part: str) -> str:
    printable = "_" if part == ".." else _UNSAFE.sub("_", part)
    return printable.encode()[:PART_BYTES].decode(errors="ignore")


def _without(files: pa.Table, others: pa.Table) -> pa.Table:
    return files.filter(pc.invert(pc.is_in(files["file"], others["file"])))


def _read_list(path: Path) -> tuple[pa.Table, list[str]]:
    """Read a list of files, and the formats that the run writes which has written the list."""
    if not path.is_file():
        return WRITTEN.empty_table(), []
    files = pq.read_table(path, partitioning=None)
    formats = (files.schema.metadata or {}).get(FORMATS_KEY, b"").decode().split()
    return files.replace_schema_metadata(), formats


def _write_list(path: Path, files: pa.Table, formats: Sequence[Format]) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(files.replace_schema_metadata({FORMATS_KEY: " ".join(formats).encode()}), temporary)


def _is_one_file(path: Path, other: Path) -> bool:
    """Tell whether two different paths lead to one file."""
    try:
        return path != other and path.samefile(other)
    except OSError:
        return False


def _remove(folder: Path, file: str) -> None:
    """Remove a file below `folder`, and the folders that are empty without it."""
    path = folder / file
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        return
    with contextlib.suppress(OSError):  # it is gone already, or a folder holds more
        path.unlink()
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent).rmdir()
