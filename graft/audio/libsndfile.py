"""Decode by libsndfile: wav, flac, aiff, caf, au, w64, rf64, ogg, opus and mp3, which it reads to the end.

FFmpeg decodes what is behind a damage, and what a FLAC file holds beyond its stated length.
"""

import contextlib
import functools
import re
import struct
from collections.abc import Iterator

import numpy as np
import soundfile

from graft.audio.audio_info import BLOCK_SAMPLES, LONGEST_SHORTFALL_S, AudioInfo, Decode, DefectLog
from graft.audio.defects import DAMAGED, HEADER_MISMATCH, TRUNCATED_FILE
from graft.audio.ffmpeg import decode_from
from graft.audio.ogg import is_ended, is_one_stream
from graft.errors import AudioError
from graft.storage.source import SourceFile

RAW_SUBTYPES = frozenset({"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})

EXACT_FORMATS = frozenset({"WAV", "WAVEX", "RAW", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC"})
"""Formats in which a seek lands on the very samples that decoding from the start yields; mp3, ogg and opus are not
such."""

LENGTH_LINES = {"WAV": "data", "WAVEX": "data", "AIFF": "SSND", "AU": "Data Size", "CAF": "data", "W64": "riff"}
LENGTH_LINES |= {"RF64": "Riff size", "SVX": "BODY"}
"""The lines of libsndfile's log with the length in bytes that a header states, and what it should be."""

MP3_SHORTFALL_S = 0.15
"""Shortest part of an MP3 that counts as lost where its header counts the frames: six of them."""

NO_LENGTHS = (range(2**31 - 2**16, 2**31 + 2**16), range(2**32 - 2**16, 2**32))
"""Lengths that headers state for sound from a pipe."""


class _SequentialFile(soundfile.SoundFile):
    """A sound file read without seeking.

    soundfile seeks after every read of a seekable file, which changes the samples of an mp3.
    """

    def seekable(self) -> bool:
        return False


def open_by_libsndfile(file: SourceFile, stack: contextlib.ExitStack) -> tuple[AudioInfo, Decode] | None:
    """Open a file with libsndfile; None if libsndfile does not know the format, or would not read all of the file."""
    try:
        sound = _SequentialFile(file)
    except soundfile.LibsndfileError:
        file.check()
        if not (first := _first_of_joined_wavs(file)):
            return None
        sound = _SequentialFile(first)
    stack.enter_context(sound)
    kind, stated_s = sound.format.lower(), _stated_s(sound, file)
    if kind in ("wav", "wavex") and (data := _wav_to_the_end(sound, file)):
        stated_s = sound.frames / sound.samplerate if sound.frames > 0 and file.size < 2**32 else None
        file = data
        sound = _SequentialFile(data, "r", sound.samplerate, sound.channels, sound.subtype, "LITTLE", "RAW")
        stack.enter_context(sound)
    elif kind in ("au", "caf") and (patched := _with_longer_data(sound, file)):
        stated_s = sound.frames / sound.samplerate
        file = patched
        sound = _SequentialFile(file)
        stack.enter_context(sound)
    # libsndfile silently reads no further than it believes the file to go.
    states_length = {"MP3": _mp3_states_length, "OGG": is_one_stream}.get(sound.format, lambda file: True)
    position = file.tell()  # libsndfile goes on to read from here.
    # A header without a length counts as 2^63 - 1 frames.
    if not 0 < sound.frames <= file.size * 10_000 or not states_length(file):
        return None
    has_end = is_ended(file) if sound.format == "OGG" else "truncated file" not in sound.extra_info
    file.seek(position)
    is_exact = soundfile.SoundFile.seekable(sound) and sound.format in EXACT_FORMATS
    info = AudioInfo(kind, sound.samplerate, sound.channels, sound.frames / sound.samplerate, is_exact)
    return info, functools.partial(_libsndfile_blocks, sound, file, info, stated_s, has_end)


def _libsndfile_blocks(
    sound: _SequentialFile,
    file: SourceFile,
    info: AudioInfo,
    stated_s: float | None,
    has_end: bool,
    start: int,
    end: int | None,
    log: DefectLog,
) -> Iterator[np.ndarray]:
    """Decode by libsndfile; what is behind a damage, by FFmpeg."""
    position, block_frames = start, BLOCK_SAMPLES // sound.channels
    stop = sound.frames if end is None or not info.exact_seek else min(end, sound.frames)
    read = functools.partial(sound.read, dtype="float32", always_2d=True)
    reason = ""
    try:
        if 0 < start < stop:
            sound.seek(start)
        while position < stop and len(block := read(min(block_frames, stop - position))):
            file.check()
            if sound.format == "OGG" and "reports a hole" in sound.extra_info:
                reason = "pages are missing"
                break
            position += len(block)
            yield block
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".").removeprefix("Error : ")
    file.check()
    at_s = position / info.rate
    if reason:
        log.refuse(at_s, reason)
        count = len(log.defects or ())
        yield from decode_from(position, file, info, log)
        if len(log.defects or ()) == count:  # FFmpeg has mended it, or does not tell where it is
            log.note(DAMAGED, at_s, at_s)
    elif start < sound.frames and (position < stop or end is None or end > position):
        yield from _end_of_libsndfile(sound, file, position, info, stated_s, has_end, log)


def _end_of_libsndfile(
    sound: _SequentialFile,
    file: SourceFile,
    position: int,
    info: AudioInfo,
    stated_s: float | None,
    has_end: bool,
    log: DefectLog,
) -> Iterator[np.ndarray]:
    """Compare the end of a file with its header.

    FFmpeg decodes what a FLAC file holds beyond its stated length, and what an MP3 holds behind junk in which
    libsndfile has found no more frames.
    """
    at_s, counted_s = position / info.rate, sound.frames / info.rate
    if sound.format in ("FLAC", "OGG") and position == sound.frames and _goes_on(file, at_s):
        yield from decode_from(position, file, info, log)
    elif sound.format == "MP3" and counted_s - at_s > MP3_SHORTFALL_S:
        log.refuse(at_s, f"it should hold {counted_s:.1f} s")
        count = len(log.defects or ())
        yield from decode_from(position, file, info, log)
        if len(log.defects or ()) == count:
            log.note(DAMAGED, at_s, at_s)
    elif counted_s - at_s > LONGEST_SHORTFALL_S:
        is_cut = sound.format != "FLAC"  # A cut FLAC file ends within a frame, where libsndfile fails.
        log.refuse(at_s, f"it should hold {counted_s:.1f} s")
        log.add(TRUNCATED_FILE if is_cut else HEADER_MISMATCH, at_s, counted_s)
    elif not has_end:
        log.note(TRUNCATED_FILE, at_s, at_s)  # some writers leave out the mark of the end
    elif stated_s is not None and abs(stated_s - at_s) > LONGEST_SHORTFALL_S:
        flag = TRUNCATED_FILE if stated_s > at_s else HEADER_MISMATCH
        log.add(flag, min(at_s, stated_s), max(at_s, stated_s), f"it should hold {stated_s:.1f} s")


def _goes_on(file: SourceFile, at_s: float) -> bool:
    """Whether more than a tag is left of a file of which libsndfile has read so many seconds."""
    left, read = file.size - file.tell(), file.tell()
    return left > 2**16 and left > LONGEST_SHORTFALL_S * read / max(at_s, 1.0)


def _stated_s(sound: _SequentialFile, file: SourceFile) -> float | None:
    """Return the seconds that a header states, mostly by libsndfile's log, where the file is too short for them.

    None where it states none, or where libsndfile counts frames as the header does.
    """
    if sound.format == "NIST":
        count = re.search(rb"\nsample_count -i (\d+)", file.read_range(0, 1024))
        return int(count[1]) / sound.samplerate if count else None
    line = LENGTH_LINES.get(sound.format)
    found = line and re.search(rf"^\W*{line}\s*: (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if not found or any(int(found[1]) in lengths for lengths in NO_LENGTHS):
        return None
    return sound.frames / sound.samplerate * int(found[1]) / max(int(found[2]), 1)


def _wav_to_the_end(wav: _SequentialFile, file: SourceFile) -> SourceFile | None:
    """Return the samples of a wav to the end, where its header states no length or too small a one; else None.

    Headers state none for sound from a pipe or over 4 GB. One is too small where no chunk follows.
    """
    is_unstated = not wav.frames or file.size >= 2**32
    least_left = LONGEST_SHORTFALL_S * _bytes_per_s(wav)
    if not is_unstated and file.size - wav.frames / wav.samplerate * _bytes_per_s(wav) < least_left:
        return None
    head, place = file.read_range(0, 2**12), 12  # the buffer stays where libsndfile goes on to read

    def read(start: int, count: int) -> bytes:
        return head[start : start + count] if start + count <= len(head) else file.read_range(start, count)

    for _ in range(100 if wav.subtype in RAW_SUBTYPES else 0):
        chunk = read(place, 8)
        length = int.from_bytes(chunk[4:], "little")
        start, place = place + 8, place + 8 + length + length % 2  # Chunks begin at even bytes.
        if chunk.startswith(b"data"):
            goes_on = file.size - place > least_left and not is_unstated
            follows = read(place, 4)
            # Another wav of the same form may be joined on.
            is_joined = follows == b"RIFF" and head[12:36] == read(place + 12, 24)
            goes_on = goes_on and (is_joined or not re.match(rb"[\x20-\x7e]{4}", follows))
            return file.after(start) if start < file.size and (is_unstated or goes_on) else None
        if place >= file.size:
            break
    return None


def _first_of_joined_wavs(file: SourceFile) -> SourceFile | None:
    """Return the first of several wavs that were joined byte by byte, which libsndfile refuses; None for other files.

    Raises AudioError where the second has another form, so that its samples are not those of the first.
    """
    head = file.read_range(0, 36)
    end = 8 + int.from_bytes(head[4:8], "little")
    is_wav = head.startswith(b"RIFF") and head[8:12] == b"WAVE"
    if not (is_wav and end < file.size and file.read_range(end, 4) == b"RIFF"):
        return None
    if head[12:] != file.read_range(end + 12, 24):  # the chunk `fmt `
        raise AudioError(f"{file.label}: two wavs of different forms are joined in it: part them at byte {end:,}")
    return file.before(end)


def _with_longer_data(sound: _SequentialFile, file: SourceFile) -> SourceFile | None:
    """Return an au or caf whose header states all of its samples, where it states too few; else None.

    They are too few where no chunk follows, and libsndfile would end there.
    """
    field, width, start, length = 8, 4, 0, 0  # the field with the length of the samples, and where these begin
    if sound.format == "AU":
        start, length = struct.unpack(">II", file.read_range(4, 8))
    while sound.format == "CAF" and not start and length >= 0 and field + 12 < file.size:
        kind, length = struct.unpack(">4sq", file.read_range(field, 12))
        if kind == b"data":
            field, width, start = field + 4, 8, field + 12
        else:
            field += 12 + length
    end = start + length
    is_raw = sound.subtype in RAW_SUBTYPES and 0 < sound.frames <= file.size
    if not (is_raw and start and length > 0 and file.size - end > LONGEST_SHORTFALL_S * _bytes_per_s(sound)):
        return None
    is_last = not re.match(rb"[\x20-\x7e]{4}", file.read_range(end, 4))
    return file.patched(field, (file.size - start).to_bytes(width, "big")) if is_last else None


def _bytes_per_s(wav: _SequentialFile) -> int:
    size = {"PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "DOUBLE": 8}.get(wav.subtype, 4)
    return wav.samplerate * wav.channels * size


def _mp3_states_length(file: SourceFile) -> bool:
    """Whether the first frame states how many follow (Xing, Info), and no other mp3 is joined on behind them.

    Otherwise libsndfile guesses from the first frame's bit rate, and would end a file of variable bit rate at half its
    length.
    """
    file.seek(0)
    head = file.read(10)
    start = 0
    if head.startswith(b"ID3"):  # The tag's length is four groups of 7 bits.
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(256)
    mark = max(frame.find(b"Xing"), frame.find(b"Info"))
    if mark < 0:
        return False
    flags, _, byte_count = struct.unpack_from(">III", frame.ljust(268, b"\0"), mark + 4)
    return flags & 3 == 3 and file.size - start - byte_count < 2048  # An ID3v1 tag may follow.
