"""Test reading without Ray: items hold all of their recordings once, and a bad file does not stop the ones after it."""

import itertools
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from graft.audio.chunking import ChunkSettings
from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.data.dataset import write_corpus
from jobs.transcription import assembly
from jobs.transcription.reader import FAULTS_IN_A_ROW, LONE_CRASHES, ItemReader, Reading
from tests.support import media
from tests.support.work_items import QUICK, chunks_of, items_of, long_recording, read


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return long_recording(tmp_path_factory.mktemp("bulk"))


def test_items_hold_all_of_a_recording_once(recording):
    settings = ChunkSettings(max_s=5.0, skip_silence=False)
    items = items_of(recording, item_s=12.0)
    assert len(items) == 4
    whole = np.concatenate([samples for _, _, samples in chunks_of(read(items_of(recording), chunks=settings))])
    parts = chunks_of(read(items, chunks=settings))
    ends = 0
    for start_s, _, samples in parts:
        assert round(start_s * SAMPLE_RATE) == ends
        assert len(samples) <= 5 * SAMPLE_RATE
        ends += len(samples)
    assert ends == len(whole) == 46.3 * SAMPLE_RATE
    np.testing.assert_allclose(np.concatenate([samples for _, _, samples in parts]), whole, atol=1e-6)
    assert sum(read(items, chunks=settings)["duration_s"].to_pylist()) == pytest.approx(46.3)


@pytest.mark.parametrize("kind", ["vbr.mp3", "live.webm"])
def test_items_of_formats_that_cannot_be_sought_hold_all_once(kind, tmp_path):
    """Their headers have no length or a wrong one: FFmpeg's VBR without a frame count, and webm from a live stream."""
    samples = media.speech(48_000, channels=1)
    if kind == "vbr.mp3":
        data = media.encode(samples, 48_000, "libmp3lame", "mp3", write_xing="0")
    else:
        data = media.encode(samples, 48_000, "libopus", "webm", seekable=False, live="1")
    path = tmp_path / kind
    path.write_bytes(data)
    settings = ChunkSettings(max_s=5.0, skip_silence=False)
    items = items_of(path, item_s=12.0)
    assert len(items) == 4
    cut = chunks_of(read(items, chunks=settings))
    ends = np.cumsum([len(part) for _, _, part in cut])
    assert [round(start_s * SAMPLE_RATE) for start_s, _, _ in cut] == [0, *ends[:-1]]
    np.testing.assert_allclose(np.concatenate([part for _, _, part in cut]), read_audio(path).samples, atol=1e-6)


def test_channels_are_cut_each_by_itself(recording):
    samples = media.speech(8000, channels=2)
    apart = np.stack(
        [
            np.concatenate([samples[:, 0], np.zeros(len(samples))]),
            np.concatenate([np.zeros(len(samples)), samples[:, 0]]),
        ],
        1,
    )
    path = recording.parent.parent / "apart.wav"
    soundfile.write(path, apart, 8000)
    cut = chunks_of(read(items_of(path), channels="split"))
    assert {channel for _, channel, _ in cut} == {1, 2}
    assert all((channel == 2) == (start_s > 46.0) for start_s, channel, _ in cut)
    assert {channel for _, channel, _ in chunks_of(read(items_of(path)))} == {None}


def test_rows_of_parquet_are_read_and_what_fails_has_its_error(tmp_path, recording):
    blank = {"spk_id": "", "sex": "", "text": ""}
    rows = [("good", recording.read_bytes(), 46.3), ("bad", b"no audio", 1.0), ("long", recording.read_bytes(), 46.3)]
    write_corpus(
        [blank | {"ID": name, "duration": s, "wav": {"bytes": wav, "path": ""}} for name, wav, s in rows],
        tmp_path / "c.parquet",
    )
    table = read(items_of(tmp_path / "c.parquet", item_s=25.0))
    assert len(table) == 5
    errors = table["error"].to_pylist()
    assert [error is None for error in errors] == [True, True, False, True, True]
    assert errors[2].startswith("bad: not readable as audio")
    broken = items_of(tmp_path / "c.parquet", item_s=25.0).to_pylist()[2] | {"error": errors[2]}
    assert (
        assembly._kind(assembly.reason_of(broken)) == "not readable as audio"
    )  # by which failures are counted, whatever their names
    missing = read(items_of(tmp_path / "gone.wav"))
    assert missing["error"].to_pylist() == [
        f"{tmp_path}/gone.wav: No such file or directory: give the path of a readable audio file"
    ]
    assert missing["chunks"].to_pylist() == [[]]


class Dying(ItemReader):
    """A reader whose process is killed by one recording, as by a decoder that crashes, and that fails on others."""

    def _decode(self, item):
        if item["recording"] == "deadly.flac":
            os.kill(os.getpid(), signal.SIGKILL)
        if item["recording"].startswith("odd"):
            raise IndexError("from deep\nwithin a decoder")
        return super()._decode(item)


def read_until_death(items: pa.Table, notes: Path, results: Path) -> None:
    pq.write_table(pa.concat_tables(Dying(Reading(QUICK, ChunkSettings()), notes)(items)), results)


