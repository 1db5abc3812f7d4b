"""Read the pages of Ogg files, as far as decoders do not tell what is in them."""

from graft.storage.source import SourceFile


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
