"""Decode any audio file or upload into a clip of 16 kHz mono samples.

file -> frames (libsndfile, FFmpeg) -> mean of the channels -> 16 kHz (soxr) -> AudioClip

Channels of opposite phase cancel each other out in their mean. Where they do, the loudest one is taken. That is decided
for stretches of seconds that are counted from the start of the recording, so that every span of it gets the same.
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from graft.audio.audio_info import AudioTrack
from graft.audio.defects import PHASE_CANCELLED, AudioDefect, merge_defects
from graft.errors import AudioError
from graft.storage.source import AudioSource

SAMPLE_RATE = 16_000
MIX_WINDOW_S = 5
"""Seconds for which it is decided together how channels are mixed; fewer where they would be over 8 MB."""
CANCELLED_POWER = 0.01
"""Power of the mean, as a share of the channels' power, below which they cancel each other out; channels that have
nothing in common reach one by their number."""
LEAST_POWER = 1e-6
"""Power of the loudest channel below which nothing can be cancelled: -60 dB of full scale."""


@dataclass(frozen=True, eq=False)
class AudioClip:
    """Audio in the form that the models take: float32 (samples,), mono, 16 kHz, full scale +-1."""

    samples: np.ndarray
    defects: tuple[AudioDefect, ...] = ()
    """What is wrong with the recording that it was read from."""

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def read_audio(
    source: AudioSource,
    *,
    name: str | None = None,
    track: AudioTrack | None = None,
    max_s: float | None = None,
    salvage: bool = False,
) -> AudioClip:
    """Decode a path, a URI, the bytes of a file or an open binary file into a clip.

    Any format, rate and number of channels will do; of a video, the sound is taken. Of several audio tracks, `track`
    (its number from 1, or its language) or else the default one is taken. `name` is what error messages call the
    source; by default its path. With `salvage`, damaged and truncated files are decoded as far as they go, and the
    clip says in its `defects` what is lost. Raises AudioError if the source is missing, unreadable, no audio, without
    samples, longer than `max_s` seconds or mostly lost; without `salvage` also if it is damaged or truncated (where its
    format can tell), or holds NaN or infinite samples.
    """
    # This import is local because training on cached clips needs no decoder.
    from graft.audio.decoding import open_audio

    found: list[AudioDefect] = []
    with open_audio(source, name=name, track=track) as audio:
        frames = audio.frames(max_s=max_s, defects=found if salvage else None)
        mixed = mix_blocks(frames, audio.info.rate, defects=found)
        samples = np.concatenate(list(resample(mixed, audio.info.rate)))
        if not len(samples):
            raise AudioError(f"{audio.name}: holds no audio (under 1 sample at 16 kHz): fetch or record it again")
        check_finite(samples, audio.name)
    return AudioClip(samples, merge_defects(found))


def mix_blocks(
    blocks: Iterable[np.ndarray], rate: int, *, start: int = 0, defects: list[AudioDefect] | None = None
) -> Iterator[np.ndarray]:
    """Mix consecutive blocks, (frames, channels) -> (frames,); the first begins at frame `start` of the recording.

    `start` is a multiple of `mix_window`. Times in which channels cancel each other out are added to `defects`.
    """
    first = next(blocks := iter(blocks), None)
    if first is None:
        return
    blocks = itertools.chain([first], blocks)
    if first.shape[1] == 1:
        yield from (block[:, 0] for block in blocks)
        return
    for block in _windows(blocks, mix_window(rate, first.shape[1])):
        mixed, powers = mix_channels(block), np.einsum("fc,fc->c", block, block) / len(block)
        share = min(CANCELLED_POWER, 0.1 / len(powers))
        if powers.max() > LEAST_POWER and mixed @ mixed / len(block) < share * powers.mean():
            mixed = np.ascontiguousarray(block[:, powers.argmax()])
            if defects is not None:
                defects.append(AudioDefect(start / rate, (start + len(block)) / rate, PHASE_CANCELLED))
        start += len(block)
        yield mixed


def mix_window(rate: int, channel_count: int) -> int:
    """Return the frames of a recording for which it is decided together how its channels are mixed."""
    return rate * max(1, min(MIX_WINDOW_S, 2**21 // (rate * channel_count)))


def _windows(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut consecutive blocks into windows of `size`; the last one is what is left."""
    held: list[np.ndarray] = []
    left = size
    for block in blocks:
        while len(block) >= left:
            yield np.concatenate([*held, block[:left]])
            block, held, left = block[left:], [], size
        held.append(block)
        left -= len(block)
    if left < size:
        yield np.concatenate(held)


def mix_channels(channels: np.ndarray) -> np.ndarray:
    """Average channels: (samples, channels) -> (samples,)."""
    count = channels.shape[1]
    # A matrix product is ten times as fast as mean(axis=1) over so short an axis.
    return channels[:, 0] if count == 1 else channels @ np.full(count, 1 / count, np.float32)


def resample(blocks: Iterable[np.ndarray], rate: int, to: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Resample consecutive blocks, (samples,) or (samples, channels); how they are cut does not change a bit."""
    if rate == to:
        yield from blocks
        return
    import soxr

    stream, block = None, None
    for block in blocks:
        channel_count = 1 if block.ndim == 1 else block.shape[1]
        stream = stream or soxr.ResampleStream(rate, to, channel_count, dtype="float32", quality="HQ")
        yield stream.resample_chunk(block)
    if stream is not None and block is not None:
        yield stream.resample_chunk(block[:0], last=True)  # what the filter still holds


def resampled_count(frames: int, rate: int, to: int = SAMPLE_RATE) -> int:
    """Count the samples that `resample` makes of so many frames of a whole recording, rounded as soxr rounds it."""
    return (2 * frames * to + rate) // (2 * rate)


def check_finite(samples: np.ndarray, name: str) -> None:
    """Raise AudioError for NaN and infinite samples."""
    if not np.isfinite(samples).all():
        raise not_finite(name)


def not_finite(name: str) -> AudioError:
    """Return the error of audio with NaN or infinite samples."""
    return AudioError(f"{name}: holds NaN or infinite samples: export it again, e.g. as 16-bit PCM")


def encode_flac(clip: AudioClip) -> bytes:
    """Encode a clip as a FLAC file of 16 bits."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, clip.samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    return file.getvalue()
