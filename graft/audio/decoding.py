"""Decode any audio file into blocks of float32 frames, in order and in bounded memory.

libsndfile decodes what it reads to the end: wav, flac, aiff, caf, au, w64, rf64, ogg, opus, mp3. FFmpeg (PyAV) decodes
all else: m4a, mp4, webm, aac, wma, video, files of the former kinds that libsndfile would end early, and damaged ones
behind the damage. Frames are counted at the source's own rate, from the start of the media.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graft.audio.audio_info import AudioInfo, AudioTrack, Decode, DefectLog
from graft.audio.defects import SEVERAL_TRACKS, AudioDefect
from graft.audio.ffmpeg import open_by_ffmpeg
from graft.audio.libsndfile import open_by_libsndfile
from graft.errors import AudioError, AudioTooLong
from graft.storage.source import AudioSource, open_source


@dataclass(frozen=True, eq=False)
class OpenAudio:
    """A recording while it is open."""

    name: str
    info: AudioInfo
    decode: Decode
    track: AudioTrack | None = None

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
        if self.info.track_count > 1 and self.track is None:
            log.note(SEVERAL_TRACKS, 0.0, 0.0)
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
def open_audio(source: AudioSource, *, name: str | None = None, track: AudioTrack | None = None) -> Iterator[OpenAudio]:
    """Open a recording; of several audio tracks, `track`, or else the one that the file marks as default, or the first.

    `name` is what messages call it, by default its path. Raises AudioError if the source is missing, not readable as
    audio, or of a rate or channels that no recording has, and its subclass AudioTrackError if it lacks the track.
    """
    track = int(track) if isinstance(track, str) and track.isdecimal() else track
    with open_source(source, name=name) as file, contextlib.ExitStack() as stack:
        opened = open_by_libsndfile(file, stack) if track in (None, 1) else None  # whose formats have one track
        info, decode = opened or open_by_ffmpeg(file, stack, track)
        if not (1_000 <= info.rate <= 1_000_000 and 1 <= info.channels <= 64):
            raise AudioError(
                f"{file.label}: its header states {info.channels} channels at {info.rate} Hz: fetch or record it again"
            )
        yield OpenAudio(file.label, info, decode, track)
