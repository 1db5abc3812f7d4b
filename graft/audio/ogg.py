"""Read the pages of Ogg files, as far as decoders do not tell what is in them."""

from graft.storage.source import SourceFile

MARK, HEADER_BYTES, FIRST = b"OggS", 27, 2
"""A page's first bytes, the bytes before its table of lengths, and the flag of the first page of a stream."""


def is_one_stream(file: SourceFile) -> bool:
    """Whether the last page has the serial number of the first: of joined streams libsndfile reads one."""
    file.seek(0)
    serial = file.read(18)[14:]
    file.seek(max(0, file.size - 2**16))  # No page is longer.
    tail = file.read()
    last = tail.rfind(b"OggS")
    return last >= 0 and tail[last + 14 : last + 18] == serial


def is_ended(file: SourceFile) -> bool:
    """Whether the last page is whole and marks the end of its stream."""
    start = max(0, file.size - 2**16)
    file.seek(start)
    tail = file.read()
    last = tail.rfind(b"OggS")
    if last < 0 or last + 27 > len(tail):
        return False
    lacing = tail[last + 27 : last + 27 + tail[last + 26]]
    return bool(tail[last + 5] & 4) and last + 27 + tail[last + 26] + sum(lacing) <= len(tail)


def link_starts(file: SourceFile) -> list[int]:
    """Return where each recording begins of those that are joined in a file (links of a chain), by all of its pages."""
    position = file.tell()  # A decoder goes on to read from here.
    starts, place, was_first = list[int](), 0, False
    while place + HEADER_BYTES < file.size:
        file.seek(place)
        head = file.read(HEADER_BYTES + 255)
        if not head.startswith(MARK):  # Bytes are damaged: the next page is looked for.
            place += max(1, (head + file.read(2**16)).find(MARK, 1))
            continue
        is_first = bool(head[5] & FIRST)
        starts += [place] if is_first and not was_first else []  # Streams side by side begin one after the other.
        was_first = is_first
        place += HEADER_BYTES + head[26] + sum(head[HEADER_BYTES : HEADER_BYTES + head[26]])
    file.seek(position)
    return starts
