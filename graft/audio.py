"""Any audio file or upload -> 16 kHz mono samples: decode (libsndfile), average the channels, resample (soxr)."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from graft.errors import AudioError

SAMPLE_RATE = 16_000


@dataclass(frozen=True, eq=False)
class AudioClip:
    """Speech as the models hear it: float32 (samples,), mono, 16 kHz, full scale +-1."""

    samples: np.ndarray

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def read_audio(source: str | os.PathLike[str] | bytes | BinaryIO, *, name: str | None = None) -> AudioClip:
    """Decode a path, the bytes of a file or an open binary file: wav, flac, mp3, ogg and opus, any rate, any channels.

    `name` is what error messages call the source; by default its path. Raises AudioError if the source is missing,
    unreadable, truncated (where its format can tell), no audio, without samples, or holds NaN or infinite samples.
    """
    name = name or _name_of(source)
    data = _read_bytes(source, name)
    if not data:
        raise AudioError(f"{name}: the file is empty (0 bytes): fetch or record it again")
    channels, rate = _decode(data, name)
    # A matrix product is ten times as fast as mean(axis=1) over a short axis.
    samples = channels[:, 0] if channels.shape[1] == 1 else channels @ np.full(channels.shape[1], 1 / channels.shape[1], np.float32)
    if rate != SAMPLE_RATE:
        import soxr

        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    if not len(samples):
        raise AudioError(f"{name}: holds no audio ({len(channels)} samples at {rate} Hz): fetch or record it again")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds NaN or infinite samples: export it again, e.g. as 16-bit PCM")
    return AudioClip(samples)


def flac_bytes(clip: AudioClip) -> bytes:
    """Encode a clip as a FLAC file of 16 bits."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, clip.samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    return file.getvalue()


def _name_of(source: str | os.PathLike[str] | bytes | BinaryIO) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"audio of {len(source)} bytes" if isinstance(source, bytes) else str(getattr(source, "name", "audio stream"))


def _read_bytes(source: str | os.PathLike[str] | bytes | BinaryIO, name: str) -> bytes:
    """Everything goes through memory, so that a file, a row and an upload decode in exactly the same way."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes() if isinstance(source, str | os.PathLike) else source.read()
    except OSError as error:
        raise AudioError(f"{name}: {error.strerror or error}: give the path of a readable audio file") from error


def _decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Bytes of a file -> float32 (samples, channels) and their rate in Hz."""
    import soundfile  # here, so that what trains on clips that are decoded already does without

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames > len(data) * 10_000:  # a header without a length counts as 2^63 - 1
                raise AudioError(f"{name}: its header does not state its length: re-encode it, e.g. `ffmpeg -i IN OUT.flac`")
            # In one read: block by block, soundfile seeks after each and an mp3 comes out different.
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".").removeprefix("Error : ")
        raise AudioError(f"{name}: not readable as audio ({reason}): convert it, e.g. `ffmpeg -i IN OUT.flac`") from error
