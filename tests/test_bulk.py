"""The bulk pipeline's two sides without Ray: items are read and cut as the whole is, and heard as the Transcriber hears."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import tiny
import tiny_media

from graft.audio import SAMPLE_RATE
from graft.chunking import ChunkSettings
from graft.corpus import write_corpus
from graft.errors import ModelError
from graft.speech import SpeechSettings
from graft.transcriber import Transcriber, load
from jobs.archive import find_recordings
from jobs.bulk import FAULTS_IN_A_ROW, READ, RESULTS, ItemListener, ItemReader, Reading
from jobs.items import durations, plan_items

QUICK = SpeechSettings(detector="energy")


def items_of(*sources: Path, item_s: float = 1800.0) -> pa.Table:
    return plan_items(find_recordings([str(source) for source in sources]), item_s=item_s, probe=durations)


def read(items: pa.Table, **changed) -> pa.Table:
    reader = ItemReader(Reading(**{"speech": QUICK, "chunks": ChunkSettings(max_s=5.0)} | changed))
    table = pa.concat_tables(reader(items))
    assert table.schema == READ
    return table


def chunks_of(table: pa.Table) -> list[tuple[float, int | None, np.ndarray]]:
    parts = (chunk for row in table["chunks"].to_pylist() for chunk in row)
    return [(chunk["start_s"], chunk["channel"], np.frombuffer(chunk["samples"], np.float32)) for chunk in parts]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bulk") / "calls" / "long.flac"
    path.parent.mkdir()
    soundfile.write(path, tiny_media.speech(8000, channels=2), 8000)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_tiny_graft(tmp_path_factory.mktemp("bulk") / "tiny")


@pytest.fixture(scope="module")
def transcriber(folder):
    opened = load(folder)
    yield opened
    opened.close()


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


def test_channels_are_cut_each_by_itself(recording):
    samples = tiny_media.speech(8000, channels=2)
    apart = np.stack([np.concatenate([samples[:, 0], np.zeros(len(samples))]), np.concatenate([np.zeros(len(samples)), samples[:, 0]])], 1)
    path = recording.parent.parent / "apart.wav"
    soundfile.write(path, apart, 8000)
    cut = chunks_of(read(items_of(path), channels="split"))
    assert {channel for _, channel, _ in cut} == {1, 2}
    assert all((channel == 2) == (start_s > 46.0) for start_s, channel, _ in cut)
    assert {channel for _, channel, _ in chunks_of(read(items_of(path)))} == {None}


def test_rows_of_parquet_are_read_and_what_fails_has_its_error(tmp_path, recording):
    blank = {"spk_id": "", "sex": "", "text": ""}
    rows = [("good", recording.read_bytes(), 46.3), ("bad", b"no audio", 1.0), ("long", recording.read_bytes(), 46.3)]
    write_corpus([blank | {"ID": name, "duration": s, "wav": {"bytes": wav, "path": ""}} for name, wav, s in rows], tmp_path / "c.parquet")
    table = read(items_of(tmp_path / "c.parquet", item_s=25.0))
    assert len(table) == 5
    errors = table["error"].to_pylist()
    assert [error is None for error in errors] == [False, True, True, True, True]
    assert errors[0].startswith("bad: not readable as audio")
    missing = read(items_of(tmp_path / "gone.wav"))
    assert missing["error"].to_pylist() == [f"{tmp_path}/gone.wav: No such file or directory: give the path of a readable audio file"]
    assert missing["chunks"].to_pylist() == [[]]


def test_silence_has_no_chunks(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(5 * SAMPLE_RATE), SAMPLE_RATE)
    table = read(items_of(tmp_path / "silence.wav"))
    assert table["error"].to_pylist() == [None]
    assert table["duration_s"].to_pylist() == [5.0]
    assert chunks_of(table) == []


def test_a_listener_hears_what_the_transcriber_hears(recording, transcriber):
    sources = [recording, *tiny_media.PROMPTS[:3]]
    reading = {"speech": SpeechSettings(), "chunks": ChunkSettings()}
    table = read(items_of(*sources), **reading)
    heard = ItemListener(lambda: transcriber, {})(table)
    assert heard.schema == RESULTS
    names = find_recordings([str(source) for source in sources])["uri"].to_pylist()
    for uri, row in zip(names, heard.to_pylist(), strict=True):
        expected = transcriber.transcribe(uri)
        assert row["duration_s"] == pytest.approx(expected.duration_s, abs=1e-3)
        assert [part["text"] for part in row["segments"]] == [segment.text for segment in expected.segments]
        assert [part["start_s"] for part in row["segments"]] == [segment.start_s for segment in expected.segments]
        assert [tuple(part["flags"]) for part in row["segments"]] == [segment.flags for segment in expected.segments]


def test_an_item_on_which_the_engine_fails_is_an_error_but_not_one_after_the_other(recording, folder):
    class Failing(Transcriber):
        async def transcribe_chunks(self, chunks, **wording):
            if chunks[0].start_s > 1:
                raise MemoryError("not enough memory\nfor one request")
            return await super().transcribe_chunks(chunks, **wording)

    opened = load(folder)
    failing = Failing(opened._engine, opened._processor, "failing")
    table = read(items_of(recording, item_s=23.0))
    result = ItemListener(lambda: failing, {})(table).to_pylist()
    assert [row["error"] for row in result] == [None, "the engine failed: MemoryError: not enough memory for one request"]
    assert len(result[0]["segments"]) > 1
    assert result[1]["segments"] == []
    listener = ItemListener(lambda: failing, {})
    last = table.slice(1)
    for _ in range(FAULTS_IN_A_ROW):
        listener(last)
    with pytest.raises(MemoryError):
        listener(last)
    with pytest.raises(ModelError, match="instruction 'poem'"):
        ItemListener(lambda: opened, {"instruction": "poem"})(table)
    opened.close()
