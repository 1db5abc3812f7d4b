"""Recordings of any length -> spans of samples, block by block in bounded memory, that meet exactly.

Spans are named by frames at the recording's own rate, so neighbours agree on their border to the sample. With quiet borders they meet where
it is quietest near the nominal one, which both find by the same frames. Resampled spans are cut from the samples of the whole.

    span 1 |=======================~~~|            nominal border: 5 s before to 5 s after it (~) both look for
    span 2                         |~~~~~~===>     the quietest 0.2 s, and meet in their middle
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graft.audio.chunking import QUIET_S, SEARCH_S, quietest
from graft.audio.clip import SAMPLE_RATE, check_finite, mix_channels, resample
from graft.audio.decoding import AudioInfo, open_audio
from graft.storage.source import AudioSource

CONTEXT_S = 0.1
"""What the resampler hears beyond a span; its filter reaches over some milliseconds."""


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive samples of a recording, float32 (samples,) or (samples, channels), and the place of the first in the recording."""

    start: int
    samples: np.ndarray


def probe(source: AudioSource, *, name: str | None = None) -> AudioInfo:
    """Read a recording's header, which takes milliseconds. Raises AudioError."""
    with open_audio(source, name=name) as audio:
        return audio.info


def read_span(
    source: AudioSource,
    start: int = 0,
    end: int | None = None,
    *,
    borders: Literal["exact", "quiet"] = "exact",
    channels: Literal["mix", "split"] = "mix",
    rate: int | None = SAMPLE_RATE,
    max_s: float | None = None,
    name: str | None = None,
) -> Iterator[Block]:
    """Decode frames `start` to `end` of a recording, or to its last: blocks in order, none for a span beyond the recording's end.

    start, end  in frames at the recording's own rate (`probe`). A header's duration may be wrong: the last span has no end
    borders     quiet: both move by up to 5 s to where it is quietest, but for the recording's start; spans of at least 10 s
    channels    mix: their mean, (samples,); split: each by itself, (samples, channels)
    rate        of the samples, and what blocks' starts count; None is the recording's own
    max_s       of audio in the recording; going on beyond it is an error

    Samples are those of the whole recording, bit by bit where nothing is resampled, else to 3e-7. Formats without exact seek are decoded
    from their start. Raises AudioError as read_audio, ValueError for a span that can't be.
    """
    with open_audio(source, name=name) as audio:
        grid = _Grid(audio.info.rate, rate or audio.info.rate)
        reach = round(SEARCH_S * audio.info.rate) if borders == "quiet" else 0
        if start < 0 or (end is not None and end - start < 2 * reach):
            raise ValueError(
                f"a span from frame {start} to {end}: starts at 0 or later, and lasts at least {2 * reach} frames"
            )
        begin = grid.floor(start - reach - grid.context)
        frames = audio.frames(begin, None if end is None else end + reach + grid.context, max_s=max_s)
        tape = _Tape(frames, begin, audio.info.rate, reach)
        first = tape.border(start) if start else 0
        for _ in tape.take(grid.floor(first - grid.context)):
            pass
        place = grid.sample(tape.position)
        blocks = map(mix_channels if channels == "mix" else np.ascontiguousarray, tape.take_span(end, grid.context))
        for samples in resample(blocks, grid.from_rate, grid.to_rate):
            skipped = max(0, grid.sample(first) - place)
            kept = samples[skipped:] if tape.last is None else samples[skipped : max(0, grid.sample(tape.last) - place)]
            if len(kept):
                check_finite(kept, audio.name)
                yield Block(place + skipped, kept)
            place += len(samples)


@dataclass(frozen=True)
class _Grid:
    """Where the samples of a whole recording lie against its frames, when it is resampled."""

    from_rate: int
    to_rate: int

    @property
    def context(self) -> int:
        return 0 if self.from_rate == self.to_rate else round(CONTEXT_S * self.from_rate)

    def floor(self, frame: int) -> int:
        """The last frame up to this one that coincides with a sample."""
        period = self.from_rate // math.gcd(self.from_rate, self.to_rate)
        return max(0, frame) // period * period

    def sample(self, frame: int) -> int:
        """How many samples lie before a frame, rounded as soxr rounds the length of a whole."""
        return (2 * frame * self.to_rate + self.from_rate) // (2 * self.from_rate)


class _Tape:
    """A recording's frames in order, some of which are looked at before they are taken; borders move by up to `reach` frames."""

    def __init__(self, blocks: Iterator[np.ndarray], position: int, rate: int, reach: int) -> None:
        self.position = position
        self.last: int | None = None
        """Where the span ends, once it is known."""
        self._blocks, self._rate, self._reach = blocks, rate, reach
        self._held: list[np.ndarray] = []

    def take(self, end: int | None) -> Iterator[np.ndarray]:
        """Frames up to `end`, or all."""
        while end is None or self.position < end:
            block = self._held.pop(0) if self._held else next(self._blocks, None)
            if block is None:
                return
            taken = block if end is None else block[: end - self.position]
            if len(taken) < len(block):
                self._held.insert(0, block[len(taken) :])
            self.position += len(taken)
            yield taken

    def take_span(self, end: int | None, context: int) -> Iterator[np.ndarray]:
        """Frames up to the border near `end`, and `context` more."""
        yield from self.take(None if end is None else end - self._reach)
        if end is not None:
            self.last = self.border(end)
            yield from self.take(self.last + context)

    def border(self, nominal: int) -> int:
        """The middle of the quietest QUIET_S near a frame, as far as the recording goes."""
        if not self._reach:
            return nominal
        start = max(0, nominal - self._reach)
        window = self._look(start, nominal + self._reach)
        energy = np.einsum("fc,fc->f", window, window, dtype=np.float64)  # (frames, channels) -> (frames,)
        return start + quietest(energy, round(QUIET_S * self._rate))

    def _look(self, start: int, end: int) -> np.ndarray:
        """Frames `start` to `end`, both from the position on; fewer at the end of the recording."""
        held = sum(map(len, self._held))
        while self.position + held < end and (block := next(self._blocks, None)) is not None:
            self._held.append(block)
            held += len(block)
        if not held:
            return np.zeros((0, 1), np.float32)
        self._held = [np.concatenate(self._held)]
        return self._held[0][start - self.position : end - self.position]
