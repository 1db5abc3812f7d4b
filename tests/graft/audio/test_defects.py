"""Damaged, truncated, gapped and phase-inverted files are decoded as far as they go, and say what is wrong."""

import functools
import io
import re
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import soundfile

from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.audio.defects import AudioDefect, merge_defects
from graft.audio.spans import probe, read_span
from graft.errors import AudioError
from tests.support import media

RATE = 48_000
SECONDS = 8.0


@functools.cache
def sound() -> np.ndarray:
    return media.speech(RATE, seconds=SECONDS, channels=1)


@functools.cache
def file(kind: str) -> bytes:
    """Make a whole file of SECONDS of speech."""
    written = {"ogg": "VORBIS", "opus": "OPUS"} | dict.fromkeys(("wav", "flac", "aiff", "w64", "au", "caf"), "PCM_16")
    if kind in written:
        return media.write(sound(), RATE, "OGG" if kind == "opus" else kind.upper(), written[kind])
    if kind == "mp3":
        return media.encode(sound(), RATE, "libmp3lame", "mp3")
    if kind == "mp4":
        return media.encode(sound(), RATE, "aac", "mp4", movflags="faststart")
    return media.encode(sound(), RATE, "aac", {"m4a": "ipod", "mka": "matroska"}[kind])


def flags(defects: tuple[AudioDefect, ...]) -> list[str]:
    return [one.flag for one in defects]


