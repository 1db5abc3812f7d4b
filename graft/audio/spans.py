"""Read spans of a recording, block by block in bounded memory, so that neighbouring spans meet exactly.

Spans are named by frames at the recording's own rate, so neighbours agree on their border to the sample. With quiet
borders they meet where it is quietest near the nominal border, which both find from the same frames. Resampled spans
are cut from the samples of the whole.

    span 1 |=======================~~~|            nominal border: 5 s before to 5 s after it (~) both look for
    span 2                         |~~~~~~===>     the quietest 0.2 s, and meet in their middle
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graft.audio.audio_info import AudioInfo, AudioTrack
from graft.audio.chunking import QUIET_S, SEARCH_S, quietest
from graft.audio.clip import SAMPLE_RATE, check_finite, mix_blocks, mix_window, resample, resampled_count
from graft.audio.decoding import open_audio
from graft.audio.defects import AudioDefect
from graft.storage.source import AudioSource

CONTEXT_S = 0.1
"""Seconds beyond a span that the resampler is given; its filter reaches over some milliseconds."""


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive samples of a recording, float32 (samples,) or (samples, channels), from index `start` on."""

    start: int
    samples: np.ndarray


def probe(source: AudioSource, *, name: str | None = None, track: AudioTrack | None = None) -> AudioInfo:
    """Read a recording's header, which takes milliseconds; `track` is as in read_span. Raises AudioError."""
    with open_audio(source, name=name, track=track) as audio:
        return audio.info


def read_span(
    source: AudioSource,
    start: int = 0,
    end: int | None = None,
    *,
    borders: Literal["exact", "quiet"] = "exact",
    channels: Literal["mix", "split"] = "mix",
    track: AudioTrack | None = None,
    rate: int | None = SAMPLE_RATE,
    max_s: float | None = None,
    name: str | None = None,
    defects: list[AudioDefect] | None = None,
) -> Iterator[Block]:
    """Decode frames `start` to `end` of a recording, or to its last, into blocks in order.

    start, end  in frames at the recording's own rate (`probe`); a span beyond the recording's end has no blocks.
                A header's duration may be wrong: give the last span no end
    borders     quiet: both move by up to 5 s to where it is quietest, except the recording's start;
                such spans last at least 10 s
    channels    mix: their mean, (samples,); split: each by itself, (samples, channels)
    track       the audio track of a file that has several, by number from 1 or by language; None is its default one
    rate        rate of the samples, in which blocks' starts count; None is the recording's own
    max_s       seconds of audio that the recording may hold; a longer one is an error
    defects     a list, to which is added what is found to be wrong: damaged and truncated files are then decoded as far
                as they go, and neighbouring spans may find the same; without it they are errors

    Samples are those of the whole recording, bit by bit where nothing is resampled, else to 3e-7. Formats without exact
    seek are decoded from their start. Raises AudioError as read_audio, ValueError for a span that cannot be.
    """
    with open_audio(source, name=name, track=track) as audio:
        grid = _ResamplingGrid(audio.info.rate, rate or audio.info.rate)
        reach = round(SEARCH_S * audio.info.rate) if borders == "quiet" else 0
        if start < 0 or (end is not None and end - start < 2 * reach):
            raise ValueError(
                f"a span from frame {start} to {end}: starts at 0 or later, and lasts at least {2 * reach} frames"
            )
        context = 0 if grid.from_rate == grid.to_rate else round(CONTEXT_S * grid.from_rate)
        is_mixed = channels == "mix" and audio.info.channels > 1
        # How channels are mixed is decided for whole windows, so the first and the last one are read whole.
        window = mix_window(audio.info.rate, audio.info.channels) if is_mixed else 1
        begin = _floor(grid.floor(start - reach - context), window)
        stop = None if end is None else -_floor(-(end + reach + context), window)
        if stop is not None and end is not None and max_s is not None:
            stop = max(end + reach + context, min(stop, int(max_s * audio.info.rate)))
        frames = audio.frames(begin, stop, max_s=max_s, defects=defects)
        reader = _FrameReader(frames, begin, audio.info.rate, reach)
        first = reader.find_border(start) if start else 0
        for _ in reader.take(_floor(grid.floor(first - context), window)):
            pass
        position = grid.to_sample(reader.position)
        taken = reader.take_span(end, context, window)
        if channels == "mix":
            blocks = mix_blocks(taken, audio.info.rate, start=reader.position, defects=defects)
        else:
            blocks = map(np.ascontiguousarray, taken)
        for samples in resample(blocks, grid.from_rate, grid.to_rate):
            # The context on either side of the span is cut off again.
            skipped = max(0, grid.to_sample(first) - position)
            last = None if reader.last is None else max(0, grid.to_sample(reader.last) - position)
            if len(wanted := samples[skipped:last]):
                check_finite(wanted, audio.name)
                yield Block(position + skipped, wanted)
            position += len(samples)


def _floor(frame: int, window: int) -> int:
    """Return the last start of a window up to a frame."""
    return frame // window * window


@dataclass(frozen=True)
class _ResamplingGrid:
    """The positions of a whole recording's samples against its frames, when it is resampled."""

    from_rate: int
    to_rate: int

    def floor(self, frame: int) -> int:
        """Return the last frame up to this one that coincides with a sample."""
        period = self.from_rate // math.gcd(self.from_rate, self.to_rate)
        return max(0, frame) // period * period

    def to_sample(self, frame: int) -> int:
        """Count the samples before a frame."""
        return resampled_count(frame, self.from_rate, self.to_rate)


class _FrameReader:
    """Reads a recording's frames in order, looking ahead for quiet borders within `reach` of the nominal ones."""

    def __init__(self, blocks: Iterator[np.ndarray], position: int, rate: int, reach: int) -> None:
        self.position = position
        self.last: int | None = None
        """The frame at which the span ends, once it is known."""
        self._blocks, self._rate, self._reach = blocks, rate, reach
        self._held: list[np.ndarray] = []  # blocks that were looked at but not taken yet

    def take(self, end: int | None) -> Iterator[np.ndarray]:
        """Read frames up to `end`, or all."""
        while end is None or self.position < end:
            block = self._held.pop(0) if self._held else next(self._blocks, None)
            if block is None:
                return
            taken = block if end is None else block[: end - self.position]
            if len(taken) < len(block):
                self._held.insert(0, block[len(taken) :])
            self.position += len(taken)
            yield taken

    def take_span(self, end: int | None, context: int, window: int) -> Iterator[np.ndarray]:
        """Read frames up to the border near `end`, and `context` more, and to the end of a window."""
        yield from self.take(None if end is None else end - self._reach)
        if end is not None:
            self.last = self.find_border(end)
            yield from self.take(-_floor(-(self.last + context), window))

    def find_border(self, nominal: int) -> int:
        """Find the middle of the quietest QUIET_S near a frame, as far as the recording goes; no frame is taken."""
        if not self._reach:
            return nominal
        start, end = max(0, nominal - self._reach), nominal + self._reach  # which the position has not passed
        held = sum(map(len, self._held))
        while self.position + held < end and (block := next(self._blocks, None)) is not None:
            self._held.append(block)
            held += len(block)
        self._held = [np.concatenate(self._held)] if held else []
        window = self._held[0][start - self.position : end - self.position] if held else np.zeros((0, 1), np.float32)
        energy = np.einsum("fc,fc->f", window, window, dtype=np.float64)  # (frames, channels) -> (frames,)
        return start + quietest(energy, round(QUIET_S * self._rate))
