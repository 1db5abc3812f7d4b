"""A recording of any length and format -> its frames, in order, in blocks, in bounded memory.

libsndfile decodes what it reads to the end: wav, flac, aiff, caf, au, w64, rf64, ogg, opus, mp3. FFmpeg (PyAV) decodes all else: m4a, mp4,
webm, aac, wma, video, and files of those kinds that libsndfile would end early. Frames are counted at the source's own rate.
"""

import contextlib
import functools
import io
import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import soundfile

from graft.errors import AudioError, AudioTooLong
from graft.storage.source import AudioSource, SourceFile, open_source

BLOCK_SAMPLES = 2**20
"""Of all channels together, in a block: 4 MB."""

RAW_SUBTYPES = frozenset({"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})

EXACT_FORMATS = frozenset({"WAV", "WAVEX", "RAW", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC"})
"""Where a seek lands on the very samples that decoding from the start yields; in mp3, ogg and opus it does not."""

RAW_STREAMS = frozenset({"mp3", "aac", "ac3", "eac3", "mpeg", "mpegts"})
"""FFmpeg's formats that are a stream of frames, each with a mark at which a decoder finds its feet again."""

LONGEST_SHORTFALL_S = 1.0
"""A file that ends sooner than its header says by more than this is truncated; headers that count a few frames too many are common."""

CONVERT = "convert it, e.g. `ffmpeg -i IN OUT.flac`"

Decode = Callable[[int, int | None], Iterator[np.ndarray]]
"""Start and end -> blocks (frames, channels). Where there is no exact seek, the start is always 0; the last block may go beyond the end."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a recording says."""

    format: str
    rate: int
    channels: int
    duration_s: float | None
    """Exact where `exact_seek`; elsewhere what the header claims or the bit rate suggests, None where they don't."""
    exact_seek: bool
    """Whether frames can be read from anywhere; if not, all before them is decoded and dropped."""


@dataclass(frozen=True, eq=False)
class OpenAudio:
    """A recording while it is open."""

    name: str
    info: AudioInfo
    decode: Decode

    def frames(self, start: int = 0, end: int | None = None, *, max_s: float | None = None) -> Iterator[np.ndarray]:
        """Frames `start` to `end` or to the last, float32 (frames, channels), full scale +-1, in blocks of up to 4 MB.

        Raises AudioError if the file is damaged, truncated (where its format can tell) or holds none, AudioTooLong beyond `max_s` seconds.
        """
        most = None if max_s is None else int(max_s * self.info.rate)
        position = start if self.info.exact_seek else 0
        for block in self.decode(position, end):
            wanted = block[max(0, start - position) : None if end is None else max(0, end - position)]
            position += len(block)
            if most is not None and position > most and (end is None or end > most):
                raise AudioTooLong(f"{self.name}: over the limit of {max_s:g} s of audio: cut it")
            if len(wanted):
                yield wanted
            if end is not None and position >= end:
                return
        if not position:
            raise AudioError(f"{self.name}: holds no audio: fetch or record it again")


@contextlib.contextmanager
def open_audio(source: AudioSource, *, name: str | None = None) -> Iterator[OpenAudio]:
    """Open a recording; of a video, its main audio stream. `name` is what messages call it, by default its path.

    Raises AudioError if the source is missing, not readable as audio, or of a rate or channels that no recording has.
    """
    with open_source(source, name=name) as file, contextlib.ExitStack() as stack:
        info, decode = _by_libsndfile(file, stack) or _by_ffmpeg(file, stack)
        if not (1_000 <= info.rate <= 1_000_000 and 1 <= info.channels <= 64):
            raise AudioError(
                f"{file.source}: its header states {info.channels} channels at {info.rate} Hz: fetch or record it again"
            )
        yield OpenAudio(file.source, info, decode)


class _InOrder(soundfile.SoundFile):
    """Reads without seeking: soundfile seeks after every read of a file that can be sought, and an mp3 comes out different."""

    def seekable(self) -> bool:
        return False

    @property
    def exact(self) -> bool:
        return super().seekable() and self.format in EXACT_FORMATS


def _by_libsndfile(file: SourceFile, stack: contextlib.ExitStack) -> tuple[AudioInfo, Decode] | None:
    """None if libsndfile does not know the format, or would not read all of the file."""
    try:
        sound = _InOrder(file)
    except soundfile.LibsndfileError:
        file.check()
        return None
    stack.enter_context(sound)
    kind = sound.format.lower()
    if kind in ("wav", "wavex") and (not sound.frames or file.size >= 2**32):
        sound, file = _without_length(sound, file)
        stack.enter_context(sound)
    if not _reads_all(sound, file):
        return None
    info = AudioInfo(kind, sound.samplerate, sound.channels, sound.frames / sound.samplerate, sound.exact)
    return info, functools.partial(_libsndfile_blocks, sound, file)


def _libsndfile_blocks(sound: _InOrder, file: SourceFile, start: int, end: int | None) -> Iterator[np.ndarray]:
    position, most = start, BLOCK_SAMPLES // sound.channels
    stop = sound.frames if end is None else min(end, sound.frames)
    try:
        if 0 < start < stop:
            sound.seek(start)
        while position < stop and len(block := sound.read(min(most, stop - position), dtype="float32", always_2d=True)):
            file.check()
            position += len(block)
            yield block
    except soundfile.LibsndfileError as error:
        raise _damaged(
            file, position / sound.samplerate, error.error_string.rstrip(".").removeprefix("Error : ")
        ) from error
    file.check()
    if position < stop and sound.frames - position > LONGEST_SHORTFALL_S * sound.samplerate:
        raise _damaged(file, position / sound.samplerate, f"it should hold {sound.frames / sound.samplerate:.1f} s")


def _without_length(wav: _InOrder, file: SourceFile) -> tuple[_InOrder, SourceFile]:
    """A wav whose header does not state its length (from a pipe) or can't (over 4 GB): all that follows the head of its data."""
    place = file.tell()
    start = wav_data_start(file)
    if start is None or wav.subtype not in RAW_SUBTYPES:
        file.seek(place)
        return wav, file
    data = file.after(start)
    return _InOrder(data, "r", wav.samplerate, wav.channels, wav.subtype, "LITTLE", "RAW"), data


def _reads_all(sound: _InOrder, file: SourceFile) -> bool:
    """Whether libsndfile knows how much there is: it reads no further than it believes the file to go, and does not say so."""
    place = file.tell()  # from where libsndfile goes on to read
    try:
        if not 0 < sound.frames <= file.size * 10_000:  # a header without a length counts as 2^63 - 1
            return False
        match sound.format:
            case "MP3":
                return mp3_is_counted(file)
            case "OGG":
                return ogg_is_one_stream(file)
        return True
    finally:
        file.seek(place)


def _by_ffmpeg(file: SourceFile, stack: contextlib.ExitStack) -> tuple[AudioInfo, Decode]:
    import av  # here, because most audio does without its 100 MB

    file.seek(0)
    options = {"protocol_whitelist": "none"}  # a playlist may name files and servers: nothing but the source is opened
    try:
        container = stack.enter_context(av.open(file, "r", container_options=options, metadata_errors="ignore"))
        stream: Any = container.streams.best("audio")
    except av.FFmpegError as error:
        file.check()
        raise AudioError(f"{file.source}: not readable as audio ({error.strerror}): {CONVERT}") from error
    if not container.streams.audio:
        raise AudioError(f"{file.source}: holds no audio ({container.format.name}): leave it out")
    if stream is None or stream.codec_context is None:
        raise AudioError(f"{file.source}: no audio in it that FFmpeg decodes ({container.format.name}): {CONVERT}")
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    duration_s = container.duration / 1e6 if container.duration is not None else None
    if stream.duration is not None:
        duration_s = float(stream.duration * stream.time_base)
    info = AudioInfo(
        container.format.name,
        stream.codec_context.sample_rate,
        stream.codec_context.channels,
        duration_s,
        exact_seek=False,
    )
    return info, lambda start, end: _ffmpeg_blocks(container, stream, info, file)


def _ffmpeg_blocks(container: Any, stream: Any, info: AudioInfo, file: SourceFile) -> Iterator[np.ndarray]:
    import av

    fifo: Any = av.AudioFifo()
    position, clock = 0, Fraction(1, info.rate)
    try:
        for frame in _alike(_decoded(container, stream), stream.codec_context.layout, info.rate):
            position += frame.samples
            frame.pts, frame.time_base = None, clock
            fifo.write(frame)
            if fifo.samples >= BLOCK_SAMPLES // info.channels:
                yield _samples(fifo.read())
        if position and fifo.samples:
            yield _samples(fifo.read())
    except av.FFmpegError as error:
        raise _damaged(file, position / info.rate, str(error.strerror)) from error
    file.check()


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames as they come. Between the frames of a raw stream there may be tags and the stumps of a cut, which are left out."""
    import av

    junk = 0
    for count, packet in enumerate(container.demux(stream)):
        try:
            yield from packet.decode()
        except av.InvalidDataError:
            junk += 1
            if container.format.name not in RAW_STREAMS or junk > max(10, count // 10):
                raise


def _alike(frames: Iterator[Any], layout: Any, rate: int) -> Iterator[Any]:
    """Frames in float32; where a joined file changes its channels or rate, converted to those that it began with."""
    import av

    # In planes where PyAV can: it looks for planes beyond the last of more than 8, and crashes.
    kind = "fltp" if layout.nb_channels <= 8 else "flt"
    for _, run in itertools.groupby(
        frames, key=lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)
    ):
        resampler = av.AudioResampler(format=kind, layout=layout, rate=rate)
        for frame in itertools.chain(run, [None]):
            yield from filter(None, resampler.resample(frame))


def _samples(frame: Any) -> np.ndarray:
    """(frames, channels), from planes or interleaved."""
    samples = frame.to_ndarray()
    return np.ascontiguousarray(samples.T) if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)


def _damaged(file: SourceFile, at_s: float, reason: str) -> AudioError:
    """The error for a file that stops decoding. Raises it for one that stopped being read."""
    file.check()
    return AudioError(f"{file.source}: damaged or truncated at {at_s:.1f} s ({reason}): fetch it again, or {CONVERT}")


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
