"""Read the clips of rows: decode each audio file once, check it, and cut its parts out in one pass over it.

    rows of a file -> the file, opened once -> a Clip for each row: its seconds and its bytes, or what is wrong with it
    rows of a batch -> their clips -> checks -> rows with durations, and copies of clips that are no local files

A file is decoded for its length in 16 kHz and its faults; what a corpus holds is the file as it is, or a part as FLAC.
"""

import contextlib
import functools
import io
import itertools
import socket
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import soundfile

from graft.audio.clip import SAMPLE_RATE, check_finite, not_finite, resampled_count
from graft.audio.decoding import OpenAudio, open_audio
from graft.errors import AudioError, OutputError
from graft.storage.local_paths import local_path
from graft.storage.locations import is_unreachable, one_line_error
from graft.storage.source import AudioSource, SourceFile, open_source
from graft.text.characters import display_columns

from .audio_places import AudioPlace, AudioReader
from .manifests import LONGEST_S, DroppedLine, Row

LENGTH_TOLERANCE_S = 0.1
"""Largest difference between the length of a file in its manifest and in its header."""
MOST_HELD_BYTES = 64 * 2**20
"""Largest file that is fetched whole before it is decoded; longer ones are decoded by ranges."""
SEEK_S = 5.0
"""Shortest time between two parts that is skipped in a file of which any frame can be read."""
FETCHES = 8
"""Files of a batch that are fetched at a time over a network, where most of the time is waiting."""


@dataclass(frozen=True)
class ClipLimits:
    """The clips that are kept."""

    min_duration_s: float
    max_duration_s: float
    max_chars_per_s: float


@dataclass(frozen=True, eq=False)
class Clip:
    """The audio of a row."""

    duration_s: float
    """Seconds of its samples at 16 kHz; of a clip over the limit, those by its header."""
    content: bytes | None = None
    """The file, or the part of one as FLAC; None of a clip over the limit."""
    is_part: bool = False


@dataclass(frozen=True, slots=True)
class Unreached:
    """A row whose audio could not be fetched now, and the line that is dropped where that lasts."""

    row: Row
    dropped: DroppedLine


def row_audio(row: Row) -> tuple[bytes, str]:
    """Return the row's audio file or, if the row is a part of it, that part as FLAC, and the name of either.

    Raises AudioError for a file that cannot be decoded, and for times beyond its end.
    """
    ((_, clip),) = read_clips([row], AudioReader())
    if isinstance(clip, AudioError):
        raise clip
    if clip.content is None:
        raise AudioError(f"{row.audio}: {clip.duration_s:.0f} s are no clip: correct the manifest")
    return clip.content, _name(row, clip)


def stored_clip(row: Row, reader: AudioReader) -> tuple[bytes, str]:
    """Return the audio of a row that a ClipChecker has read, as a file, and that file's name. Raises AudioError."""
    place = row.copy or row.audio
    with reader.open(place) as file:
        return _content(file), place.name


def _name(row: Row, clip: Clip) -> str:
    return f"{PurePosixPath(row.audio.name).stem}.flac" if clip.is_part else row.audio.name


def read_clips(
    rows: Sequence[Row], reader: AudioReader, *, max_s: float = LONGEST_S
) -> Iterator[tuple[Row, Clip | AudioError]]:
    """Read the clips of rows of one file in the order in which it is decoded; clips over `max_s` are not held.

    A clip that cannot be read is an AudioError.
    """
    left = dict(enumerate(rows))
    error: AudioError
    try:
        with reader.open(rows[0].audio) as file:
            for index, clip in _clips_of(file, rows, max_s):
                del left[index]
                yield rows[index], clip
        return
    except AudioError as fault:
        error = fault
    except Exception as fault:  # what else a decoder raises is wrong with this file, and not with the others
        error = AudioError(f"{rows[0].audio}: reading it failed: {type(fault).__name__}: {one_line_error(fault)}")
    for row in left.values():
        yield row, error


def _clips_of(file: SourceFile, rows: Sequence[Row], max_s: float) -> Iterator[tuple[int, Clip | AudioError]]:
    """Read the clips of a file's rows by their indices. Raises AudioError for what is wrong with all that are left."""
    content = _content(file) if file.size <= MOST_HELD_BYTES else None
    source: AudioSource = file if content is None else content
    whole, parts = list[int](), list[int]()
    with open_audio(source, name=file.label) as audio:
        stated_s = audio.info.duration_s
        file_s = stated_s if stated_s is not None and stated_s < LONGEST_S else None
        for index, row in enumerate(rows):
            clip_s = max(0.0, (file_s or 0.0) - row.offset_s) if row.length_s is None else row.length_s
            if clip_s > max_s:  # hours of audio are not decoded only to be dropped
                yield index, Clip(clip_s)
            else:
                (parts if _is_part(row, file_s) else whole).append(index)
        if whole:
            clip = _whole_clip(audio, file, content, max_s)
            yield from ((index, clip) for index in whole)
    if parts:
        yield from _cut_parts(source, file.label, {index: rows[index] for index in parts}, max_s)


