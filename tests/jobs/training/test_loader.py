"""Test loading without Ray: planned batches with the processor's arrays, bad clips masked and reported."""

import json
import pickle
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.audio.clip import read_audio
from graft.data.dataset import RowReader, read_rows
from graft.data.settings import AugmentRecipe
from graft.errors import DataError
from graft.inference.engines.protocol import EngineRequest, Token
from graft.inference.transcriber import Transcriber
from graft.processor import GraftProcessor
from graft.text.instructions import InstructionRecipe
from graft.training.plan import Plan, PlannedBatch, PlanSettings
from jobs.training.loader import BatchLoader, LoaderSpec, prefetch, training_batches
from jobs.training.samples import Variation, plan_columns, plan_training, trainable, vary
from tests.support import tiny_models
from tests.support.speech_corpus import BROKEN, WORDS, corpus, flac, row
from tests.support.training import load

SECONDS = [0.5, 1.234, 0.05, 2.0, 0.333, 0.75, 1.0, 0.21]


def clips(path: Path, **changes: dict[int, Any]) -> Path:
    """Write a corpus of clips of SECONDS; `changes` replaces values of columns at some rows."""
    rows = []
    for index, seconds in enumerate(SECONDS):
        changed = {name: values[index] for name, values in changes.items() if index in values}
        wav = {"bytes": flac(seconds, index), "path": f"{index}.flac"}
        rows.append(row(f"clip{index}", index, **{"duration": seconds, "wav": wav, **changed}))
    corpus(path, rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("ingest") / "graft")


@pytest.fixture(scope="module")
def processor(folder) -> GraftProcessor:
    return GraftProcessor.from_pretrained(folder)


def loader_of(data: Path, folder: Path, batches: Sequence[PlannedBatch] = (), **more: Any) -> BatchLoader:
    return BatchLoader(LoaderSpec(read_rows(str(data)), batches, str(folder), **more))


def blocks(loader: BatchLoader) -> Iterator[dict[str, np.ndarray]]:
    """Make all batches as Ray's actors do."""
    windows = range(int(loader.spec.batches.windows[-1]) + 1)
    return (loader.block(batch) for number in windows for batch in loader.reader.window(number))


def planned(*rows: int, **numbers: int) -> PlannedBatch:
    return PlannedBatch(rows, rows, **{"position": 1, "step_position": 1, "step_label_count": 1, **numbers})


def test_a_batch_has_the_processors_arrays_of_its_rows(folder, processor, tmp_path):
    loader = loader_of(clips(tmp_path / "a.parquet"), folder)
    rows = loader.spec.rows
    reader = RowReader(rows.files)
    chosen = (7, 0, 4)
    chosen_clips = [
        read_audio(reader.wav(rows.file[place], rows.row_group[place], rows.row[place])[0]) for place in chosen
    ]
    expected = processor.training_batch(
        [processor.example(clip, rows.text(place)) for clip, place in zip(chosen_clips, chosen, strict=True)]
    )
    batch = load(loader, planned(*chosen, position=5, step_position=6, step_label_count=77))
    token_count = int(expected["attention_mask"].sum())
    for name, value in expected.items():
        assert np.array_equal(batch.pop(name), value), name
    assert batch.pop("audio_s") == pytest.approx(0.21 + 0.5 + 0.333)
    assert {name: value.item() for name, value in batch.items()} == {
        "position": 5,
        "step_position": 6,
        "step_label_count": 77,
        "ids": '["clip7", "clip0", "clip4"]',
        "token_count": token_count,
        "skipped": "[]",
    }


def test_a_clip_that_cannot_be_read_is_masked_and_reported_and_changes_no_count(folder, tmp_path):
    batch = planned(0, 1, 3, step_label_count=30)
    good = load(loader_of(clips(tmp_path / "good.parquet"), folder), batch)
    long = {"bytes": flac(31), "path": "long.flac"}
    bad = load(loader_of(clips(tmp_path / "bad.parquet", wav={1: BROKEN["wav"], 3: long}), folder), batch)
    assert (bad["labels"][1:] == -100).all()
    length = int(good["attention_mask"][0].sum())
    assert np.array_equal(bad["labels"][0, :length], good["labels"][0, :length])
    assert bad["step_label_count"] == good["step_label_count"]
    assert bad["input_ids"].shape[0] == 3
    assert (json.loads(str(good["ids"])), json.loads(str(bad["ids"]))) == (["clip0", "clip1", "clip3"], ["clip0"])
    assert bad["token_count"] == length
    assert bad["audio_s"] == pytest.approx(SECONDS[0])
    skipped = json.loads(str(bad["skipped"]))
    assert [clip["id"] for clip in skipped] == ["clip1", "clip3"]
    assert "broken.flac: not readable as audio" in skipped[0]["reason"]
    assert "over Whisper's 30 s" in skipped[1]["reason"]


