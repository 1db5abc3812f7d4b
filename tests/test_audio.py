"""read_audio: what it decodes, that every kind of source decodes alike, and what it says of files it can't use."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from graft.audio import SAMPLE_RATE, AudioClip, read_audio
from graft.errors import AudioError

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}


def tone(rate: int = SAMPLE_RATE, *, seconds: float = 2.0, hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


def encode(samples: np.ndarray, rate: int = SAMPLE_RATE, kind: str = "flac", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=FORMATS[kind][0], subtype=subtype or FORMATS[kind][1])
    return buffer.getvalue()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def assert_one_line_about(error: pytest.ExceptionInfo[AudioError], name: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{name}: ")
    assert message.count(": ") >= 2, f"no remedy in {message!r}"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_rate_and_channel_count_becomes_16_khz_mono(kind: str, rate: int, channels: int) -> None:
    samples = tone(rate)
    clip = read_audio(encode(np.stack([samples] * channels, axis=1), rate, kind))
    assert clip.samples.dtype == np.float32
    assert clip.samples.shape == (2 * SAMPLE_RATE,)
    assert clip.duration_s == 2.0
    middle = slice(SAMPLE_RATE // 2, 3 * SAMPLE_RATE // 2)
    assert correlation(clip.samples[middle], tone()[middle]) > 0.99  # one sample late: 0.985


def test_lossless_16_khz_mono_is_taken_sample_by_sample() -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 5000).astype(np.int16)
    for kind in ("wav", "flac"):
        np.testing.assert_array_equal(read_audio(encode(samples, kind=kind)).samples, samples / np.float32(2**15))


def test_channels_are_averaged() -> None:
    left, right = tone(hz=300), tone(hz=700)
    clip = read_audio(encode(np.stack([left, right], axis=1), kind="wav", subtype="FLOAT"))
    np.testing.assert_allclose(clip.samples, (left + right) / 2, atol=1e-6)


def test_resampling_removes_what_16_khz_cannot_hold() -> None:
    clip = read_audio(encode(tone(48_000, hz=11_000), 48_000, "wav"))
    assert np.abs(clip.samples[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("kind", FORMATS)
def test_path_bytes_and_stream_decode_alike(kind: str, tmp_path: Path) -> None:
    data = encode(np.random.default_rng(0).normal(0, 0.1, 40_000), 48_000, kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data)
    with path.open("rb") as stream:
        clips = [read_audio(path), read_audio(str(path)), read_audio(data), read_audio(io.BytesIO(data)), read_audio(stream)]
    for clip in clips[1:]:
        np.testing.assert_array_equal(clip.samples, clips[0].samples)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    for suffix in ("raw", "mp3", "txt"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(encode(tone(), kind="flac"))
        assert read_audio(path).duration_s == 2.0


def damaged() -> dict[str, bytes]:
    flac, noise = encode(tone()), np.random.default_rng(0).normal(0, 0.1, 16_000)
    streamed = bytearray(flac)
    streamed[21] &= 0xF0  # the 36-bit count of samples in FLAC's STREAMINFO: 0 is unknown
    streamed[22:26] = bytes(4)
    broken = noise.astype(np.float32)
    broken[100] = np.nan
    infinite = noise.astype(np.float32)
    infinite[-1] = np.inf
    return {
        "empty.wav": b"",
        "text.wav": b"This is not audio.\n" * 50,
        "header_only.wav": encode(np.zeros(0), kind="wav"),
        "resampled_away.wav": encode(tone(48_000)[:1], 48_000, "wav"),
        "truncated.flac": encode(noise)[: len(encode(noise)) // 2],
        "corrupt.flac": encode(noise)[:8000] + bytes(3000) + encode(noise)[11_000:],
        "streamed.flac": bytes(streamed),
        "stump.mp3": encode(noise, kind="mp3")[:60],
        "stump.ogg": encode(noise, kind="ogg")[:200],
        "stump.wav": encode(noise, kind="wav")[:20],
        "picture.flac": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + bytes(1000),
        "nan.wav": encode(broken, kind="wav", subtype="FLOAT"),
        "nan_48k.wav": encode(broken, 48_000, kind="wav", subtype="FLOAT"),
        "infinite.wav": encode(infinite, kind="wav", subtype="FLOAT"),
    }


@pytest.mark.parametrize("name", damaged())
def test_unusable_audio_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    data = damaged()[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(AudioError) as error:
        read_audio(path)
    assert_one_line_about(error, str(path))
    with pytest.raises(AudioError) as error:
        read_audio(data, name="row 7")
    assert_one_line_about(error, "row 7")


def test_messages_say_what_is_wrong(tmp_path: Path) -> None:
    for name, words in {"empty.wav": "empty", "text.wav": "not readable as audio", "header_only.wav": "no audio", "nan.wav": "NaN"}.items():
        with pytest.raises(AudioError, match=words):
            read_audio(damaged()[name])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "missing.flac", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(AudioError, match=reason) as error:
            read_audio(path)
        assert_one_line_about(error, str(path))


def test_duration_counts_samples() -> None:
    assert AudioClip(np.zeros(8_000, np.float32)).duration_s == 0.5
