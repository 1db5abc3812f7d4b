"""Decode by FFmpeg (PyAV): m4a, mp4, webm, aac, wma, video, and what libsndfile would end early or fail on."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from graft.audio.audio_info import (
    BLOCK_SAMPLES,
    CONVERT,
    LONGEST_SHORTFALL_S,
    AudioInfo,
    AudioTrack,
    Decode,
    DefectLog,
)
from graft.audio.defects import HEADER_MISMATCH, TRUNCATED_FILE
from graft.audio.mp4 import cut_box, index_fault, is_encrypted, part_starts
from graft.audio.ogg import is_ended, link_starts
from graft.audio.timeline import on_timeline
from graft.errors import AudioError, AudioTrackError
from graft.storage.source import SourceFile

RAW_STREAMS = frozenset({"mp3", "aac", "ac3", "eac3", "mpeg", "mpegts"})
"""Formats of FFmpeg that are a stream of frames, each with a sync word by which a decoder recovers after junk."""

SKIPPED_BYTES = 1000
"""Bytes between two packets that are more than their headers."""

GAPLESS = frozenset({"ogg", "flac"})
"""Formats of FFmpeg in which a gap of the timestamps is a loss."""

TIMELESS = frozenset({"mp3", "aac", "ac3", "eac3"})
"""Formats of FFmpeg whose timestamps are only counted, and whose durations are only estimated."""

TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")
"""First bytes of what may stand between the frames of joined MP3s without having replaced sound."""

SAME_LANGUAGE = (
    *("alb sqi", "arm hye", "baq eus", "bur mya", "chi zho", "cze ces", "dut nld", "fre fra", "geo kat", "ger deu"),
    *("gre ell", "ice isl", "mac mkd", "mao mri", "may msa", "per fas", "rum ron", "slo slk", "tib bod", "wel cym"),
)
"""The languages that have two codes in ISO 639-2, one for libraries and one for terminology; files write either."""


def open_by_ffmpeg(
    file: SourceFile, stack: contextlib.ExitStack, track: AudioTrack | None = None
) -> tuple[AudioInfo, Decode]:
    container, stream = _open_container(file, stack, track)
    starts = _part_starts(container, file)
    stated_s = None if len(starts) > 1 else _stated_end_s(container, stream, _origin_s(container))
    duration_s = stated_s
    if duration_s is None and container.duration is not None and len(starts) <= 1:
        duration_s = container.duration / 1e6
    codec = stream.codec_context
    info = AudioInfo(
        container.format.name, codec.sample_rate, codec.channels, duration_s, False, len(container.streams.audio)
    )
    return info, lambda start, end, log: _decode(container, stream, info, file, stated_s, log)


def _open_container(file: SourceFile, stack: contextlib.ExitStack, track: AudioTrack | None = None) -> tuple[Any, Any]:
    """Return a container and one audio stream of it. Raises AudioError if there is none that FFmpeg decodes."""
    import av  # This import is local because most audio does without its 100 MB.

    try:
        container = stack.enter_context(_open_file(file))
    except av.FFmpegError as error:
        file.check()
        if (place := cut_box(file)) and not index_fault(file):  # A fragment's own index is cut off.
            return _open_container(file.before(place), stack, track)
        if fault := index_fault(file):
            raise AudioError(f"{file.label}: {fault}: fetch or record it again") from error
        if other := _other_content(file):
            raise AudioError(f"{file.label}: is {other}, not audio: fetch it again") from error
        file.check()
        raise AudioError(f"{file.label}: not readable as audio ({error.strerror}): {CONVERT}") from error
    if not container.streams.audio:
        raise AudioError(f"{file.label}: holds no audio ({container.format.name}): leave it out")
    stream = _track(container, file.label, track)
    if stream is None:
        raise AudioError(f"{file.label}: no audio in it that FFmpeg decodes ({container.format.name}): {CONVERT}")
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    return container, stream


def _other_content(file: SourceFile) -> str | None:
    """Say what a file is that a server or a copy has left in the place of audio; None if that is not known."""
    file.seek(0)
    head = file.read(2**16)
    if not any(head):
        return "nothing but zeros at its start"
    if re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|\?xml)", head, re.IGNORECASE):
        return "a web page or XML"
    return "a pointer of Git LFS" if head.startswith(b"version https://git-lfs") else None


def _open_file(file: SourceFile) -> Any:
    import av

    file.seek(0)
    options = {"protocol_whitelist": "none"}  # A playlist may name files and servers: nothing but the source is opened.
    return av.open(file, "r", container_options=options, metadata_errors="ignore")


def _part_starts(container: Any, file: SourceFile) -> list[int]:
    """Return where each recording begins of those that are joined in a file, as far as FFmpeg reads only the first."""
    if container.format.name.startswith("mov,"):
        return part_starts(file)
    return link_starts(file) if container.format.name == "ogg" else []


def _track(container: Any, label: str, track: AudioTrack | None) -> Any | None:
    """Return the audio stream of a track; without one, the first of those that are marked as default, or the first.

    Returns None where none can be decoded. Raises AudioTrackError where there is no such track.
    """
    from av.stream import Disposition

    streams = container.streams.audio
    if isinstance(track, int):
        found = [*streams[track - 1 : track]]
    elif track is not None:
        found = [one for one in streams if _language(one.language) == _language(track)]
    else:
        # One that holds nothing, and one for the hard of hearing or the blind, are taken last.
        lesser = Disposition.hearing_impaired | Disposition.visual_impaired | Disposition.comment
        ranks = (
            (one.duration != 0, not one.disposition & lesser, bool(one.disposition & Disposition.default))
            for one in streams
        )
        ranked = zip(ranks, streams, strict=True)
        decodable = [(rank, one) for rank, one in ranked if one.codec_context is not None and one.sample_rate]
        return max(decodable, key=lambda pair: pair[0])[1] if decodable else None
    if not found:
        listed = ", ".join(
            f"{number} ({', '.join(filter(None, (one.language, one.metadata.get('title'))))})".removesuffix(" ()")
            for number, one in enumerate(streams, start=1)
        )
        raise AudioTrackError(f"{label}: has no audio track {track}: give one of its tracks {listed}")
    return found[0] if found[0].codec_context is not None else None


def _language(name: str | None) -> str:
    """Return a language's code without its region, in lower case, and one code for those that have two."""
    code = (name or "").lower().partition("-")[0]
    return next((pair for pair in SAME_LANGUAGE if code in pair.split()), code)


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
    if container.format.name == "caf" and stream.frames and stream.codec_context.name.startswith("pcm_"):
        return float(stream.frames / stream.sample_rate)  # FFmpeg's duration is that of the samples that are there.
    if stream.duration is not None:
        start_s = stream.start_time * stream.time_base - origin_s if stream.start_time is not None else 0
        return float(start_s + stream.duration * stream.time_base)
    if len(container.streams) == 1:
        return None if container.duration is None else container.duration / 1e6 - float(origin_s)
    found = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # of Matroska's streams
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) - float(origin_s) if found else None