def test_a_clip_longer_than_the_data_says_never_takes_its_batch_over_the_budget(folder, processor, tmp_path):
    """Its batch is planned of 64 clips; short excess that fits is no fault."""
    lengths = dict.fromkeys((f"clip{index}" for index in range(61)), 1.0) | {
        "long": 29.0,
        "fits": 1.2,
        "endless": 200.0,
    }
    said = [row(name, 7, duration=1.0, wav={"bytes": flac(s, 7), "path": ""}) for name, s in lengths.items()]
    rows = read_rows(corpus(tmp_path / "lies.parquet", said))
    budget = 64 * (int(plan_columns(rows, processor).token_counts.max()) + 8)
    batches = plan_training(rows, processor, PlanSettings(token_budget=budget)).batches(position=0, step_batches=1)
    assert [len(batch.rows) for batch in batches] == [64]
    loaded = load(BatchLoader(LoaderSpec(rows, batches, str(folder), token_budget=budget)), batches[0])
    assert loaded["input_ids"].size <= budget
    faults = {clip["id"]: clip["reason"] for clip in json.loads(str(loaded["skipped"]))}
    reason = f"lasts 29.00 s where the data says 1.00 s, so that its batch would exceed token_budget={budget}"
    assert faults.pop("long") == reason
    assert "over the limit of 60 s" in faults.pop("endless")
    assert not faults


def test_a_noise_clip_that_cannot_be_read_masks_its_sample_and_is_named(folder, tmp_path):
    noise = read_rows(corpus(tmp_path / "noise.parquet", [row("hum", 0, **BROKEN)]))
    variation = Variation(np.zeros(0), AugmentRecipe(noise={"share": 1.0, "data": "noise.parquet"}), noise)
    loaded = load(loader_of(clips(tmp_path / "a.parquet"), folder, variation=variation), planned(0))
    (fault,) = json.loads(str(loaded["skipped"]))
    assert fault["reason"].startswith("noise clip hum: broken.flac: not readable")


def test_blocks_become_training_batches(folder, processor, tmp_path):
    data = clips(tmp_path / "a.parquet", wav={6: BROKEN["wav"]})
    plan = Plan(plan_columns(read_rows(str(data)), processor), PlanSettings(max_batch_clips=3))
    planned = plan.batches(position=0, step_batches=2, slots=3)
    loader = loader_of(data, folder, planned)
    skipped: list[dict[str, str]] = []
    batches = list(training_batches(blocks(loader), torch.device("cpu"), skipped))
    assert [batch.clip_count for batch in batches] == [len(one.rows) - (6 in one.rows) for one in planned]
    assert [batch.ids for batch in batches] == [tuple(f"clip{row}" for row in one.rows if row != 6) for one in planned]
    assert not planned[-1].rows
    assert [batch.inputs["input_ids"].shape[0] for batch in batches] == [len(one.rows) or 1 for one in planned]
    assert [(one.position, one.step_position, one.step_label_count) for one in batches] == [
        (one.position, one.step_position, one.step_label_count) for one in planned
    ]
    assert not (batches[-1].inputs["labels"] != -100).any()
    assert (batches[-1].audio_s, batches[-1].token_count, batches[-1].ids) == (0, 0, ())
    assert sum(batch.audio_s for batch in batches) == pytest.approx(sum(SECONDS) - SECONDS[6], abs=1e-3)
    labels = sum(int((batch.inputs["labels"] != -100).sum()) for batch in batches)
    assert labels == plan.columns.label_counts.sum() - plan.columns.label_counts[6]
    assert [clip["id"] for clip in skipped] == ["clip6"]


VARIED = AugmentRecipe(speed=[0.9, 1.0, 1.1], gain_db=(-6, 6), noise={"share": 0.5}, specaugment={})