def _content(file: SourceFile) -> bytes:
    file.seek(0)
    content = file.read()
    file.check()
    return content


def _is_part(row: Row, file_s: float | None) -> bool:
    if row.offset_s or row.length_s is None:
        return bool(row.offset_s)
    return file_s is None or file_s - row.length_s > LENGTH_TOLERANCE_S


def _whole_clip(audio: OpenAudio, file: SourceFile, content: bytes | None, max_s: float) -> Clip | AudioError:
    """Decode all of a file to check it."""
    name, count, is_finite = file.label, 0, True
    try:
        for block in audio.frames():
            count += len(block)
            is_finite = is_finite and bool(np.isfinite(block).all())
        duration_s = _seconds(count, audio.info.rate, name)
        if not is_finite:
            raise not_finite(name)
        if duration_s > max_s:
            return Clip(duration_s)
        return Clip(duration_s, _content(file) if content is None else content)
    except AudioError as error:
        return error


def _seconds(count: int, rate: int, name: str) -> float:
    """Return the seconds that frames last at 16 kHz. Raises AudioError where they are none."""
    samples = resampled_count(count, rate)
    if not samples:
        raise AudioError(f"{name}: holds no audio (under 1 sample at 16 kHz): fetch or record it again")
    return samples / SAMPLE_RATE


# Parts of files


class _Span:
    """A part of a file: its frames, as far as they are decoded."""

    def __init__(self, index: int, row: Row, rate: int, max_s: float) -> None:
        self.index, self.row, self.rate, self.max_s = index, row, rate, max_s
        self.start = round(row.offset_s * rate)
        self.end = None if row.length_s is None else self.start + round(row.length_s * rate)
        self.clear()

    def clear(self) -> None:
        """Forget the frames."""
        self.blocks: list[np.ndarray] = []
        self.count = 0

    def add(self, block: np.ndarray, position: int) -> None:
        """Take the part's frames out of a block (frames, channels) that begins at frame `position`."""
        wanted = block[max(0, self.start - position) : None if self.end is None else self.end - position]
        self.count += len(wanted)
        if self.count <= (self.max_s + 1) * self.rate:
            self.blocks.append(wanted)
        else:
            self.blocks = []  # it is only counted on

    def clip(self, name: str, *, is_deep: bool) -> Clip | AudioError:
        """Encode the part at the file's own rate and channels, in 16 bits or, if it `is_deep`, in 24."""
        row = self.row
        try:
            if not self.count or (
                self.end is not None and self.start + self.count < self.end - LENGTH_TOLERANCE_S * self.rate
            ):
                length = "goes to its end" if row.length_s is None else f"lasts {row.length_s:g} s"
                raise AudioError(
                    f"{name}: ends before the clip that begins at {row.offset_s:g} s and {length}: correct the manifest"
                )
            duration_s = _seconds(self.count, self.rate, name)
            if duration_s > self.max_s:
                return Clip(duration_s)
            samples = np.concatenate(self.blocks)
            check_finite(samples, name)
            clip = io.BytesIO()
            soundfile.write(clip, samples, self.rate, format="FLAC", subtype="PCM_24" if is_deep else "PCM_16")
            return Clip(duration_s, clip.getvalue(), is_part=True)
        except soundfile.LibsndfileError as error:  # FLAC has at most 8 channels, and rates up to 655,350 Hz
            return AudioError(f"{name}: a part of it cannot be written as FLAC ({error.error_string}): convert it")
        except AudioError as error:
            return error


def _cut_parts(
    source: AudioSource, name: str, rows: dict[int, Row], max_s: float
) -> Iterator[tuple[int, Clip | AudioError]]:
    """Cut parts out of a file, in one pass or, where any frame can be read, in one for each stretch of near parts."""
    with open_audio(source, name=name) as audio:
        info = audio.info
    is_deep = _is_deep(source)
    spans = sorted((_Span(index, row, info.rate, max_s) for index, row in rows.items()), key=lambda span: span.start)
    stretch: list[_Span] = []
    reach = 0.0  # the frame up to which the stretch goes
    for span in spans:
        if stretch and info.exact_seek and span.start > reach + SEEK_S * info.rate:
            yield from _cut_stretch(source, name, stretch, info.exact_seek, is_deep)
            stretch, reach = [], 0.0
        stretch.append(span)
        reach = max(reach, float("inf") if span.end is None else span.end)
    yield from _cut_stretch(source, name, stretch, info.exact_seek, is_deep)