def decode_from(position: int, file: SourceFile, info: AudioInfo, log: DefectLog) -> Iterator[np.ndarray]:
    """Decode by FFmpeg what follows the frames that libsndfile has decoded."""
    skipped = position
    with contextlib.ExitStack() as stack:
        container, stream = _open_container(file, stack)
        for block in _decode(container, stream, info, file, info.duration_s, log):
            if len(rest := block[skipped:]):
                yield rest
            skipped -= len(block) - len(rest)


def _decode(
    container: Any, stream: Any, info: AudioInfo, file: SourceFile, stated_s: float | None, log: DefectLog
) -> Iterator[np.ndarray]:
    """Decode blocks; where a joined file changes its channels or rate, they are converted to those it began with."""
    import av

    layout, position = stream.codec_context.layout, 0
    # Planar samples are faster, but PyAV crashes on those of more than 8 channels.
    is_planar = layout.nb_channels <= 8
    block: Any = av.AudioFifo()  # a resampler with a frame_size makes blocks too, but takes a fifth more CPU time
    ending = _Ending()

    def timed(container: Any, stream: Any) -> Iterator[Any]:
        start_s = position / info.rate
        return on_timeline(
            _decode_packets(container, stream, ending, log, file),
            (_origin_s(container) or Fraction(0)) if is_planar else None,
            lambda flag, begin_s, end_s: log.add(flag, start_s + begin_s, start_s + end_s),
            is_loss=lambda: container.format.name in GAPLESS or (ending.has_skipped and len(container.streams) == 1),
        )

    def joined(starts: list[int]) -> Iterator[Any]:
        for start, end in itertools.pairwise([*starts, file.size]):
            with contextlib.ExitStack() as stack:
                yield from timed(*_open_container(file.before(end).after(start), stack))

    starts = _part_starts(container, file)
    frames = joined(starts) if len(starts) > 1 else timed(container, stream)
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
    if container.format.name in ("avi", "wav") and _is_cut_riff(file):
        log.add(TRUNCATED_FILE, at_s, max(at_s, stated_s or 0.0), "it should be longer")
    elif stated_s is not None and stated_s - at_s > LONGEST_SHORTFALL_S:
        log.add(TRUNCATED_FILE, at_s, stated_s, ending.reason or f"it should hold {stated_s:.1f} s")
    elif ending.reason and container.format.name not in RAW_STREAMS:
        log.add(TRUNCATED_FILE, at_s, at_s, ending.reason)
    elif container.format.name.startswith("mov,") and cut_box(file) is not None:
        log.add(TRUNCATED_FILE, at_s, at_s, "its last fragment is cut off")
    elif (ending.reason and container.format.name != "mp3") or (container.format.name == "ogg" and not is_ended(file)):
        log.note(TRUNCATED_FILE, at_s, at_s)  # behind an mp3 there may be tags
    elif stated_s is not None and at_s - stated_s > LONGEST_SHORTFALL_S:
        log.add(HEADER_MISMATCH, stated_s, at_s)