@pytest.mark.processes
def test_an_item_that_ends_its_reader_every_time_becomes_an_error(tmp_path):
    """The batch is given to one process after the other, as Ray does."""
    (tmp_path / "notes").mkdir()
    for name in ["a.flac", "deadly.flac", "z.flac"]:
        shutil.copy(media.PROMPTS[0], tmp_path / name)
    items, results = items_of(tmp_path), tmp_path / "results.parquet"
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__])
    codes = []
    while not results.exists():
        process = fresh.Process(target=read_until_death, args=(items, tmp_path / "notes", results))
        process.start()
        process.join()
        codes.append(process.exitcode)
        assert len(codes) < 10
    assert codes == [-signal.SIGKILL] * (1 + LONE_CRASHES) + [0]
    table = pq.read_table(results)
    assert [row["error"] is None for row in table.to_pylist()] == [True, False, True]
    assert (
        table["error"][1]
        .as_py()
        .startswith(f"{tmp_path}/deadly.flac: the decoder crashed on this file 3 times; it is skipped: ")
    )
    assert [len(row["chunks"]) for row in table.to_pylist()] == [1, 0, 1]


def test_what_was_only_there_when_its_readers_died_is_read(tmp_path):
    """Nodes are lost at any time: each of these readers is killed while it reads another item."""
    items, notes = three_items(tmp_path)
    for name in ("a.flac", "b.flac", "c.flac"):
        with pytest.raises(Killed):
            list(KilledAt(name, notes)(items))
    table = pa.concat_tables(ItemReader(Reading(QUICK, ChunkSettings()), notes)(items))
    assert table["error"].to_pylist() == [None] * 3
    assert len(list(notes.iterdir())) == 3  # its own is taken back


def test_what_waits_to_be_taken_is_not_being_read(tmp_path):
    """An engine that does not start ends runs while rows that were read wait."""
    items, notes = three_items(tmp_path)
    for number in range(1 + LONE_CRASHES + 1):
        reading = ItemReader(Reading(QUICK, ChunkSettings()), notes)(items)
        next(reading)
        leave_note(notes, f"of a run {number}")
        reading.close()
    table = pa.concat_tables(ItemReader(Reading(QUICK, ChunkSettings()), notes)(items))
    assert table["error"].to_pylist() == [None] * 3


class Killed(BaseException):
    """Stands for the kill of a process: nothing catches it."""


class KilledAt(ItemReader):
    """A reader that is killed while it reads one recording; its note stays."""

    def __init__(self, name: str, notes: Path) -> None:
        super().__init__(Reading(QUICK, ChunkSettings()), notes)
        self._name, self._notes = name, notes

    def _decode(self, item):
        if item["recording"] == self._name:
            leave_note(self._notes, f"of one killed at {self._name}")
            raise Killed
        return super()._decode(item)


def leave_note(notes: Path, name: str) -> None:
    """Rename the note, as if the process that wrote it had no time to remove it."""
    (note,) = (path for path in notes.iterdir() if not path.name.startswith("of"))
    note.rename(note.with_name(name))


def three_items(folder: Path) -> tuple[pa.Table, Path]:
    for name in "abc":
        shutil.copy(media.PROMPTS[0], folder / f"{name}.flac")
    items, notes = items_of(folder), folder / "notes"
    notes.mkdir()
    return items, notes


def test_what_no_one_thought_of_is_an_error_but_not_one_after_the_other(tmp_path):
    for number in range(FAULTS_IN_A_ROW + 2):
        shutil.copy(media.PROMPTS[0], tmp_path / f"odd{number}.flac")
    shutil.copy(media.PROMPTS[0], tmp_path / "a.flac")
    items = items_of(tmp_path)
    tables = Dying(Reading(QUICK, ChunkSettings()))(items)
    read = [table["error"][0].as_py() for table in itertools.islice(tables, 1 + FAULTS_IN_A_ROW)]
    assert read == [None] + [
        f"{tmp_path}/odd{number}.flac: reading it failed: IndexError: from deep within a decoder"
        for number in range(FAULTS_IN_A_ROW)
    ]
    with pytest.raises(IndexError):
        next(tables)


def test_few_row_groups_are_held_of_however_many_files(tmp_path):
    blank = {"spk_id": "", "sex": "", "text": ""}
    wav = {"bytes": media.PROMPTS[0].read_bytes(), "path": ""}
    for number in range(10):
        write_corpus([blank | {"ID": f"{number}", "duration": 1.0, "wav": wav}], tmp_path / f"{number}.parquet")
    reader = ItemReader(Reading(QUICK, ChunkSettings()))
    table = pa.concat_tables(reader(items_of(tmp_path)))
    assert table["error"].null_count == len(table) == 10
    assert reader._corpora._audio.cache_info().currsize < 10


def test_silence_has_no_chunks(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(5 * SAMPLE_RATE), SAMPLE_RATE)
    table = read(items_of(tmp_path / "silence.wav"))
    assert table["error"].to_pylist() == [None]
    assert table["duration_s"].to_pylist() == [5.0]
    assert chunks_of(table) == []


def test_what_is_wrong_with_the_audio_is_in_the_row(tmp_path):
    data = media.write(media.speech(16_000, seconds=6, channels=1), 16_000, "WAV", "PCM_16")
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    (table,) = ItemReader(Reading(QUICK, ChunkSettings()))(items_of(tmp_path))
    (row,) = table.select(["error", "duration_s", "defects"]).to_pylist()
    assert row["error"] is None
    (defect,) = row["defects"]
    assert defect["flag"] == "truncated_file"
    assert (defect["start_s"], defect["end_s"]) == pytest.approx((row["duration_s"], 6.0), abs=0.01)
