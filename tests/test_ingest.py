"""What reaches a training worker, without Ray: the planned batches, as the processor makes them, with bad clips masked and reported."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_speech import BROKEN, corpus, flac, row

from graft.audio import read_audio
from graft.corpus import RowReader, read_rows
from graft.engines import EngineRequest, Token
from graft.errors import DataError
from graft.processor import GraftProcessor
from graft.training.plan import Plan, PlannedBatch, PlanSettings
from graft.transcriber import Transcriber
from jobs.ingest import BatchLoader, Delivery, plan_columns, training_batches

SECONDS = [0.5, 1.234, 0.05, 2.0, 0.333, 0.75, 1.0, 0.21]


def clips(path: Path, **changes: dict[int, Any]) -> Path:
    """A corpus of clips of SECONDS; `changes` are columns with other values at some rows."""
    rows = []
    for index, seconds in enumerate(SECONDS):
        changed = {name: values[index] for name, values in changes.items() if index in values}
        wav = {"bytes": flac(seconds, index), "path": f"{index}.flac"}
        rows.append(row(f"clip{index}", index, **{"duration": seconds, "wav": wav, **changed}))
    corpus(path, rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_tiny_graft(tmp_path_factory.mktemp("ingest") / "graft")


@pytest.fixture(scope="module")
def processor(folder) -> GraftProcessor:
    return GraftProcessor.from_pretrained(folder)


def loader_of(data: Path, folder: Path, batches: list[PlannedBatch] | None = None) -> BatchLoader:
    return BatchLoader(Delivery(read_rows(str(data)), batches or [], filler_row=2, processor=str(folder)))


def test_a_batch_is_what_the_processor_makes_of_its_rows(folder, processor, tmp_path):
    loader = loader_of(clips(tmp_path / "a.parquet"), folder)
    rows = loader.delivery.rows
    reader = RowReader(rows.uris)
    chosen = (7, 0, 4)
    heard = [read_audio(reader.wav(rows.file[place], rows.row_group[place], rows.row[place])[0]) for place in chosen]
    expected = processor.training_batch([processor.example(clip, rows.texts[place]) for clip, place in zip(heard, chosen, strict=True)])
    batch = loader.load(PlannedBatch(chosen, position=5, step_position=6, step_label_count=77))
    for name, value in expected.items():
        assert np.array_equal(batch.pop(name), value), name
    assert batch.pop("audio_s") == pytest.approx(0.21 + 0.5 + 0.333)
    assert {name: value.item() for name, value in batch.items()} == {
        "position": 5,
        "step_position": 6,
        "step_label_count": 77,
        "clip_count": 3,
        "skipped": "[]",
    }


def test_a_clip_that_cannot_be_read_is_masked_and_reported_and_changes_no_count(folder, tmp_path):
    planned = PlannedBatch((0, 1, 3), position=1, step_position=1, step_label_count=30)
    good = loader_of(clips(tmp_path / "good.parquet"), folder).load(planned)
    long = {"bytes": flac(31), "path": "long.flac"}
    bad = loader_of(clips(tmp_path / "bad.parquet", wav={1: BROKEN["wav"], 3: long}), folder).load(planned)
    assert (bad["labels"][1:] == -100).all()
    length = int(good["attention_mask"][0].sum())
    assert np.array_equal(bad["labels"][0, :length], good["labels"][0, :length])
    assert bad["step_label_count"] == good["step_label_count"]
    assert bad["input_ids"].shape[0] == 3
    assert (good["clip_count"], bad["clip_count"]) == (3, 1)
    assert bad["audio_s"] == pytest.approx(read_rows(str(tmp_path / "bad.parquet")).duration_s[0])
    skipped = json.loads(str(bad["skipped"]))
    assert [clip["id"] for clip in skipped] == ["clip1", "clip3"]
    assert "broken.flac: not readable as audio" in skipped[0]["reason"]
    assert "over Whisper's 30 s" in skipped[1]["reason"]


def test_delivered_blocks_become_training_batches(folder, processor, tmp_path):
    data = clips(tmp_path / "a.parquet", wav={6: BROKEN["wav"]})
    plan = Plan(plan_columns(read_rows(str(data)), processor), PlanSettings(max_batch_clips=3))
    planned = plan.delivery(position=0, step_batches=2)
    loader = loader_of(data, folder, planned)
    skipped: list[dict[str, str]] = []
    batches = list(training_batches((loader({"id": np.array([number])}) for number in range(len(planned))), torch.device("cpu"), skipped))
    assert [batch.clip_count for batch in batches] == [len(one.rows) - (6 in one.rows) for one in planned]
    assert not planned[-1].rows
    assert [batch.inputs["input_ids"].shape[0] for batch in batches] == [len(one.rows) or 1 for one in planned]
    assert [(one.position, one.step_position, one.step_label_count) for one in batches] == [
        (one.position, one.step_position, one.step_label_count) for one in planned
    ]
    assert not (batches[-1].inputs["labels"] != -100).any()
    assert batches[-1].audio_s == 0
    assert sum(batch.audio_s for batch in batches) == pytest.approx(sum(SECONDS) - SECONDS[6], abs=1e-4)
    labels = sum(int((batch.inputs["labels"] != -100).sum()) for batch in batches)
    assert labels == plan.columns.label_counts.sum() - plan.columns.label_counts[6]
    assert [clip["id"] for clip in skipped] == ["clip6"]


def test_the_plan_knows_each_rows_length_before_it_is_read(folder, processor, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        clips(tmp_path / name)
    loader = loader_of(tmp_path, folder)
    columns = plan_columns(loader.delivery.rows, processor)
    for place in range(2 * len(SECONDS)):
        batch = loader.load(PlannedBatch((place,), 1, 1, 1))
        assert columns.label_counts[place] == (batch["labels"] != -100).sum()
        assert abs(columns.token_counts[place] - batch["input_ids"].shape[1]) <= 1
    assert columns.row_groups.tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": {2: "", 5: " \n"}}, "2 of 8 rows have no text, clip2 first"),
        ({"text": {3: None}}, "1 of 8 rows have no text, clip3 first"),
        ({"duration": {4: 30.5}}, "1 of 8 rows have audio over 30 s, clip4 first"),
    ],
    ids=["empty", "none", "long"],
)
def test_rows_that_cannot_be_trained_are_refused_with_the_remedy(processor, tmp_path, change, words):
    rows = read_rows(str(clips(tmp_path / "a.parquet", **change)))
    with pytest.raises(DataError, match=f"{words}: drop them with python -m jobs.prepare"):
        plan_columns(rows, processor)


class Listening:
    """An engine that keeps what it is asked and answers nothing."""

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        self.requests.append(request)
        for token in ():
            yield token

    def abort(self, request_id: str) -> None: ...

    def close(self) -> None: ...


def test_training_features_equal_serving_features_bit_for_bit(folder, processor, tmp_path):
    loader = loader_of(clips(tmp_path / "a.parquet"), folder)
    rows = loader.delivery.rows
    reader, engine = RowReader(rows.uris), Listening()
    transcriber = Transcriber(engine, processor, "listening")
    for place in range(len(SECONDS)):
        transcriber.transcribe(reader.wav(rows.file[place], rows.row_group[place], rows.row[place])[0])
    transcriber.close()
    for place, request in enumerate(engine.requests):
        batch = loader.load(PlannedBatch((place,), 1, 1, 1))
        assert np.array_equal(batch["input_features"][0], request.features.mel)
        assert batch["audio_frame_counts"].tolist() == [request.features.frame_count]
        is_prompt = batch["labels"][0] == -100
        assert batch["input_ids"][0][is_prompt].tolist() == request.prompt_ids