def _is_cut_riff(file: SourceFile) -> bool:
    """Whether a file ends before its RIFF chunk does, of which FFmpeg estimates the duration by what is there."""
    file.seek(0)
    head = file.read(8)
    size = int.from_bytes(head[4:], "little")
    return head.startswith(b"RIFF") and file.size + 1 < 8 + size < 2**31 - 2**16


@dataclass
class _Ending:
    """How a stream ended: `reason` says why its last packets are lost."""

    reason: str = ""
    has_skipped: bool = False
    """Whether the demuxer has skipped bytes before the last packet; among several streams, those of others too."""


def _decode_packets(container: Any, stream: Any, ending: _Ending, log: DefectLog, file: SourceFile) -> Iterator[Any]:
    """Decode frames as they come; None stands for a packet that is lost.

    Raw streams may hold tags and the stumps of cut frames between frames; those are left out. In those without
    timestamps, bytes that are no frames and no tag count as sound that they have replaced: frames get times by that.
    """
    import av

    lost, count, seconds, place = 0, 0, 0.0, None
    replaced_s, byte_count, is_timeless = 0.0, 0, container.format.name in TIMELESS
    packets = container.demux(stream)
    while True:
        packet = None  # for a fault of `next`
        try:
            packet = next(packets, None)  # None also after a fault of the container, with which it ends
            if packet is None:
                break
            count += 1
            ending.has_skipped = place is not None and packet.pos is not None and packet.pos - place > SKIPPED_BYTES
            place = packet.pos and packet.pos + packet.size
            for frame in packet.decode():
                if is_timeless:
                    frame.pts = round((seconds + replaced_s) * frame.sample_rate)
                    frame.time_base = Fraction(1, frame.sample_rate)
                seconds += frame.samples / frame.sample_rate
                byte_count += packet.size
                ending.reason = ending.reason if packet.size == 0 else ""  # 0: what the decoder still held
                yield frame
        except IndexError:  # PyAV fails where a stream appears that the header does not name, and can go on.
            packets = container.demux(stream)
        except av.FFmpegError as error:
            ending.reason = str(error.strerror)
            lost += 1
            is_measured = packet is not None and is_timeless and seconds > LONGEST_SHORTFALL_S
            if packet is not None and is_measured and not _is_tag(file, packet.pos or 0):
                replaced_s += packet.size * seconds / byte_count
            if container.format.name not in RAW_STREAMS or lost > max(10, count // 10):
                log.refuse(seconds, ending.reason)
            if log.defects is not None:
                yield None
    if lost > max(10, count // 2):
        if container.format.name.startswith("mov,") and is_encrypted(file):
            raise AudioError(f"{log.label}: its audio is encrypted (DRM): get a copy that is not")
        raise AudioError(f"{log.label}: damaged, {lost} of its {count} packets: fetch it again, or {CONVERT}")


def _is_tag(file: SourceFile, place: int) -> bool:
    position = file.tell()  # A decoder goes on to read from here.
    file.seek(place)
    head = file.read(max(map(len, TAGS)))
    file.seek(position)
    return head.startswith(TAGS)
