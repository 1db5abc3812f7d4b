"""Name, write and remove the files of transcripts below out/files.

a recording's name -> its own path below files/, which depends on nothing else -> the list of what was written (work/)
-> a later run removes what it wrote for recordings that are gone, changed or failed
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.errors import OutputError
from graft.inference.subtitles import FORMATS, Format
from graft.storage.atomic import atomic_file, write_atomic

LIST_FILE = "files.parquet"
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

    It is the recording's name, suffix included: no two recordings share one, and no recording that comes later renames
    an older one's files. A name that would lead out of the folder, or that file systems refuse, is mended and marked
    with a digest of it.
    """
    safe = _safe_path(recording)
    if safe == recording and not _MARKED.search(recording):
        return recording
    digest = hashlib.sha256(recording.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{safe}~{digest[:12]}"


def file_stems(recordings: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the `file_stem` of each name."""
    names = recordings.unique()
    blocks = (names.slice(start, _BLOCK).to_pylist() for start in range(0, len(names), _BLOCK))
    stems = pa.chunked_array([pa.array(map(file_stem, block), pa.string()) for block in blocks], pa.string())
    return stems.take(pc.index_in(recordings, names))


def write_transcript_file(folder: Path, stem: str, form: Format, text: str) -> None:
    """Write one file of a recording below `folder`. Raises OutputError where it leads out, or cannot be written."""
    path = folder / f"{stem}.{form}"
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{path} leads out of {folder}: remove the link, then run the same command again")
        write_atomic(path, text)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}: mend that, then run the same command again"
        ) from error


def planned_files(recordings: pa.Table, formats: Sequence[Format]) -> pa.Table:
    """List the files (WRITTEN) of recordings with the columns `stem` and `recording_id`."""
    files = [pc.binary_join_element_wise(recordings["stem"], form, ".") for form in formats]
    parts = [pa.table([file, recordings["recording_id"]], schema=WRITTEN) for file in files]
    return pa.concat_tables([WRITTEN.empty_table(), *parts])


@contextlib.contextmanager
def following_recordings(home: Path, folder: Path, planned: pa.Table, recording_ids: pa.ChunkedArray) -> Iterator[None]:
    """While `planned` (WRITTEN) is written, remember it in `home`; then remove the files of other recordings.

    Only files that are in the list of an earlier run are removed. Those of `recording_ids` in formats that this run
    does not write stay.
    """
    earlier = _read_list(home / LIST_FILE)
    others = earlier.filter(pc.invert(pc.is_in(earlier["file"], planned["file"])))
    # A run that is killed has written some of the files.
    _write_list(home / LIST_FILE, pa.concat_tables([others, planned]))
    yield
    is_kept = pc.is_in(others["recording_id"], recording_ids)
    for file in others.filter(pc.invert(is_kept))["file"].to_pylist():
        _remove(folder, file)
    _write_list(home / LIST_FILE, pa.concat_tables([others.filter(is_kept), planned]))


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


def _read_list(path: Path) -> pa.Table:
    return pq.read_table(path, partitioning=None) if path.is_file() else WRITTEN.empty_table()


def _write_list(path: Path, files: pa.Table) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(files, temporary)


def _remove(folder: Path, file: str) -> None:
    """Remove a file below `folder`, and the folders that are empty without it."""
    path = folder / file
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        return
    with contextlib.suppress(OSError):  # it is gone already, or a folder holds more
        path.unlink()
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent).rmdir()
