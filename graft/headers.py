"""What libsndfile does not tell of a file: whether its header counts all that is in it."""

import io
import struct

from graft.files import SourceFile


def mp3_is_counted(file: SourceFile) -> bool:
    """Whether the first frame states how many follow (Xing, Info), and nothing is joined on behind them.

    libsndfile guesses from the first frame's bit rate otherwise, and ended a VBR file at half its length.
    """
    file.seek(0)
    head = file.read(10)
    start = 0
    if head.startswith(b"ID3"):
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(256)
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return False
    flags, _, byte_count = struct.unpack_from(">III", frame.ljust(268, b"\0"), place + 4)
    return flags & 3 == 3 and file.size - start - byte_count < 2048  # an ID3v1 tag may follow


def ogg_is_one_stream(file: SourceFile) -> bool:
    """Whether the last page belongs to the stream of the first: of joined streams libsndfile reads one."""
    file.seek(0)
    serial = file.read(18)[14:]
    file.seek(max(0, file.size - 2**16))  # longer than any page
    tail = file.read()
    last = tail.rfind(b"OggS")
    return last >= 0 and tail[last + 14 : last + 18] == serial


def wav_data_start(file: SourceFile) -> int | None:
    """The byte at which a wav's samples begin; None if none do."""
    file.seek(12)
    for _ in range(100):
        head = file.read(8)
        if head.startswith(b"data"):
            return file.tell() if file.tell() < file.size else None
        length = int.from_bytes(head[4:], "little")
        file.seek(length + length % 2, io.SEEK_CUR)
    return None