def shift_s(samples: np.ndarray, start_s: float, end_s: float) -> float:
    """Return by how many seconds the speech in a part comes too late."""
    part = slice(round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE))
    spoken, heard = read_audio(file("wav")).samples[part], samples[part]
    size = 2 * len(spoken)
    lags = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(spoken, size)))
    lag = int(np.argmax(lags))
    return (lag - size if lag > size // 2 else lag) / SAMPLE_RATE


@pytest.mark.parametrize("kind", ["wav", "aiff", "w64", "caf", "flac", "ogg", "opus", "mp3", "mp4", "mka"])
def test_a_truncated_file_is_decoded_as_far_as_it_goes(kind: str) -> None:
    data = file(kind)
    assert read_audio(data, salvage=True).defects == ()
    clip = read_audio(data[: len(data) // 2], salvage=True)
    assert 0.3 * SECONDS < clip.duration_s < 0.7 * SECONDS
    (defect,) = clip.defects
    assert defect.flag == "truncated_file"
    assert defect.start_s == pytest.approx(clip.duration_s, abs=0.05)
    if kind not in ("ogg", "opus"):  # which state no length
        assert defect.end_s == pytest.approx(SECONDS, abs=0.1)
        with pytest.raises(AudioError, match="truncated"):
            read_audio(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus", "mp3", "m4a", "mp4", "mka"])
def test_a_bad_spot_costs_only_that_spot(kind: str) -> None:
    data = bytearray(file(kind))
    place = len(data) * 3 // 8
    size = 2_000 if kind == "mp3" else 600  # libmpg123 leaves out less without a word
    data[place : place + size] = bytes(size)
    clip = read_audio(bytes(data), salvage=True)
    assert set(flags(clip.defects)) == {"damaged"}
    inexact_s = 0.1 if kind == "mp3" else 0.0  # An mp3 has no timestamps: what is lost is measured by its bytes.
    assert clip.duration_s == pytest.approx(SECONDS, abs=0.05 + inexact_s)
    assert abs(shift_s(clip.samples, 6.5, 8.0)) < 0.015 + inexact_s
    assert 0 <= clip.defects[0].start_s < clip.defects[-1].end_s < 5
    with pytest.raises(AudioError, match="damaged"):
        read_audio(bytes(data))


def test_an_mp3_goes_on_behind_junk_in_which_libsndfile_finds_no_frame() -> None:
    data = bytearray(file("mp3"))
    junk = np.random.default_rng(4).bytes(3_000)  # It looks like the head of a frame that never comes.
    place = len(data) // 2
    data[place : place + len(junk)] = junk
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        assert len(sound.read()) < 0.6 * SECONDS * RATE
    clip = read_audio(bytes(data), salvage=True)
    assert clip.duration_s > SECONDS - 0.5
    assert flags(clip.defects) == ["damaged"]


def test_samples_that_are_no_numbers_are_silent() -> None:
    samples = sound().copy()
    samples[2 * RATE : 2 * RATE + 100], samples[2 * RATE + 500], samples[5 * RATE] = np.nan, np.inf, -np.inf
    data = media.write(samples, RATE, "WAV", "FLOAT")
    clip = read_audio(data, salvage=True)
    assert clip.defects == (
        AudioDefect(2.0, 2 + 501 / RATE, "damaged"),
        AudioDefect(5.0, 5 + 1 / RATE, "damaged"),
    )
    np.testing.assert_allclose(clip.samples[:31_000], read_audio(file("wav")).samples[:31_000], atol=1e-4)
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_audio(data)
    samples[: 5 * RATE] = np.nan
    with pytest.raises(AudioError, match="most of its time"):
        read_audio(media.write(samples, RATE, "WAV", "FLOAT"), salvage=True)


@pytest.mark.parametrize("kind", ["mp2", "ac3"])
def test_what_junk_has_replaced_in_a_stream_without_timestamps_keeps_its_time(kind: str) -> None:
    data = media.encode(sound(), RATE, kind, kind)
    place, size = len(data) // 2, len(data) // 10
    clip = read_audio(data[:place] + bytes(size) + data[place + size :], salvage=True)
    assert abs(shift_s(clip.samples, 5.5, 7.5)) < 0.06
    assert flags(clip.defects) == ["damaged"]
    assert clip.defects[0].end_s - clip.defects[0].start_s == pytest.approx(0.8, abs=0.2)


def test_an_mp4_without_its_index_says_so() -> None:
    data, place = file("m4a"), file("m4a").find(b"moov") - 4
    for broken, words in (
        (data[: place // 2], "its index is missing .* it was cut off"),
        (data[:place], "its writer did not finish it"),
        (data[:10_000] + data[10_400:], "bytes before it are missing"),
    ):
        with pytest.raises(AudioError, match=words):
            read_audio(broken, salvage=True)
    # Where the index stands at the start, what is behind the missing bytes is damaged.
    data = file("mp4")
    clip = read_audio(data[: len(data) * 3 // 4] + data[len(data) * 3 // 4 + 400 :], salvage=True)
    assert flags(clip.defects)[0] == "damaged"
    assert clip.defects[0].start_s == pytest.approx(0.75 * SECONDS, abs=0.3)


@pytest.mark.parametrize("part", ["moof", "mdat"])
def test_an_mp4_of_fragments_is_decoded_up_to_where_it_was_cut(part: str) -> None:
    data = media.encode(sound(), RATE, "aac", "mp4", movflags="frag_keyframe+empty_moov", frag_duration="2000000")
    assert read_audio(data, salvage=True).defects == ()
    place = [found.start() for found in re.finditer(part.encode(), data)][2]
    clip = read_audio(data[: place + 50], salvage=True)
    assert clip.duration_s == pytest.approx(4.0, abs=0.1)
    assert flags(clip.defects) == ["truncated_file"]


@pytest.mark.parametrize("kind", ["avi", "nist", "svx", "voc"])
def test_a_truncated_file_of_a_rare_kind_is_flagged(kind: str) -> None:
    data = (
        media.encode(sound(), RATE, "pcm_s16le", "avi")
        if kind == "avi"
        else media.write(sound()[::3], RATE // 3, kind.upper(), "PCM_16")
    )
    assert read_audio(data, salvage=True).defects == ()
    clip = read_audio(data[: len(data) // 2], salvage=True)
    assert clip.duration_s == pytest.approx(SECONDS / 2, abs=0.1)
    assert flags(clip.defects) == ["truncated_file"]


@pytest.mark.parametrize("kind", ["matroska", "flv"])
def test_a_gap_in_which_bytes_are_lost_is_damage(kind: str) -> None:
    data = bytearray(media.encode(sound(), RATE if kind == "matroska" else 44_100, "aac", kind))
    place = len(data) // 2
    data[place : place + 3_000] = bytes(3_000)
    clip = read_audio(bytes(data), salvage=True)
    assert clip.duration_s == pytest.approx(SECONDS * (1 if kind == "matroska" else RATE / 44_100), abs=0.1)
    assert flags(clip.defects) == ["damaged"]


def test_a_stream_that_seems_to_appear_behind_a_damage_ends_nothing() -> None:
    data = media.encode(sound()[:, [0]], 44_100, "libmp3lame", "flv")
    place = len(data) // 2
    for size in range(1_000, 1_400, 50):
        # Behind the missing bytes, FFmpeg takes sound for the head of a tag with pictures.
        clip = read_audio(data[:place] + data[place + size :], salvage=True)
        assert clip.duration_s == pytest.approx(SECONDS * RATE / 44_100, abs=0.3)


def test_of_wavs_that_were_joined_byte_by_byte_all_is_decoded() -> None:
    data = file("wav")
    clip = read_audio(data + data, salvage=True)
    assert clip.duration_s == pytest.approx(2 * SECONDS, abs=0.01)
    (defect,) = clip.defects
    assert (defect.flag, defect.start_s) == ("header_mismatch", SECONDS)
    other = media.write(sound()[::2], RATE // 2, "WAV", "PCM_16")
    with pytest.raises(AudioError, match="two wavs of different forms"):
        read_audio(data + other)


def test_of_a_file_that_is_mostly_lost_nothing_is_told() -> None:
    data = bytearray(file("mp4"))
    start = data.find(b"mdat") + 4
    data[start + 5_000 :] = bytes(len(data) - start - 5_000)
    with pytest.raises(AudioError, match="damaged"):
        read_audio(bytes(data), salvage=True)


def test_a_header_that_states_another_length_is_not_believed() -> None:
    wav, flac = bytearray(file("wav")), bytearray(file("flac"))
    wav[40:44] = (3 * RATE * 2).to_bytes(4, "little")
    flac[21] &= 0xF0
    flac[22:26] = (3 * RATE).to_bytes(4, "big")
    for kind, data in (("wav", bytes(wav)), ("flac", bytes(flac))):
        clip = read_audio(data, salvage=True)
        assert clip.defects == (AudioDefect(3.0, SECONDS, "header_mismatch"),)
        np.testing.assert_array_equal(clip.samples, read_audio(file(kind)).samples)
        np.testing.assert_array_equal(read_audio(data).samples, clip.samples)
    au, caf = bytearray(file("au")), bytearray(file("caf"))
    au[8:12] = (3 * RATE * 2).to_bytes(4, "big")
    place = caf.find(b"data") + 4
    caf[place : place + 8] = (4 + 3 * RATE * 2).to_bytes(8, "big")
    for kind, short in (("au", au), ("caf", caf)):
        clip = read_audio(bytes(short), salvage=True)
        assert clip.defects == (AudioDefect(3.0, SECONDS, "header_mismatch"),)
        np.testing.assert_array_equal(clip.samples, read_audio(file(kind)).samples)
    flac[22:26] = (60 * RATE).to_bytes(4, "big")
    assert read_audio(bytes(flac), salvage=True).defects == (AudioDefect(SECONDS, 60.0, "header_mismatch"),)
    # Chunks behind the samples are no sound, however long they are.
    chunk = b"info" + (10**6).to_bytes(8, "big") + bytes(10**6)
    assert read_audio(file("caf") + chunk, salvage=True).defects == ()
    tagged = file("wav") + b"LIST" + (10**6).to_bytes(4, "little") + bytes(10**6)
    assert read_audio(tagged, salvage=True).defects == ()


def container(parts: list[tuple[float, float]], *, kind: str = "matroska", picture: bool = False) -> bytes:
    """Make a file with the parts of the speech that are given by start and end in seconds, each at its own time."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as made:
        pictures = made.add_stream("mpeg4", rate=25, width=64, height=64, pix_fmt="yuv420p") if picture else None
        voice = made.add_stream("pcm_s16le" if kind == "matroska" else "aac", rate=RATE, layout="mono")
        packets = []
        for shade in range(50 if pictures is not None else 0):
            grey = np.full((64, 64, 3), shade, np.uint8)
            packets += pictures.encode(av.VideoFrame.from_ndarray(grey, format="rgb24"))
        packets += pictures.encode(None) if pictures is not None else []
        for start_s, end_s in parts:
            for place in range(round(start_s * RATE), round(end_s * RATE), 1024):
                samples = (sound()[place : min(place + 1024, round(end_s * RATE)), 0] * 2**15).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = RATE, place, Fraction(1, RATE)
                packets += voice.encode(frame)
        packets += voice.encode(None)
        for packet in packets:
            made.mux(packet)
    return out.getvalue()


def test_times_count_from_the_start_of_the_media() -> None:
    expected = read_audio(file("wav")).samples
    for parts, picture, silent in (
        ([(1.94, 8.0)], True, [(0.0, 1.94)]),  # the sound of a video begins later
        ([(0.0, 3.0), (5.0, 8.0)], False, [(3.0, 5.0)]),  # a gap
    ):
        data = container(parts, picture=picture)
        clip = read_audio(data)
        assert clip.duration_s == pytest.approx(SECONDS, abs=0.01)
        for start_s, end_s in silent:
            silence = clip.samples[round(start_s * SAMPLE_RATE) + 300 : round(end_s * SAMPLE_RATE) - 300]
            assert np.abs(silence).max() < 1e-6
        for start_s, end_s in parts:
            part = slice(round(start_s * SAMPLE_RATE) + 500, round(end_s * SAMPLE_RATE) - 500)
            heard, spoken = clip.samples[part], expected[part]
            assert abs(shift_s(clip.samples, start_s + 0.1, end_s - 0.1)) < 0.002
            assert heard @ spoken / np.sqrt(heard @ heard * (spoken @ spoken)) > 0.9
        assert flags(read_audio(data, salvage=True).defects) == ([] if picture else ["gap"])
        assert probe(data).duration_s == pytest.approx(SECONDS, abs=0.05)
        whole = np.concatenate([block.samples for block in read_span(data, rate=None)])
        (part,) = read_span(data, 4 * RATE, 6 * RATE, rate=None)
        np.testing.assert_array_equal(part.samples, whole[4 * RATE : 6 * RATE])
    # Without pictures, the media starts where the sound does.
    assert read_audio(container([(1.94, 8.0)])).duration_s == pytest.approx(6.06, abs=0.01)


def stereo(kind: str) -> bytes:
    """Make a recording of 13 s whose channels are of opposite phase for its first 10 s."""
    left = np.tile(sound()[:, 0], 2)[: 13 * RATE]
    sign = np.where(np.arange(len(left)) < 10 * RATE, -1.0, 1.0)
    return media.write(np.stack([left, left * sign * 0.95], axis=1), RATE, *kind.split("/"))


@pytest.mark.parametrize("kind", ["WAV/FLOAT", "OGG/OPUS"])
def test_channels_that_cancel_each_other_out_are_not_mixed(kind: str) -> None:
    one = read_audio(media.write(sound(), RATE, "WAV", "FLOAT")).samples
    for gain in (0.95, 1.05):
        pair = media.write(np.stack([sound()[:, 0], -gain * sound()[:, 0]], axis=1), RATE, "WAV", "FLOAT")
        clip = read_audio(pair)
        np.testing.assert_allclose(clip.samples, one if gain < 1 else -gain * one, atol=1e-6)
        assert clip.defects == (AudioDefect(0.0, SECONDS, "phase_cancelled"),)
    data = stereo(kind)
    assert read_audio(data).defects == (AudioDefect(0.0, 10.0, "phase_cancelled"),)
    # Any span of it is a part of the whole.
    whole = np.concatenate([block.samples for block in read_span(data, rate=None)])
    for start, end in pairwise([0, 1, 100_000, 7 * RATE + 11, 12 * RATE, 13 * RATE]):
        part = np.concatenate([block.samples for block in read_span(data, start, end, rate=None)])
        np.testing.assert_array_equal(part, whole[start:end])


def test_defects_that_touch_are_one() -> None:
    found = [AudioDefect(5, 10, "a"), AudioDefect(0, 5, "a"), AudioDefect(2, 3, "b"), AudioDefect(12, 13, "a")]
    expected = (AudioDefect(0, 10, "a"), AudioDefect(2, 3, "b"), AudioDefect(12, 13, "a"))
    assert merge_defects(found * 2) == expected
