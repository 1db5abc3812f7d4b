"""Decode any audio file into blocks of float32 frames, in order and in bounded memory.

libsndfile decodes what it reads to the end: wav, flac, aiff, caf, au, w64, rf64, ogg, opus, mp3. FFmpeg (PyAV) decodes
all else: m4a, mp4, webm, aac, wma, video, files of the former kinds that libsndfile would end early, and damaged ones
behind the damage. Frames are counted at the source's own rate, from the start of the media.
"""

import contextlib
import functools
import itertools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import soundfile

from graft.audio.defects import DAMAGED, HEADER_MISMATCH, LOSSES, TRUNCATED_FILE, AudioDefect
from graft.audio.timeline import on_timeline
from graft.errors import AudioError, AudioTooLong
from graft.storage.source import AudioSource, SourceFile, open_source

BLOCK_SAMPLES = 2**20
"""Samples of a block, all channels together: 4 MB."""

RAW_SUBTYPES = frozenset({"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})

EXACT_FORMATS = frozenset({"WAV", "WAVEX", "RAW", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC"})
"""Formats in which a seek lands on the very samples that decoding from the start yields; mp3, ogg and opus are not
such."""

RAW_STREAMS = frozenset({"mp3", "aac", "ac3", "eac3", "mpeg", "mpegts"})
"""Formats of FFmpeg that are a stream of frames, each with a sync word by which a decoder recovers after junk."""

GAPLESS = frozenset({"ogg", "flac"})
"""Formats of FFmpeg in which a gap of the timestamps is a loss."""

TIMELESS = frozenset({"mp3", "aac", "ac3", "eac3"})
"""Formats of FFmpeg whose timestamps are only counted, and whose durations are only estimated."""

LONGEST_SHORTFALL_S = 0.5
"""A file that ends sooner or later than its header says by more than this is truncated, or its header is wrong; headers
that count a few frames too many are common."""

LENGTH_LINES = {"WAV": "data", "WAVEX": "data", "AIFF": "SSND", "AU": "Data Size", "CAF": "data", "W64": "riff"}
LENGTH_LINES["RF64"] = "Riff size"
"""The lines of libsndfile's log with the length in bytes that a header states, and what it should be."""

NO_LENGTHS = (range(2**31 - 2**16, 2**31 + 2**16), range(2**32 - 2**16, 2**32))
"""Lengths that headers state for sound from a pipe."""

CONVERT = "convert it, e.g. `ffmpeg -i IN OUT.flac`"

Decode = Callable[[int, int | None, "DefectLog"], Iterator[np.ndarray]]
"""(start, end) -> blocks (frames, channels). Without exact seek the start is always 0; the last block may go beyond the
end."""


@dataclass(eq=False)
class DefectLog:
    """Collects the defects of a recording while it is decoded; without a list, those that lose audio are refused."""

    label: str
    defects: list[AudioDefect] | None
    damaged_s: float = 0.0
    """Seconds that are damaged."""

    def add(self, flag: str, start_s: float, end_s: float, reason: str = "audio is lost") -> None:
        """Add a defect. Raises AudioError if it loses audio and is not to be put up with."""
        if flag in LOSSES:
            self.refuse(start_s, reason)
        self.note(flag, start_s, end_s)

    def note(self, flag: str, start_s: float, end_s: float) -> None:
        """Add a defect that is put up with."""
        self.damaged_s += (end_s - start_s) * (flag == DAMAGED)
        if self.defects is not None:
            self.defects.append(AudioDefect(start_s, end_s, flag))

    def refuse(self, at_s: float, reason: str) -> None:
        """Raise AudioError for a loss, unless losses are put up with."""
        if self.defects is None:
            raise AudioError(
                f"{self.label}: damaged or truncated at {at_s:.1f} s ({reason}): fetch it again, or {CONVERT}"
            )


@dataclass(frozen=True)
class AudioInfo:
    """The facts in the header of a recording."""

    format: str
    rate: int
    channels: int
    duration_s: float | None
    """Duration in seconds: exact where `exact_seek`, elsewhere what the header or the bit rate suggests; None where
    neither does."""
    exact_seek: bool
    """Whether frames can be read from anywhere; if not, all frames before them are decoded and dropped."""


@dataclass(frozen=True, eq=False)
class OpenAudio:
    """A recording while it is open."""

    name: str
    info: AudioInfo
    decode: Decode

    def frames(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        max_s: float | None = None,
        defects: list[AudioDefect] | None = None,
    ) -> Iterator[np.ndarray]:
        """Decode frames `start` to `end` or to the last, in blocks of up to 4 MB.

        Blocks are float32 (frames, channels), full scale +-1. With a list of `defects`, damaged and truncated files are
        decoded as far as they go, and what is wrong with them up to the end is added to it. Raises AudioError if the
        file is empty or most of it is lost; without the list also if it is damaged or truncated (where its format can
        tell). Raises AudioTooLong beyond `max_s` seconds.
        """
        max_frames = None if max_s is None else int(max_s * self.info.rate)
        position = start if self.info.exact_seek else 0
        log = DefectLog(self.name, defects)
        for block in self.decode(position, end, log):
            wanted = block[max(0, start - position) : None if end is None else max(0, end - position)]
            position += len(block)
            if max_frames is not None and position > max_frames and (end is None or end > max_frames):
                raise AudioTooLong(f"{self.name}: over the limit of {max_s:g} s of audio: cut it")
            if len(wanted):
                yield wanted
            if end is not None and position >= end:
                return
        if not position:
            raise AudioError(f"{self.name}: holds no audio: fetch or record it again")
        if log.damaged_s > position / self.info.rate / 2:
            raise AudioError(f"{self.name}: damaged in {log.damaged_s:.1f} s, most of its time: fetch it again")


@contextlib.contextmanager
def open_audio(source: AudioSource, *, name: str | None = None) -> Iterator[OpenAudio]:
    """Open a recording; of a video, its main audio stream. `name` is what messages call it, by default its path.

    Raises AudioError if the source is missing, not readable as audio, or of a rate or channels that no recording has.
    """
    with open_source(source, name=name) as file, contextlib.ExitStack() as stack:
        info, decode = _open_by_libsndfile(file, stack) or _open_by_ffmpeg(file, stack)
        if not (1_000 <= info.rate <= 1_000_000 and 1 <= info.channels <= 64):
            raise AudioError(
                f"{file.label}: its header states {info.channels} channels at {info.rate} Hz: fetch or record it again"
            )
        yield OpenAudio(file.label, info, decode)


# libsndfile


class _SequentialFile(soundfile.SoundFile):
    """A sound file read without seeking.

    soundfile seeks after every read of a seekable file, which changes the samples of an mp3.
    """

    def seekable(self) -> bool:
        return False


def _open_by_libsndfile(file: SourceFile, stack: contextlib.ExitStack) -> tuple[AudioInfo, Decode] | None:
    """Open a file with libsndfile; None if libsndfile does not know the format, or would not read all of the file."""
    try:
        sound = _SequentialFile(file)
    except soundfile.LibsndfileError:
        file.check()
        return None
    stack.enter_context(sound)
    kind, stated_s = sound.format.lower(), _stated_s(sound)
    if kind in ("wav", "wavex") and (data := _wav_to_the_end(sound, file)):
        stated_s = sound.frames / sound.samplerate if sound.frames > 0 and file.size < 2**32 else None
        file = data
        sound = _SequentialFile(data, "r", sound.samplerate, sound.channels, sound.subtype, "LITTLE", "RAW")
        stack.enter_context(sound)
    # libsndfile silently reads no further than it believes the file to go.
    states_length = {"MP3": _mp3_states_length, "OGG": _ogg_is_one_stream}.get(sound.format, lambda file: True)
    position = file.tell()  # libsndfile goes on to read from here.
    # A header without a length counts as 2^63 - 1 frames.
    if not 0 < sound.frames <= file.size * 10_000 or not states_length(file):
        return None
    is_ended = sound.format != "OGG" or _ogg_is_ended(file)
    file.seek(position)
    is_exact = soundfile.SoundFile.seekable(sound) and sound.format in EXACT_FORMATS
    info = AudioInfo(kind, sound.samplerate, sound.channels, sound.frames / sound.samplerate, is_exact)
    return info, functools.partial(_libsndfile_blocks, sound, file, info, stated_s, is_ended)


def _libsndfile_blocks(
    sound: _SequentialFile,
    file: SourceFile,
    info: AudioInfo,
    stated_s: float | None,
    is_ended: bool,
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
        yield from _ffmpeg_blocks_from(position, file, info, log)
        if len(log.defects or ()) == count:  # FFmpeg has mended it, or does not tell where it is
            log.note(DAMAGED, at_s, at_s)
    elif start < sound.frames and (position < stop or end is None or end > position):
        yield from _end_of_libsndfile(sound, file, position, info, stated_s, is_ended, log)


def _end_of_libsndfile(
    sound: _SequentialFile,
    file: SourceFile,
    position: int,
    info: AudioInfo,
    stated_s: float | None,
    is_ended: bool,
    log: DefectLog,
) -> Iterator[np.ndarray]:
    """Compare the end of a file with its header; decode by FFmpeg what a FLAC file holds beyond its stated length."""
    at_s, counted_s = position / info.rate, sound.frames / info.rate
    if sound.format == "FLAC" and position == sound.frames and _goes_on(file, at_s):
        yield from _ffmpeg_blocks_from(position, file, info, log)
    elif counted_s - at_s > LONGEST_SHORTFALL_S:
        is_cut = sound.format != "FLAC"  # A cut FLAC file ends within a frame, where libsndfile fails.
        log.refuse(at_s, f"it should hold {counted_s:.1f} s")
        log.add(TRUNCATED_FILE if is_cut else HEADER_MISMATCH, at_s, counted_s)
    elif not is_ended:
        log.note(TRUNCATED_FILE, at_s, at_s)  # some writers leave out the mark of the end
    elif stated_s is not None and abs(stated_s - at_s) > LONGEST_SHORTFALL_S:
        flag = TRUNCATED_FILE if stated_s > at_s else HEADER_MISMATCH
        log.add(flag, min(at_s, stated_s), max(at_s, stated_s), f"it should hold {stated_s:.1f} s")


def _goes_on(file: SourceFile, at_s: float) -> bool:
    """Whether more than a tag is left of a file of which libsndfile has read so many seconds."""
    left, read = file.size - file.tell(), file.tell()
    return left > 2**16 and left > LONGEST_SHORTFALL_S * read / max(at_s, 1.0)


def _stated_s(sound: _SequentialFile) -> float | None:
    """Return the seconds that a header states where the file is too short for them, by libsndfile's log; else None."""
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
            goes_on = goes_on and not re.match(rb"[\x20-\x7e]{4}", read(place, 4))
            return file.after(start) if start < file.size and (is_unstated or goes_on) else None
        if place >= file.size:
            break
    return None


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


def _ogg_is_one_stream(file: SourceFile) -> bool:
    """Whether the last page has the serial number of the first: of joined streams libsndfile reads one."""
    file.seek(0)
    serial = file.read(18)[14:]
    file.seek(max(0, file.size - 2**16))  # No page is longer.
    tail = file.read()
    last = tail.rfind(b"OggS")
    return last >= 0 and tail[last + 14 : last + 18] == serial


def _ogg_is_ended(file: SourceFile) -> bool:
    """Whether the last page is whole and marks the end of its stream."""
    start = max(0, file.size - 2**16)
    file.seek(start)
    tail = file.read()
    last = tail.rfind(b"OggS")
    if last < 0 or last + 27 > len(tail):
        return False
    lacing = tail[last + 27 : last + 27 + tail[last + 26]]
    return bool(tail[last + 5] & 4) and last + 27 + tail[last + 26] + sum(lacing) <= len(tail)


# FFmpeg


def _open_by_ffmpeg(file: SourceFile, stack: contextlib.ExitStack) -> tuple[AudioInfo, Decode]:
    container, stream = _open_container(file, stack)
    origin_s = _origin_s(container)
    stated_s = _stated_end_s(container, stream, origin_s)
    duration_s = stated_s
    if duration_s is None and container.duration is not None:
        duration_s = container.duration / 1e6
    codec = stream.codec_context
    info = AudioInfo(container.format.name, codec.sample_rate, codec.channels, duration_s, exact_seek=False)
    return info, lambda start, end, log: _ffmpeg_blocks(container, stream, info, file, stated_s, log)


def _open_container(file: SourceFile, stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """Return a container and its main audio stream. Raises AudioError if there is none that FFmpeg decodes."""
    import av  # This import is local because most audio does without its 100 MB.

    file.seek(0)
    options = {"protocol_whitelist": "none"}  # A playlist may name files and servers: nothing but the source is opened.
    try:
        container = stack.enter_context(av.open(file, "r", container_options=options, metadata_errors="ignore"))
        stream: Any = container.streams.best("audio")
    except av.FFmpegError as error:
        file.check()
        raise AudioError(f"{file.label}: not readable as audio ({error.strerror}): {CONVERT}") from error
    if not container.streams.audio:
        raise AudioError(f"{file.label}: holds no audio ({container.format.name}): leave it out")
    if stream is None or stream.codec_context is None:
        raise AudioError(f"{file.label}: no audio in it that FFmpeg decodes ({container.format.name}): {CONVERT}")
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    return container, stream


def _origin_s(container: Any) -> Fraction | None:
    """Return the time at which the media starts: the earliest start of its streams; None if times are only counted.

    A video's sound may start later. A picture of the cover is no stream of the media.
    """
    import av

    if container.format.name in TIMELESS:
        return None
    starts = [
        stream.start_time * stream.time_base
        for stream in container.streams
        if stream.type in ("audio", "video")
        and stream.start_time is not None
        and not stream.disposition & av.stream.Disposition.attached_pic
    ]
    return min(starts, default=Fraction(0))


def _stated_end_s(container: Any, stream: Any, origin_s: Fraction | None) -> float | None:
    """Return the seconds from the start of the media to the end of its sound, as far as the header states them."""
    if origin_s is None or container.format.name in RAW_STREAMS:
        return None
    if stream.duration is not None:
        start_s = stream.start_time * stream.time_base - origin_s if stream.start_time is not None else 0
        return float(start_s + stream.duration * stream.time_base)
    if len(container.streams) == 1:
        return None if container.duration is None else container.duration / 1e6 - float(origin_s)
    found = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # of Matroska's streams
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) - float(origin_s) if found else None


def _ffmpeg_blocks_from(position: int, file: SourceFile, info: AudioInfo, log: DefectLog) -> Iterator[np.ndarray]:
    """Decode by FFmpeg what follows the frames that libsndfile has decoded."""
    skipped = position
    with contextlib.ExitStack() as stack:
        container, stream = _open_container(file, stack)
        for block in _ffmpeg_blocks(container, stream, info, file, info.duration_s, log):
            if len(rest := block[skipped:]):
                yield rest
            skipped -= len(block) - len(rest)


def _ffmpeg_blocks(
    container: Any, stream: Any, info: AudioInfo, file: SourceFile, stated_s: float | None, log: DefectLog
) -> Iterator[np.ndarray]:
    """Decode blocks; where a joined file changes its channels or rate, they are converted to those it began with."""
    import av

    layout, position = stream.codec_context.layout, 0
    # Planar samples are faster, but PyAV crashes on those of more than 8 channels.
    is_planar = layout.nb_channels <= 8
    block: Any = av.AudioFifo()  # a resampler with a frame_size makes blocks too, but takes a fifth more CPU time
    ending = _Ending()
    frames = on_timeline(
        _decode_packets(container, stream, ending, log),
        _origin_s(container) if is_planar else None,
        log.add,
        has_gaps=container.format.name not in GAPLESS,
    )
    try:
        for _, run in itertools.groupby(frames, lambda one: (one.format.name, one.layout.name, one.sample_rate)):
            resampler = av.AudioResampler("fltp" if is_planar else "flt", layout, info.rate)
            for frame in itertools.chain(run, [None]):  # None flushes the resampler.
                for part in filter(None, resampler.resample(frame)):
                    position += part.samples
                    part.pts, part.time_base = None, Fraction(1, info.rate)
                    block.write(part)
                if position and block.samples >= (BLOCK_SAMPLES // info.channels if frame else 1):
                    samples = block.read().to_ndarray()  # (channels, frames) if planar, else (1, frames * channels)
                    yield np.ascontiguousarray(samples.T) if len(samples) > 1 else samples.reshape(-1, info.channels)
    except av.FFmpegError as error:  # a frame of a form that FFmpeg does not convert
        file.check()
        raise AudioError(
            f"{file.label}: damaged at {position / info.rate:.1f} s ({error.strerror}): fetch it again, or {CONVERT}"
        ) from error
    file.check()
    at_s = position / info.rate
    if stated_s is not None and stated_s - at_s > LONGEST_SHORTFALL_S:
        log.add(TRUNCATED_FILE, at_s, stated_s, ending.reason or f"it should hold {stated_s:.1f} s")
    elif ending.reason and container.format.name not in RAW_STREAMS:
        log.add(TRUNCATED_FILE, at_s, at_s, ending.reason)
    elif (ending.reason and container.format.name != "mp3") or (
        container.format.name == "ogg" and not _ogg_is_ended(file)
    ):
        log.note(TRUNCATED_FILE, at_s, at_s)  # behind an mp3 there may be tags
    elif stated_s is not None and at_s - stated_s > LONGEST_SHORTFALL_S:
        log.add(HEADER_MISMATCH, stated_s, at_s)


@dataclass
class _Ending:
    """How a stream ended: `reason` says why its last packets are lost."""

    reason: str = ""


def _decode_packets(container: Any, stream: Any, ending: _Ending, log: DefectLog) -> Iterator[Any]:
    """Decode frames as they come; None stands for a packet that is lost.

    Raw streams may hold tags and the stumps of cut frames between frames; those are left out.
    """
    import av

    lost, count, seconds = 0, 0, 0.0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)  # None also after a fault of the container, with which it ends
            if packet is None:
                break
            count += 1
            for frame in packet.decode():
                seconds += frame.samples / frame.sample_rate
                ending.reason = ending.reason if packet.size == 0 else ""  # 0: what the decoder still held
                yield frame
        except av.FFmpegError as error:
            ending.reason = str(error.strerror)
            lost += 1
            if container.format.name not in RAW_STREAMS or lost > max(10, count // 10):
                log.refuse(seconds, ending.reason)
            if log.defects is not None:
                yield None
    if lost > max(10, count // 2):
        raise AudioError(f"{log.label}: damaged, {lost} of its {count} packets: fetch it again, or {CONVERT}")
