"""Spans of a recording are its very samples, meet without a gap, and are read in bounded memory from any location."""

import functools
import io
import tracemalloc
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.fs as pafs
import pytest
import soxr

from graft.audio.chunking import QUIET_S, SEARCH_S
from graft.audio.clip import read_audio
from graft.audio.spans import Block, probe, read_span
from graft.errors import AudioError
from graft.storage.source import AudioSource
from tests.support import hub_server, media

EXACT = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "adpcm.wav": ("WAV", "IMA_ADPCM"),
    "rf64": ("RF64", "PCM_24"),
    "w64": ("W64", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "ULAW"),
    "alac.caf": ("CAF", "ALAC_16"),
}
INEXACT = {
    "ogg": lambda: media.write(media.speech(44_100), 44_100, "OGG", "VORBIS"),
    "opus": lambda: media.write(media.speech(48_000), 48_000, "OGG", "OPUS"),
    "mp3": lambda: media.encode(media.speech(44_100), 44_100, "libmp3lame", "mp3"),
    "uncounted.mp3": lambda: media.encode(media.speech(44_100), 44_100, "libmp3lame", "mp3", write_xing="0"),
    "m4a": lambda: media.encode(media.speech(44_100), 44_100, "aac", "ipod"),
    "live.webm": lambda: media.encode(media.speech(48_000), 48_000, "libopus", "webm", seekable=False, live="1"),
}

KINDS = [*EXACT, *(pytest.param(kind, marks=pytest.mark.seconds) for kind in INEXACT)]


@functools.cache
def recording(kind: str) -> bytes:
    return INEXACT[kind]() if kind in INEXACT else media.write(media.speech(44_100), 44_100, *EXACT[kind])


def joined(blocks: list[Block]) -> np.ndarray:
    """Join the samples of blocks, which must follow each other."""
    for one, other in pairwise(blocks):
        assert other.start == one.start + len(one.samples)
    return np.concatenate([block.samples for block in blocks])


def frames(source: AudioSource, start: int = 0, end: int | None = None, **how: str) -> np.ndarray:
    """Read a span at the source's own rate, (frames, channels)."""
    return joined(list(read_span(source, start, end, rate=None, channels="split", **how)))


@functools.cache
def whole(kind: str) -> np.ndarray:
    return frames(recording(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_says_what_there_is(kind: str) -> None:
    info = probe(recording(kind))
    assert (info.rate, info.channels) == (48_000 if "opus" in kind or "webm" in kind else 44_100, 2)
    assert info.exact_seek == (kind in EXACT)
    if kind in EXACT:
        assert info.duration_s == len(whole(kind)) / info.rate
    elif kind == "live.webm":
        assert info.duration_s is None
    else:
        assert info.duration_s == pytest.approx(46.3, rel=0.5 if kind == "uncounted.mp3" else 0.01)


class Counted(io.BytesIO):
    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.seconds
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "uncounted.mp3", "m4a", "live.webm"])
def test_a_header_is_read_without_the_rest(kind: str) -> None:
    data = recording(kind)
    file = Counted(data + data[: len(data) // 2] * 20 if "mp3" in kind or kind == "live.webm" else data)
    probe(file)
    assert file.count < 5 * 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_any_span_is_a_part_of_the_whole_bit_by_bit(kind: str) -> None:
    count = len(whole(kind))
    assert count >= 46 * 44_100
    places = [
        0,
        1,
        1105,
        4096,
        *np.random.default_rng(0).integers(0, count - 50_000, 6 if kind in EXACT else 2).tolist(),
        count - 30_000,
    ]
    for start in places:
        np.testing.assert_array_equal(
            frames(recording(kind), start, start + 40_000), whole(kind)[start : start + 40_000]
        )


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000, 96_000])
def test_spans_become_the_samples_that_the_whole_becomes(rate: int) -> None:
    data = media.write(media.speech(rate, seconds=20.37), rate, "FLAC", "PCM_16")
    expected = read_audio(data).samples
    np.testing.assert_array_equal(joined(list(read_span(data))), expected)
    edges = [0, 5 * rate, 5 * rate + 7, int(12.3456 * rate), None]
    parts = [list(read_span(data, start, end)) for start, end in pairwise(edges)]
    np.testing.assert_allclose(
        joined([block for part in parts for block in part]), expected, rtol=0, atol=0 if rate == 16_000 else 3e-7
    )
    for (first, *_), start in zip(parts, edges, strict=False):
        assert first.start == pytest.approx(start * 16_000 / rate, abs=0.5)


