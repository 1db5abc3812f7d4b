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
from graft.audio.defects import DAMAGED, SEVERAL_TRACKS, AudioDefect
from graft.audio.ffmpeg import open_by_ffmpeg
from graft.audio.libsndfile import open_by_libsndfile
from graft.errors import AudioError, AudioTooLong
from graft.storage.source import AudioSource, open_source

LARGEST = 2.0**40
"""Samples from which on they are junk, as in damaged float files; full scale is 1, of 32-bit numbers 2^31."""


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
        decoded as far as they go, samples that are no numbers are silent, and what is wrong with the file up to the end
        is added to the list. Raises AudioError if the file is empty or most of it is lost; without the list also if it
        is damaged or truncated (where its format can tell). Raises AudioTooLong beyond `max_s` seconds.
        """
        max_frames = None if max_s is None else int(max_s * self.info.rate)
        position = start if self.info.exact_seek else 0
        log = DefectLog(self.name, defects)
        if self.info.track_count > 1 and self.track is None:
            log.note(SEVERAL_TRACKS, 0.0, 0.0)
        for decoded in self.decode(position, end, log):
            block = decoded if defects is None else _without_junk(decoded, position, self.info.rate, log)
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


def _without_junk(block: np.ndarray, position: int, rate: int, log: DefectLog) -> np.ndarray:
    """Return a block (frames, channels), from frame `position` on, whose samples that cannot be sound are silent."""
    is_sound = np.abs(block) < LARGEST  # false also for NaN
    if is_sound.all():
        return block
    junk = np.flatnonzero(~is_sound.all(axis=1))
    for run in np.split(junk, np.flatnonzero(np.diff(junk) > rate / 10) + 1):  # near ones are one defect
        log.note(DAMAGED, (position + int(run[0])) / rate, (position + int(run[-1]) + 1) / rate)
    return np.where(is_sound, block, np.float32(0))


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
