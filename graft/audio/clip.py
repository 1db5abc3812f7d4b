"""Any audio file or upload -> 16 kHz mono samples: decode (libsndfile, FFmpeg), average the channels, resample (soxr)."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from graft.errors import AudioError
from graft.storage.source import AudioSource

SAMPLE_RATE = 16_000


@dataclass(frozen=True, eq=False)
class AudioClip:
    """Speech as the models hear it: float32 (samples,), mono, 16 kHz, full scale +-1."""

    samples: np.ndarray

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def read_audio(source: AudioSource, *, name: str | None = None, max_s: float | None = None) -> AudioClip:
    """Decode a path, a URI, the bytes of a file or an open binary file: any format, any rate, any channels, of a video its sound.

    `name` is what error messages call the source; by default its path. Raises AudioError if the source is missing, unreadable, damaged,
    truncated (where its format can tell), no audio, without samples, longer than `max_s` seconds, or holds NaN or infinite samples.
    """
    from graft.audio.decoding import (
        open_audio,  # here, so that what trains on clips that are decoded already does without
    )

    with open_audio(source, name=name) as audio:
        mixed = map(mix_channels, audio.frames(max_s=max_s))
        samples = np.concatenate(list(resample(mixed, audio.info.rate)))
        if not len(samples):
            raise AudioError(f"{audio.name}: holds no audio (under 1 sample at 16 kHz): fetch or record it again")
        check_finite(samples, audio.name)
    return AudioClip(samples)


def mix_channels(channels: np.ndarray) -> np.ndarray:
    """The mean of channels: (samples, channels) -> (samples,)."""
    # A matrix product is ten times as fast as mean(axis=1) over a short axis.
    return (
        channels[:, 0]
        if channels.shape[1] == 1
        else channels @ np.full(channels.shape[1], 1 / channels.shape[1], np.float32)
    )


def resample(blocks: Iterable[np.ndarray], rate: int, to: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Resample consecutive blocks, (samples,) or (samples, channels): bit by bit what the whole would become, however it is cut."""
    if rate == to:
        yield from blocks
        return
    import soxr

    stream, block = None, None
    for block in blocks:
        stream = stream or soxr.ResampleStream(
            rate, to, 1 if block.ndim == 1 else block.shape[1], dtype="float32", quality="HQ"
        )
        yield stream.resample_chunk(block)
    if stream is not None and block is not None:
        yield stream.resample_chunk(block[:0], last=True)


def check_finite(samples: np.ndarray, name: str) -> None:
    """Raise AudioError for NaN and infinite samples."""
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds NaN or infinite samples: export it again, e.g. as 16-bit PCM")


def encode_flac(clip: AudioClip) -> bytes:
    """Encode a clip as a FLAC file of 16 bits."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, clip.samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    return file.getvalue()