def _cut_stretch(
    source: AudioSource, name: str, spans: Sequence[_Span], can_seek: bool, is_deep: bool
) -> Iterator[tuple[int, Clip | AudioError]]:
    """Cut parts, ordered by their starts, out of a file that is decoded from the first start to the last end."""
    waiting, begun = deque(spans), list[_Span]()
    ends = [span.end for span in spans]
    stop = None if None in ends else max(end for end in ends if end is not None)
    position = spans[0].start
    try:
        with open_audio(source, name=name) as audio:
            for block in audio.frames(position, stop):
                while waiting and waiting[0].start < position + len(block):
                    begun.append(waiting.popleft())
                for span in begun:
                    span.add(block, position)
                position += len(block)
                done = [span for span in begun if span.end is not None and span.end <= position]
                begun = [span for span in begun if span not in done]
                yield from ((span.index, span.clip(name, is_deep=is_deep)) for span in done)
    except AudioError as error:
        for span in (*begun, *waiting):
            if can_seek and len(spans) > 1:  # what lies behind the damage may be read by itself
                span.clear()
                yield from _cut_stretch(source, name, [span], can_seek, is_deep)
            else:
                yield span.index, error
        return
    yield from ((span.index, span.clip(name, is_deep=is_deep)) for span in (*begun, *waiting))


def _is_deep(source: AudioSource) -> bool:
    """Tell whether a file holds more than 16 bits a sample; lossy formats count as 16."""
    with open_source(source) as file:
        try:
            return soundfile.info(file).subtype in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")
        except soundfile.LibsndfileError:
            return False


# Batches


class ClipChecker:
    """Reads the clips of a batch of rows, and checks them.

    Clips that are no local files of their own are copied into a file of the batch in `folder`. `home` is the folder
    that relative paths begin at; `threads` read local files at a time.
    """

    def __init__(self, limits: ClipLimits, folder: Path, home: str, threads: int = 1) -> None:
        self._limits, self._folder, self._home, self._threads = limits, folder, home, threads

    def __call__(self, rows: Sequence[Row]) -> list[Row | DroppedLine | Unreached]:
        """Return the rows with their durations and copies, or why they are dropped, in any order.

        Raises OutputError where the folder is not seen.
        """
        if not self._folder.is_dir():
            raise OutputError(
                f"{socket.gethostname()} does not see the folder {self._folder.parent}: give out= a folder that every "
                "machine of the cluster sees"
            )
        files = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.audio.uri)]
        is_remote = any(local_path(row.audio.uri) is None for row in rows)
        threads = min(len(files), max(self._threads, FETCHES if is_remote else 1))
        with _Copies(self._folder / f"{uuid.uuid4().hex}.clips") as copies:
            read = functools.partial(self._read_file, copies)
            if threads == 1:
                return [result for file in files for result in read(file)]
            with ThreadPoolExecutor(threads) as pool:
                return [result for results in pool.map(read, files) for result in results]

    def _read_file(self, copies: "_Copies", rows: Sequence[Row]) -> list[Row | DroppedLine | Unreached]:
        """Read the rows of one file, each of its places once."""
        with contextlib.closing(AudioReader(self._home)) as reader:
            return [
                self._checked(row, clip, copies)
                for _, group in itertools.groupby(rows, key=lambda row: row.audio)
                for row, clip in read_clips(list(group), reader, max_s=self._limits.max_duration_s)
            ]

    def _checked(self, row: Row, clip: Clip | AudioError, copies: "_Copies") -> Row | DroppedLine | Unreached:
        limits = self._limits
        if isinstance(clip, AudioError):
            if is_unreachable(clip):
                return Unreached(row, row.dropped("unreachable audio", str(clip)))
            return row.dropped("unreadable audio", str(clip))
        seconds, length = clip.duration_s, display_columns(row.text)
        if seconds > limits.max_duration_s:
            return row.dropped("too long", f"{seconds:.3f} s, at most {limits.max_duration_s:g} s")
        if seconds < limits.min_duration_s:
            return row.dropped("too short", f"{seconds:.3f} s, at least {limits.min_duration_s:g} s")
        if length > limits.max_chars_per_s * seconds:
            rate = f"{length} characters in {seconds:.3f} s, at most {limits.max_chars_per_s:g} per second"
            return row.dropped("speech rate", rate)
        is_own_file = row.audio.row is None and local_path(row.audio.uri) is not None
        if clip.content is None or (is_own_file and not clip.is_part):
            return replace(row, duration_s=seconds)
        return replace(row, duration_s=seconds, copy=copies.add(clip.content, _name(row, clip)))


class _Copies:
    """A file of clips, one after the other, which is made when the first clip is added. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_Copies":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, content: bytes, name: str) -> AudioPlace:
        """Append a clip; returns its place."""
        with self._lock:
            self._file = self._file or self._path.open("xb")
            start = self._file.tell()
            self._file.write(content)
        return AudioPlace(str(self._path), name, start, len(content))
