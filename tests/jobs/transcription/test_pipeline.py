"""Test the workers without Ray: they transcribe as the Transcriber does, and tell an item's fault from the engine's."""

from pathlib import Path

import pytest

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.errors import ModelError
from graft.inference.transcriber import Transcriber, open_transcriber
from jobs.transcription.discovery import find_recordings
from jobs.transcription.pipeline import RESULTS, ItemTranscriber
from jobs.transcription.reader import FAULTS_IN_A_ROW
from tests.support import media, tiny_models
from tests.support.speech_corpus import save_tiny_whisper
from tests.support.work_items import items_of, long_recording, read


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return long_recording(tmp_path_factory.mktemp("bulk"))


@pytest.fixture(scope="module", params=["graft", "whisper"])
def folder(request, tmp_path_factory) -> Path:
    save = tiny_models.save_tiny_graft if request.param == "graft" else save_tiny_whisper
    return Path(save(tmp_path_factory.mktemp("bulk") / "tiny"))


@pytest.fixture(scope="module")
def transcriber(folder):
    opened = open_transcriber(folder)
    yield opened
    opened.close()


@pytest.mark.seconds
def test_items_are_transcribed_as_by_the_transcriber(recording, transcriber):
    sources = [recording, *media.PROMPTS[:3]]
    reading = {"speech": SpeechSettings(), "chunks": ChunkSettings()}
    table = read(items_of(*sources), **reading)
    results = ItemTranscriber(lambda: transcriber, {})(table)
    assert results.schema == RESULTS
    names = find_recordings([str(source) for source in sources])["uri"].to_pylist()
    for uri, row in zip(names, results.to_pylist(), strict=True):
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

    opened = open_transcriber(folder)
    failing = Failing(opened._engine, opened._processor, "failing")
    table = read(items_of(recording, item_s=23.0))
    result = ItemTranscriber(lambda: failing, {})(table).to_pylist()
    assert [row["error"] for row in result] == [
        None,
        "the engine failed: MemoryError: not enough memory for one request",
    ]
    assert len(result[0]["segments"]) > 1
    assert result[1]["segments"] == []
    worker = ItemTranscriber(lambda: failing, {})
    last = table.slice(1)
    for _ in range(FAULTS_IN_A_ROW):
        worker(last)
    with pytest.raises(MemoryError):
        worker(last)
    with pytest.raises(ModelError, match="instruction 'poem'"):
        ItemTranscriber(lambda: opened, {"instruction": "poem"})(table)
    opened.close()