@pytest.mark.processes
def test_a_batch_is_the_same_in_another_process(folder, processor, tmp_path):
    """Batches are equal bit for bit: variation depends on the sample, not on the loader or its earlier batches."""
    data = clips(
        tmp_path / "a.parquet", text={row: f"W{word}, Other {word * 2}!" for row, word in enumerate(WORDS[:8])}
    )
    rows, _ = trainable(read_rows(str(data)))
    variation = vary(
        rows,
        processor,
        no_speech=0.5,
        augment=VARIED,
        words=InstructionRecipe(styles={"raw": 0.5}, context=0.5),
        token_noise=0.3,
    )
    batches = plan_training(rows, processor, PlanSettings(max_batch_clips=3), variation).batches(
        position=0, step_batches=1
    )
    spec = LoaderSpec(rows, batches, str(folder), variation)
    (tmp_path / "spec.pickle").write_bytes(pickle.dumps(spec, protocol=5))
    code = (
        "import pickle, sys; from jobs.training.loader import BatchLoader; "
        "spec = pickle.load(open(sys.argv[1], 'rb')); loader = BatchLoader(spec); "
        "blocks = [loader.block(one) for one in loader.reader.read(list(spec.batches)[::-1])]; "
        "pickle.dump(blocks, open(sys.argv[2], 'wb'))"
    )
    told = tmp_path / "blocks.pickle"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "spec.pickle"), str(told)], check=True)
    loader = BatchLoader(spec)
    others = reversed(pickle.loads(told.read_bytes()))
    for one, other in zip(loader.blocks(range(len(batches))), others, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_token_noise_replaces_input_tokens_and_leaves_the_labels(folder, processor, tmp_path):
    texts = {row: " ".join([word] * 40) for row, word in enumerate(WORDS[:8])}
    data = clips(tmp_path / "a.parquet", text=texts)
    rows = read_rows(str(data))
    plain, noisy = (loader_of(data, folder, variation=vary(rows, processor, token_noise=share)) for share in (0, 0.3))
    sample = PlannedBatch((0,) * 64, tuple(range(64)), 1, 1, 1)
    as_it_is, read = load(plain, sample), load(noisy, sample)
    changed = {name for name in as_it_is if not np.array_equal(as_it_is[name], read[name])}
    assert changed == {"input_ids"}
    swapped = as_it_is["input_ids"] != read["input_ids"]
    answers = as_it_is["labels"] != -100
    assert not (swapped & ~answers).any()
    assert not swapped[as_it_is["labels"] == processor.target_ids("")[-1]].any()
    assert set(read["input_ids"][swapped]) <= {
        token for text in texts.values() for token in processor.target_ids(text)[:-1]
    }
    assert 0.2 < swapped[answers].mean() < 0.3  # some of what is read instead is what it was


def test_a_loader_does_not_change_its_processs_thread_count(folder, tmp_path, thread_count):
    """Validation batches are loaded in the training worker's process."""
    torch.set_num_threads(2)
    loader_of(corpus(tmp_path / "data.parquet", [row("hum", 0)]), folder)
    assert torch.get_num_threads() == 2


class Listening:
    """An engine that records its requests and returns no tokens."""

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
    rows = loader.spec.rows
    reader, engine = RowReader(rows.files), Listening()
    transcriber = Transcriber(engine, processor, "listening")
    for place in range(len(SECONDS)):
        transcriber.transcribe(reader.wav(rows.file[place], rows.row_group[place], rows.row[place])[0])
    transcriber.close()
    for place, request in enumerate(engine.requests):
        batch = load(loader, planned(place))
        assert np.array_equal(batch["input_features"][0], request.features.mel)
        assert batch["audio_frame_counts"].tolist() == [request.features.frame_count]
        is_prompt = batch["labels"][0] == -100
        assert batch["input_ids"][0][is_prompt].tolist() == request.prompt_ids


def test_prefetched_batches_and_errors_keep_their_order():
    made: list[int] = []

    def batches(fault_at: int) -> Iterator[int]:
        for number in range(5):
            if number == fault_at:
                raise DataError(f"batch {number}")
            made.append(number)
            yield number

    assert list(prefetch(batches(9))) == [0, 1, 2, 3, 4]
    coming = prefetch(batches(2))
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(DataError, match="batch 2"):
        next(coming)
    made.clear()
    coming = prefetch(batches(9))
    next(coming)
    coming.close()  # a run that stops
    assert len(made) <= 3