def test_channels_are_mixed_or_split() -> None:
    data = recording("wav")
    split = joined(list(read_span(data, 44_100, 88_200, channels="split")))
    assert split.shape == (16_000, 2)
    for channel in range(2):
        np.testing.assert_allclose(
            split[:, channel], soxr.resample(whole("wav")[:, channel], 44_100, 16_000)[16_000:32_000], atol=3e-7
        )
    np.testing.assert_allclose(split.mean(axis=1), joined(list(read_span(data, 44_100, 88_200))), atol=3e-7)


@pytest.mark.seconds
@pytest.mark.parametrize("item_s", [10.0, 12.7, 21.5])
@pytest.mark.parametrize("kind", ["wav", "mp3", "uncounted.mp3", "live.webm"])
def test_items_with_quiet_borders_lose_and_repeat_nothing(kind: str, item_s: float) -> None:
    data, rate = recording(kind), probe(recording(kind)).rate
    edges = [*range(0, round(45 * rate), round(item_s * rate)), None]
    items = [frames(data, start, end, borders="quiet") for start, end in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(items), whole(kind))
    ends = np.cumsum([len(item) for item in items[:-1]])
    assert (np.abs(ends - edges[1:-1]) <= SEARCH_S * rate).all()
    assert (ends != edges[1:-1]).any()
    loudness = np.sqrt(np.mean(whole(kind) ** 2))
    for end in ends:
        quiet = whole(kind)[end - round(QUIET_S / 2 * rate) : end + round(QUIET_S / 2 * rate)]
        assert np.sqrt(np.mean(quiet**2)) < loudness / 2


@pytest.mark.seconds
def test_items_at_16_khz_are_the_samples_of_the_whole() -> None:
    for kind in ("wav", "live.webm"):
        data, rate = recording(kind), probe(recording(kind)).rate
        edges = [0, 15 * rate, 29 * rate, None]
        blocks = [block for start, end in pairwise(edges) for block in read_span(data, start, end, borders="quiet")]
        np.testing.assert_allclose(joined(blocks), read_audio(data).samples, rtol=0, atol=3e-7)


def test_a_border_is_in_the_middle_of_the_pause_that_both_neighbours_find() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (40 * 16_000, 1))
    for pause_s in (16.2, 24.75):
        samples[round(pause_s * 16_000) : round((pause_s + 0.2) * 16_000)] = 0
    data = media.write(samples, 16_000, "WAV", "PCM_16")
    # Both pauses are in reach and equally quiet: the last one wins.
    assert len(frames(data, 0, 20 * 16_000, borders="quiet")) == round(24.85 * 16_000)
    assert next(read_span(data, 20 * 16_000, borders="quiet")).start == round(24.85 * 16_000)
    assert len(frames(data, 0, 15 * 16_000, borders="quiet")) == round(16.3 * 16_000)


@pytest.mark.seconds
def test_a_recording_may_end_before_its_items_do() -> None:
    data = media.write(media.speech(16_000, seconds=23.0, channels=1), 16_000, "FLAC")
    count = 23 * 16_000
    for last in (18, 20, 25, 28, 100):
        edges = [0, last * 16_000, (last + 30) * 16_000, None]
        items = [[block for block in read_span(data, start, end, borders="quiet")] for start, end in pairwise(edges)]
        assert len(joined([block for item in items for block in item])) == count
        assert items[2] == []
    assert list(read_span(data, count)) == []
    assert list(read_span(recording("mp3"), 10**9)) == []


