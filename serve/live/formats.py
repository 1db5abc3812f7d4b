"""Decode the audio of a live session, which comes in pieces of any size: bytes -> float32 samples at 16 kHz."""

import io
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from graft.audio.clip import SAMPLE_RATE

TELEPHONE_RATE = 8_000


class Pcm(BaseModel):
    """Samples of 16 bits, signed, little-endian, of one channel."""

    model_config = ConfigDict(frozen=True)

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[16_000, 24_000, 48_000] = 24_000


class Pcmu(BaseModel):
    """Telephone speech of 8 kHz in 8 bits, by the mu-law of ITU-T G.711."""

    model_config = ConfigDict(frozen=True)

    type: Literal["audio/pcmu"]


class Pcma(BaseModel):
    """Telephone speech of 8 kHz in 8 bits, by the A-law of ITU-T G.711."""

    model_config = ConfigDict(frozen=True)

    type: Literal["audio/pcma"]


AudioFormat = Pcm | Pcmu | Pcma
SUBTYPES = {"audio/pcm": "PCM_16", "audio/pcmu": "ULAW", "audio/pcma": "ALAW"}
"""Names of the formats in libsndfile."""


class AudioReader:
    """Decodes and resamples the audio of one session; how it is cut into pieces does not change a sample."""

    def __init__(self, format: AudioFormat) -> None:
        import soxr

        self._rate = format.rate if isinstance(format, Pcm) else TELEPHONE_RATE
        self._subtype = SUBTYPES[format.type]
        self._sample_bytes = 2 if isinstance(format, Pcm) else 1
        self._rest = b""  # the first byte of a sample whose second one has not come yet
        self._resampler = (
            soxr.ResampleStream(self._rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
            if self._rate != SAMPLE_RATE
            else None
        )

    def read(self, data: bytes) -> np.ndarray:
        """Decode a piece -> float32 samples at 16 kHz; the resampler holds back the last milliseconds."""
        samples = self._decode(data)
        return self._resampler.resample_chunk(samples) if self._resampler else samples

    def flush(self) -> np.ndarray:
        """Return the samples that the resampler still holds, after which nothing more can be read."""
        nothing = np.zeros(0, np.float32)
        return self._resampler.resample_chunk(nothing, last=True) if self._resampler else nothing

    def _decode(self, data: bytes) -> np.ndarray:
        import soundfile

        data = self._rest + data
        whole = len(data) - len(data) % self._sample_bytes
        self._rest = data[whole:]
        if not whole:
            return np.zeros(0, np.float32)
        samples, _ = soundfile.read(
            io.BytesIO(data[:whole]),
            samplerate=self._rate,
            channels=1,
            format="RAW",
            subtype=self._subtype,
            endian="LITTLE",
            dtype="float32",
        )
        return samples
