"""Make recordings for tests: joined real speech, in all formats that libsndfile and FFmpeg write."""

import functools
import io
import tempfile
from pathlib import Path
from typing import IO

import av
import numpy as np
import soundfile
import soxr

from tests.support.paths import ROOT

PROMPTS = sorted((ROOT / "jobs" / "data" / "prompts" / "audio").glob("*.flac"))
SHORTEST_FIRST = sorted(PROMPTS, key=lambda path: path.stat().st_size)


@functools.cache
def speech(rate: int, *, seconds: float = 46.3, channels: int = 2) -> np.ndarray:
    """Join spoken prompts: float32 (frames, channels); every further channel is late and half as loud."""
    joined, count = [], 0
    for path in PROMPTS:
        if count < seconds * 16_000:
            joined.append(soundfile.read(path, dtype="float32")[0])
            count += len(joined[-1])
    samples = soxr.resample(np.concatenate(joined), 16_000, rate)[: round(seconds * rate)]
    return np.stack([np.roll(samples, channel * rate // 7) / 2**channel for channel in range(channels)], axis=1)


def write(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    """Encode by libsndfile, in pieces, because a long ogg in one piece makes it crash."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, samples.shape[1], format=kind, subtype=subtype) as sound:
        for start in range(0, len(samples), 10_000):
            sound.write(samples[start : start + 10_000])
    return file.getvalue()


def encode(samples: np.ndarray, rate: int, codec: str, kind: str, *, seekable: bool = True, **settings: str) -> bytes:
    """Encode by FFmpeg, which writes no duration into a file that is not seekable. `settings` are the container's."""
    quality = {"flags": "+qscale", "global_quality": "472"} if codec == "libmp3lame" else {}
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name if seekable else _Pipe(file), "w", format=kind, container_options=settings) as container,
    ):
        layout = {1: "mono", 2: "stereo"}.get(samples.shape[1], f"{samples.shape[1]} channels")
        container.metadata["title"] = "Muenchen"
        stream = container.add_stream(codec, rate=rate, layout=layout, options=quality)
        if codec.startswith("wma"):
            stream.bit_rate = 96_000
        for start in range(0, len(samples), 2**14):
            block = samples[start : start + 2**14].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(block.reshape(1, -1), format="flt", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        container.close()
        file.flush()
        return Path(file.name).read_bytes()


def film(*, sound: np.ndarray | None) -> bytes:
    """Make an mp4 of two seconds of grey pictures, with or without 44.1 kHz mono sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        pictures = container.add_stream("mpeg4", rate=25, width=64, height=64, pix_fmt="yuv420p")
        voice = container.add_stream("aac", rate=44_100, layout="mono") if sound is not None else None
        for shade in range(50):
            container.mux(
                pictures.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), format="rgb24"))
            )
        container.mux(pictures.encode(None))
        if voice is not None:
            frame = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44_100, 0
            container.mux(voice.encode(frame))
            container.mux(voice.encode(None))
    return file.getvalue()


def tracks(sounds: dict[str, np.ndarray], rate: int, *, kind: str = "matroska", default: int | None = None) -> bytes:
    """Make a file with an audio track, (samples,), for each language; the one of number `default` is marked as such."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        streams = [container.add_stream("pcm_s16le", rate=rate, layout="mono") for _ in sounds]
        for number, (stream, language) in enumerate(zip(streams, sounds, strict=True), start=1):
            stream.metadata["language"] = language
            stream.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        for stream, samples in zip(streams, sounds.values(), strict=True):
            frame = av.AudioFrame.from_ndarray((samples[None] * 2**15).astype(np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return file.getvalue()


class _Pipe:
    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write
