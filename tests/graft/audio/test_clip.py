"""read_audio decodes all formats and all kinds of sources alike, and says in one line why a file is unusable."""

import functools
import io
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio, resample, resampled_count
from graft.audio.spans import probe, read_span
from graft.errors import AudioError
from graft.storage.locations import find_files
from tests.support import media

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}


CODED = {
    "m4a": ("aac", "ipod"),
    "mp4": ("aac", "mp4"),
    "aac": ("aac", "adts"),
    "mka": ("aac", "matroska"),
    "webm": ("libopus", "webm"),
    "wma": ("wmav2", "asf"),
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


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("channels", [1, 2])
def test_what_libsndfile_cannot_read_is_read_by_ffmpeg(kind: str, channels: int) -> None:
    samples = np.stack([tone(48_000)] * channels, axis=1)
    clip = read_audio(media.encode(samples, 48_000, *CODED[kind]))
    assert clip.samples.dtype == np.float32
    # aac in adts and wma do not state how much of the first and last packet is padding.
    assert clip.duration_s == pytest.approx(2.0, abs=0.08)
    middle = clip.samples[SAMPLE_RATE // 2 : 3 * SAMPLE_RATE // 2]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440
    assert np.std(middle) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_of_a_film_the_sound_is_read() -> None:
    clip = read_audio(media.film(sound=tone(44_100)))
    assert clip.duration_s == pytest.approx(2.0, abs=0.05)
    assert correlation(clip.samples[8_000:24_000], tone()[8_000:24_000]) > 0.99


def test_any_rate_and_number_of_channels_of_a_recorder() -> None:
    samples = np.stack([tone(192_000, hz=300 + 20 * channel) for channel in range(8)], axis=1)
    clip = read_audio(encode(samples, 192_000, "wav", "FLOAT"))
    expected = np.mean([tone(hz=300 + 20 * channel) for channel in range(8)], axis=0)
    np.testing.assert_allclose(clip.samples[800:-800], expected[800:-800], atol=1e-4)


def test_ffmpeg_reads_any_number_of_channels_and_titles_in_any_encoding() -> None:
    samples = np.stack([tone(hz=300 + 20 * channel) for channel in range(12)], axis=1)
    data = media.encode(samples, SAMPLE_RATE, "pcm_f32le", "matroska")
    np.testing.assert_allclose(read_audio(data).samples, samples.mean(axis=1), atol=1e-6)
    assert b"Muenchen" in data
    np.testing.assert_array_equal(
        read_audio(data.replace(b"Muenchen", b"M\xfcnchen ")).samples, read_audio(data).samples
    )


@functools.cache
def unstated() -> dict[str, tuple[bytes, float]]:
    """Make files whose headers state less than they hold, which libsndfile would end early, with their true seconds."""
    sound, other = (media.speech(44_100, seconds=seconds) for seconds in (8.0, 3.0))
    wav, flac = encode(tone(), kind="wav"), bytearray(encode(tone()))
    flac[21] &= 0xF0  # the 36-bit count of samples in FLAC's STREAMINFO: 0 is unknown
    flac[22:26] = bytes(4)
    vbr, ogg = media.encode(sound, 44_100, "libmp3lame", "mp3"), media.write(sound, 44_100, "OGG", "VORBIS")
    return {
        "a vbr mp3 without the count of its frames": (
            media.encode(sound, 44_100, "libmp3lame", "mp3", write_xing="0"),
            8.03,
        ),
        "two mp3 in one": (vbr + media.encode(other, 44_100, "libmp3lame", "mp3"), 11.05),
        "two mp3 of different rates in one": (vbr + encode(tone(24_000), 24_000, "mp3"), 10.05),
        "two ogg in one": (ogg + media.write(other, 44_100, "OGG", "VORBIS"), 11.0),
        "an ogg twice": (ogg * 2, 16.0),
        "two ogg of different rates and channels in one": (ogg + encode(tone(22_050), 22_050, "ogg"), 10.0),
        "opus and vorbis in one": (media.write(tone(48_000)[:, None], 48_000, "OGG", "OPUS") + ogg, 10.0),
        "two mp4 of different rates in one": (
            media.encode(sound, 44_100, "aac", "mp4") + media.encode(other[::2], 22_050, "aac", "mp4"),
            11.0,
        ),
        "two avi in one": (media.encode(other, 44_100, "pcm_s16le", "avi") * 2, 6.0),
        "a wav from a pipe": (wav[:40] + bytes(4) + wav[44:], 2.0),
        "a wav from another pipe": (wav[:40] + b"\xff" * 4 + wav[44:], 2.0),
        "a flac from a pipe": (bytes(flac), 2.0),
    }


@pytest.mark.parametrize("name", unstated())
def test_a_file_is_read_to_its_end_whatever_its_header_says(name: str) -> None:
    data, seconds = unstated()[name]
    assert read_audio(data).duration_s == pytest.approx(seconds, abs=0.05)


def test_a_wav_over_4_gb_is_read_to_its_end(tmp_path: Path) -> None:
    path, frames = tmp_path / "long.wav", 2**31 + 100_000
    head = bytearray(encode(np.zeros(0), 16_000, "wav"))
    head[40:44] = (2 * frames % 2**32).to_bytes(4, "little")  # as recorders write it
    with path.open("wb") as file:
        file.write(head)
        file.truncate(44 + 2 * frames)
        file.seek(-2_000, io.SEEK_END)
        file.write((np.arange(1000) + 1).astype("<i2").tobytes())
    assert probe(path).duration_s == frames / 16_000
    assert probe(path).exact_seek
    (block,) = read_span(path, frames - 1500)
    np.testing.assert_array_equal(block.samples, np.maximum(np.arange(1500) - 499, 0).astype(np.float32) / 2**15)


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
        clips = [
            read_audio(path),
            read_audio(str(path)),
            read_audio(data),
            read_audio(io.BytesIO(data)),
            read_audio(stream),
        ]
    for clip in clips[1:]:
        np.testing.assert_array_equal(clip.samples, clips[0].samples)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    for suffix in ("raw", "mp3", "txt"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(encode(tone(), kind="flac"))
        assert read_audio(path).duration_s == 2.0


@functools.cache
def damaged() -> dict[str, bytes]:
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    sound = np.random.default_rng(1).normal(0, 0.1, (48_000 * 4, 1))
    bomb = bytearray(encode(noise)[:100])
    bomb[21] |= 0x0F  # 2^36 - 1 samples
    bomb[22:26] = b"\xff" * 4
    m4a, mp4 = (
        media.encode(sound, 48_000, "aac", "ipod"),
        media.encode(sound, 48_000, "aac", "mp4", movflags="faststart"),
    )
    mp3 = encode(np.tile(noise, 4), kind="mp3")
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
        "truncated.mp3": mp3[: len(mp3) // 2],
        "truncated.m4a": m4a[: len(m4a) // 2],
        "truncated.mp4": mp4[: len(mp4) // 2],
        "corrupt.m4a": m4a[: len(m4a) // 3] + bytes(3000) + m4a[len(m4a) // 3 + 3000 :],
        "bomb.flac": bytes(bomb),
        "wide.wav": encode(np.zeros((100, 200)), kind="wav"),
        "silent.mp4": media.film(sound=None),
        "subtitles.wav": b"1\n00:00:01,000 --> 00:00:02,000\nhello\n\n" * 10,
        "page.mp3": b"<!DOCTYPE html><html><body>404</body></html>" * 30,
        "zeros.wav": bytes(100_000),
        "random.wav": np.random.default_rng(0).bytes(100_000),
        "stump.mp3": encode(noise, kind="mp3")[:60],
        "stump.ogg": encode(noise, kind="ogg")[:200],
        "stump.wav": encode(noise, kind="wav")[:20],
        "stump.m4a": m4a[:100],
        "stump.webm": media.encode(sound, 48_000, "libopus", "webm")[:200],
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


def test_messages_say_what_is_wrong() -> None:
    said = {
        "empty.wav": "empty",
        "text.wav": "not readable as audio",
        "header_only.wav": "no audio",
        "nan.wav": "NaN",
        "truncated.mp3": r"truncated at [12]\.\d s \(it should hold 4\.0 s\)",
        "truncated.mp4": r"truncated at [12]\.\d s",
        "silent.mp4": "no audio",
        "wide.wav": "200 channels",
    }
    for name, words in said.items():
        with pytest.raises(AudioError, match=words):
            read_audio(damaged()[name])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n<!DOCTYPE html><html><title>404 Not Found</title></html>", "is a web page or XML, not audio"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page or XML, not audio"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a pointer of Git LFS"),
        (bytes(100_000), "is nothing but zeros at its start"),
    ],
)
def test_what_servers_and_copies_leave_in_the_place_of_audio_is_named(content: bytes, words: str) -> None:
    with pytest.raises(AudioError, match=f"^talk.mp3: {words}.*: fetch it again$"):
        read_audio(content, name="talk.mp3")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "missing.flac", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(AudioError, match=reason) as error:
            read_audio(path)
        assert_one_line_about(error, str(path))


def test_a_playlist_opens_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.aac").write_bytes(media.encode(np.stack([tone()], axis=1), 16_000, "aac", "adts"))
    lists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/secret.aac\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.aac\n",
    ]
    for text in lists:
        (tmp_path / "list.wav").write_text(text)
        with pytest.raises(AudioError, match="not readable as audio"):
            read_audio(tmp_path / "list.wav")


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "webm"])
def test_more_than_was_allowed_is_refused(kind: str) -> None:
    samples = np.stack([tone(48_000)], axis=1)
    data = media.encode(samples, 48_000, *CODED[kind]) if kind in CODED else encode(samples, 48_000, kind)
    assert read_audio(data, max_s=2.01).duration_s == 2.0
    with pytest.raises(AudioError, match=r"over the limit of 1\.9 s") as error:
        read_audio(data, name="row 7", max_s=1.9)
    assert_one_line_about(error, "row 7")


class Stream(io.BytesIO):
    """A stream that cannot be sought, as from a pipe."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation("seek")


class Endless(Stream):
    def read(self, size: int | None = -1) -> bytes:
        return bytes(size or 0)


def test_a_stream_is_read_through_and_an_endless_one_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (encode(tone()), media.encode(np.stack([tone()], axis=1), 16_000, "aac", "adts")):
        np.testing.assert_array_equal(read_audio(Stream(data)).samples, read_audio(data).samples)
    monkeypatch.setattr("graft.storage.source.STREAM_BYTES", 2**22)
    with pytest.raises(AudioError, match="4,194,304 bytes") as error:
        read_audio(Endless(), name="radio")
    assert_one_line_about(error, "radio")
    with pytest.raises(AudioError, match="empty"):
        read_audio("/dev/zero")


def test_a_pipe_is_read_and_one_into_which_nobody_writes_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.storage.source.PIPE_WAIT_S", 0.2)
    os.mkfifo(tmp_path / "pipe.wav")
    (found,) = find_files(str(tmp_path))
    with pytest.raises(AudioError, match="a pipe into which nobody has written") as error:
        read_audio(found.uri)
    assert_one_line_about(error, found.uri)
    writer = threading.Thread(target=Path(found.uri).write_bytes, args=(encode(tone()),))
    writer.start()
    np.testing.assert_array_equal(read_audio(found.uri).samples, read_audio(encode(tone())).samples)
    writer.join()


class Failing(io.BytesIO):
    """A file on a disk or server that fails after some bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 30_000:
            raise OSError("the disk is on fire")
        return super().read(min(size or 0, 10_000))


@pytest.mark.parametrize("kind", [*FORMATS, "webm", "aac"])
def test_what_cannot_be_read_is_an_error_not_the_end(kind: str) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (48_000 * 8, 1))
    data = media.encode(samples, 48_000, *CODED[kind]) if kind in CODED else encode(samples, 48_000, kind)
    assert len(data) > 50_000
    with pytest.raises(AudioError, match="the disk is on fire") as error:
        read_audio(Failing(data))
    assert_one_line_about(error, "audio stream")


def test_duration_counts_samples() -> None:
    assert AudioClip(np.zeros(8_000, np.float32)).duration_s == 0.5


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_the_length_at_16_khz_is_known_without_resampling(rate):
    for count in (1, 2, 3, 5, 17, 441, 1_001, 4_409, 30_011):
        made = sum(map(len, resample([np.zeros(count, np.float32)], rate)))
        assert resampled_count(count, rate) == made
