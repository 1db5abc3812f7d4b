"""Decode any audio file into blocks of float32 frames, in order and in bounded memory.

libsndfile decodes what it reads to the end: wav, flac, aiff, caf, au, w64, rf64, ogg, opus, mp3. FFmpeg (PyAV) decodes
all else: m4a, mp4, webm, aac, wma, video, and files of the former kinds that libsndfile would end early. Frames are
counted at the source's own rate.
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
"""Samples of a block, all channels together: 4 MB."""

RAW_SUBTYPES = frozenset({"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})

EXACT_FORMATS = frozenset({"WAV", "WAVEX", "RAW", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC"})
"""Formats in which a seek lands on the very samples that decoding from the start yields; mp3, ogg and opus are not
such."""

RAW_STREAMS = frozenset({"mp3", "aac", "ac3", "eac3", "mpeg", "mpegts"})
"""Formats of FFmpeg that are a stream of frames, each with a sync word by which a decoder recovers after junk."""

LONGEST_SHORTFALL_S = 1.0
"""A file that ends sooner than its header says by more than this is truncated; headers that count a few frames too many
are common."""

CONVERT = "convert it, e.g. `ffmpeg -i IN OUT.flac`"

Decode = Callable[[int, int | None], Iterator[np.ndarray]]
"""(start, end) -> blocks (frames, channels). Without exact seek the start is always 0; the last block may go beyond the
end."""


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

    def frames(self, start: int = 0, end: int | None = None, *, max_s: float | None = None) -> Iterator[np.ndarray]:
        """Decode frames `start` to `end` or to the last, in blocks of up to 4 MB.

        Blocks are float32 (frames, channels), full scale +-1. Raises AudioError if the file is damaged, truncated
        (where its format can tell) or empty, AudioTooLong beyond `max_s` seconds.
        """
        max_frames = None if max_s is None else int(max_s * self.info.rate)
        position = start if self.info.exact_seek else 0
        for block in self.decode(position, end):
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


def _damaged(file: SourceFile, at_s: float, reason: str) -> AudioError:
    """Make the error for a file that stops decoding; raises the file's own error if it could not be read."""
    file.check()
    return AudioError(f"{file.label}: damaged or truncated at {at_s:.1f} s ({reason}): fetch it again, or {CONVERT}")


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
    kind = sound.format.lower()
    if kind in ("wav", "wavex") and (not sound.frames or file.size >= 2**32):
        sound, file = _open_wav_without_length(sound, file)
        stack.enter_context(sound)
    # libsndfile silently reads no further than it believes the file to go.
    states_length = {"MP3": _mp3_states_length, "OGG": _ogg_is_one_stream}.get(sound.format, lambda file: True)
    position = file.tell()  # libsndfile goes on to read from here.
    # A header without a length counts as 2^63 - 1 frames.
    if not 0 < sound.frames <= file.size * 10_000 or not states_length(file):
        return None
    file.seek(position)
    is_exact = soundfile.SoundFile.seekable(sound) and sound.format in EXACT_FORMATS
    info = AudioInfo(kind, sound.samplerate, sound.channels, sound.frames / sound.samplerate, is_exact)
    return info, functools.partial(_libsndfile_blocks, sound, file)


def _libsndfile_blocks(sound: _SequentialFile, file: SourceFile, start: int, end: int | None) -> Iterator[np.ndarray]:
    position, block_frames = start, BLOCK_SAMPLES // sound.channels
    stop = sound.frames if end is None else min(end, sound.frames)
    read = functools.partial(sound.read, dtype="float32", always_2d=True)
    try:
        if 0 < start < stop:
            sound.seek(start)
        while position < stop and len(block := read(min(block_frames, stop - position))):
            file.check()
            position += len(block)
            yield block
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".").removeprefix("Error : ")
        raise _damaged(file, position / sound.samplerate, reason) from error
    file.check()
    if position < stop and sound.frames - position > LONGEST_SHORTFALL_S * sound.samplerate:
        raise _damaged(file, position / sound.samplerate, f"it should hold {sound.frames / sound.samplerate:.1f} s")


def _open_wav_without_length(wav: _SequentialFile, file: SourceFile) -> tuple[_SequentialFile, SourceFile]:
    """Open a wav whose header lacks its length (from a pipe, or over 4 GB) as raw samples to the end."""
    position = file.tell()
    file.seek(12)
    for _ in range(100 if wav.subtype in RAW_SUBTYPES else 0):
        head = file.read(8)
        if head.startswith(b"data") and file.tell() < file.size:
            data = file.after(file.tell())
            return _SequentialFile(data, "r", wav.samplerate, wav.channels, wav.subtype, "LITTLE", "RAW"), data
        length = int.from_bytes(head[4:], "little")
        file.seek(length + length % 2, io.SEEK_CUR)  # Chunks begin at even bytes.
    file.seek(position)
    return wav, file


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


# FFmpeg


def _open_by_ffmpeg(file: SourceFile, stack: contextlib.ExitStack) -> tuple[AudioInfo, Decode]:
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
    duration_s = container.duration / 1e6 if container.duration is not None else None
    if stream.duration is not None:
        duration_s = float(stream.duration * stream.time_base)
    codec = stream.codec_context
    info = AudioInfo(container.format.name, codec.sample_rate, codec.channels, duration_s, exact_seek=False)
    return info, lambda start, end: _ffmpeg_blocks(container, stream, info, file)


def _ffmpeg_blocks(container: Any, stream: Any, info: AudioInfo, file: SourceFile) -> Iterator[np.ndarray]:
    """Decode blocks; where a joined file changes its channels or rate, they are converted to those it began with."""
    import av

    layout, position = stream.codec_context.layout, 0
    # Planar samples are faster, but PyAV crashes on those of more than 8 channels.
    sample_format = "fltp" if layout.nb_channels <= 8 else "flt"
    block: Any = av.AudioFifo()  # a resampler with a frame_size makes blocks too, but takes a fifth more CPU time
    frames = _decode_packets(container, stream)
    try:
        for _, run in itertools.groupby(frames, lambda one: (one.format.name, one.layout.name, one.sample_rate)):
            resampler = av.AudioResampler(sample_format, layout, info.rate)
            for frame in itertools.chain(run, [None]):  # None flushes the resampler.
                for part in filter(None, resampler.resample(frame)):
                    position += part.samples
                    part.pts, part.time_base = None, Fraction(1, info.rate)
                    block.write(part)
                if position and block.samples >= (BLOCK_SAMPLES // info.channels if frame else 1):
                    samples = block.read().to_ndarray()  # (channels, frames) if planar, else (1, frames * channels)
                    yield np.ascontiguousarray(samples.T) if len(samples) > 1 else samples.reshape(-1, info.channels)
    except av.FFmpegError as error:
        raise _damaged(file, position / info.rate, str(error.strerror)) from error
    file.check()


def _decode_packets(container: Any, stream: Any) -> Iterator[Any]:
    """Decode frames as they come.

    Raw streams may hold tags and the stumps of cut frames between frames; those are left out.
    """
    import av

    junk = 0
    for count, packet in enumerate(container.demux(stream)):
        try:
            yield from packet.decode()
        except av.InvalidDataError:
            junk += 1
            if container.format.name not in RAW_STREAMS or junk > max(10, count // 10):
                raise
