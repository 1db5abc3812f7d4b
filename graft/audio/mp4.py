"""Read the boxes of MP4 files (m4a, mp4, mov, 3gp), as far as FFmpeg does not tell what is wrong with them.

    file = box, box, ...        box = length (4 bytes), kind (4 bytes), content

The box `moov` is the index without which nothing in `mdat`, the audio, is found. Some writers put it at the end.
"""

from collections.abc import Iterator

from graft.storage.source import SourceFile

FIRST_KINDS = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"})
KINDS = FIRST_KINDS | {b"moof", b"mfra", b"sidx", b"uuid", b"meta", b"pnot", b"udta", b"emsg", b"prft", b"ssix"}
"""Kinds of boxes at the top level; behind a place where bytes are missing, other ones seem to follow."""


def index_fault(file: SourceFile) -> str | None:
    """Say why a file's index is not found; None where the file is no MP4, or has its index."""
    boxes = list(_boxes(file))
    if not boxes or boxes[0][0] not in FIRST_KINDS or any(kind == b"moov" for kind, _, _ in boxes):
        return None
    if boxes[-1][2] > file.size and boxes[-1][0] in KINDS:
        return "its index is missing (moov, which stands at its end): it was cut off, or bytes in it are lost"
    if boxes[-1][0] in KINDS and boxes[-1][2] == file.size:
        return "its index is missing (moov): its writer did not finish it"
    return "its index is not found (moov): bytes before it are missing or were added"


def cut_box(file: SourceFile) -> int | None:
    """Return where a box with audio or its index begins that is cut off; None where all such boxes are whole."""
    *_, (kind, start, end) = (b"", 0, 0), *_boxes(file)
    return start if end > file.size and kind in (b"mdat", b"moof", b"moov") else None


def part_starts(file: SourceFile) -> list[int]:
    """Return where each recording begins of those that were joined byte by byte."""
    position = file.tell()  # A decoder goes on to read from here.
    starts = [start for kind, start, _ in _boxes(file) if kind == b"ftyp"]
    file.seek(position)
    return starts


def is_encrypted(file: SourceFile) -> bool:
    """Whether the index says that the media is encrypted."""
    places = [(start, end) for kind, start, end in _boxes(file) if kind == b"moov"]
    for start, end in places:
        file.seek(start)
        if b"sinf" in file.read(min(end, file.size) - start):
            return True
    return False


def _boxes(file: SourceFile) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the boxes at the top level, up to one of no known kind; the last may be cut off."""
    start, kind = 0, b"ftyp"
    while start + 8 <= file.size and kind in KINDS:
        file.seek(start)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:  # The length stands behind the kind, in 8 bytes.
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # The box goes to the end of the file.
            length = file.size - start
        yield kind, start, start + max(8, length)
        start += max(8, length)