def test_spans_that_cannot_be_are_refused() -> None:
    for start, end, borders in [(0, 9 * 44_100, "quiet"), (44_100, 44_099, "exact"), (-1, None, "exact")]:
        with pytest.raises(ValueError, match=f"from frame {start} to {end}"):
            next(read_span(recording("wav"), start, end, borders=borders))


def test_what_is_wrong_elsewhere_spoils_no_span() -> None:
    samples = media.speech(16_000, seconds=30.0).copy()
    samples[25 * 16_000] = np.nan
    data = media.write(samples, 16_000, "WAV", "FLOAT")
    assert sum(len(block.samples) for block in read_span(data, 0, 20 * 16_000)) == 20 * 16_000
    with pytest.raises(AudioError, match="row 7: holds NaN"):
        list(read_span(data, 20 * 16_000, name="row 7"))


@pytest.mark.seconds
@pytest.mark.parametrize("kind", ["wav", "mp3"])
def test_no_more_is_decoded_than_allowed(kind: str) -> None:
    data = recording(kind)
    assert frames(data, 0, 40 * 44_100, max_s=40.0).shape[0] == 40 * 44_100
    for start, end in [(0, None), (0, 41 * 44_100), (44 * 44_100, 45 * 44_100)]:
        with pytest.raises(AudioError, match="over the limit of 40 s"):
            frames(data, start, end, max_s=40.0)


@pytest.mark.seconds
@pytest.mark.parametrize("kind", ["wav", "mp3"])
def test_memory_is_bounded_however_long_the_recording(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"long.{kind}"
    if kind == "wav":
        path.write_bytes(media.write(np.zeros((0, 2)), 44_100, "WAV", "PCM_16"))
        with path.open("r+b") as file:
            file.seek(40)
            file.write(b"\xff" * 4)
            file.truncate(1_500 * 44_100 * 4)
    else:
        path.write_bytes(recording("uncounted.mp3") * 10)
    tracemalloc.start()
    try:
        count = sum(len(block.samples) for block in read_span(path, 44_100, 400 * 44_100, borders="quiet"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count > 390 * 16_000
    assert peak < 40 * 2**20  # 400 s are 141 MB


def test_of_a_wav_a_span_is_fetched_and_no_more() -> None:
    file = Counted(recording("wav"))
    assert len(frames(file, 40 * 44_100, 41 * 44_100)) == 44_100
    assert file.count <= 3 * 2**20  # Of 8 MB, it reads the header, which libsndfile comes back to, and the span.


def test_places_and_open_files_of_other_libraries_are_read_alike(tmp_path: Path) -> None:
    data, path = recording("mp3"), tmp_path / "a.mp3"
    path.write_bytes(data)
    expected = read_audio(data).samples
    with fsspec.filesystem("memory").open("/a.mp3", "wb") as file:
        file.write(data)
    with (
        pafs.LocalFileSystem().open_input_file(str(path)) as arrow,
        fsspec.open("memory:///a.mp3", "rb") as memory,
        path.open("rb") as plain,
    ):
        for source in (arrow, memory, plain, path, str(path), path.as_uri()):
            np.testing.assert_array_equal(read_audio(source).samples, expected)
        plain.read(100)  # An open file is read from its start, whatever its position is.
        np.testing.assert_array_equal(joined(list(read_span(plain))), expected)


def test_a_web_server_is_read_by_ranges_and_may_stumble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.storage.locations.RETRY_WAITS_S", (0.01,) * 4)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.flac").write_bytes(recording("flac"))
    with hub_server.serve(tmp_path) as hub:
        uri = f"{hub.url}/files/a/b.flac"
        np.testing.assert_array_equal(frames(uri), whole("flac"))
        assert hub.bytes_sent() == len(recording("flac"))
        hub.faults["data"] = ["503", "drop", "", "500", "", "short"]
        np.testing.assert_array_equal(frames(uri), whole("flac"))
        hub.faults["data"] = ["", "", *["503"] * 5]
        with pytest.raises(AudioError, match="503") as error:
            frames(uri)
        assert "\n" not in str(error.value)
        with pytest.raises(AudioError, match="no such file"):
            read_audio(f"{hub.url}/files/a/c.flac")
