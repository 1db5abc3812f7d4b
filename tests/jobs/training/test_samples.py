"""Test samples before they are read: which rows can be trained on, and the number of tokens of each sample."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.data.dataset import read_rows
from graft.data.settings import AugmentRecipe, Source
from graft.errors import DataError, RecipeError
from graft.processor import GraftProcessor
from graft.text.instructions import InstructionRecipe
from graft.training.plan import PlanSettings
from jobs.training.loader import BatchLoader, LoaderSpec
from jobs.training.samples import (
    Variation,
    check_ctc_lengths,
    choose_letters,
    plan_columns,
    plan_training,
    trainable,
    vary,
)
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, flac, row
from tests.support.training import load

SECONDS = [0.5, 1.234, 2.0, 0.333, 0.75, 1.0, 0.21]
TEXTS = [
    "YES",
    "Where is GREENWICH?",
    "it's 5 o'clock",
    "no",
    "one  two three",
    "Mister Quilter, and Zoroaster",
    "ÜBER uns",
]
WORDS = InstructionRecipe(styles={"raw": 0.3, "formatted": 0.3}, context=0.5, context_words=5)


def clips(path: Path, **changes: dict[int, Any]) -> str:
    """Write a corpus of clips of SECONDS and TEXTS; `changes` replaces values of columns at some rows."""
    rows = []
    for index, seconds in enumerate(SECONDS):
        changed = {name: values[index] for name, values in changes.items() if index in values}
        wav = {"bytes": flac(seconds, index), "path": f"{index}.flac"}
        rows.append(row(f"clip{index}", index, **{"duration": seconds, "text": TEXTS[index], "wav": wav, **changed}))
    return corpus(path, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("samples") / "graft")


@pytest.fixture(scope="module")
def processor(folder) -> GraftProcessor:
    return GraftProcessor.from_pretrained(folder)


def test_rows_that_cannot_be_trained_are_left_out_and_counted(tmp_path):
    changes = {"text": {0: "", 1: " \n", 2: None, 3: "... -"}, "duration": {0: 40.0, 4: 30.5, 5: 0.05, 6: float("nan")}}
    every = read_rows([clips(tmp_path / "good.parquet"), clips(tmp_path / "odd.parquet", **changes)])
    rows, left_out = trainable(every)
    counts = {reason: len(found) for reason, found in left_out.items()}
    assert counts == {"no words": 4, "no valid duration": 1, "over 30 s": 1, "under 0.08 s": 1}
    assert [rows.id(index) for index in range(len(rows))] == [f"clip{index}" for index in range(len(SECONDS))]
    assert trainable(rows) == (rows, {})
    with pytest.raises(
        DataError, match=r"none of 7 rows can be trained on \(4 no words, 1 no valid duration, 1 over 30 s, 1 under"
    ):
        trainable(read_rows(str(tmp_path / "odd.parquet")))


def test_ctc_needs_at_least_as_many_audio_tokens_as_letters(processor, tmp_path):
    quick = {
        "text": {index: "said " * round(2 + 6 * seconds) for index, seconds in enumerate(SECONDS[:4])}
    }  # over 25 letters a second
    check_ctc_lengths(read_rows(clips(tmp_path / "good.parquet")), processor)
    with pytest.raises(
        DataError,
        match=r"6 of 7 clips have more letters than audio tokens, .*: build the graft with a smaller audio_pool",
    ):
        check_ctc_lengths(read_rows(clips(tmp_path / "quick.parquet", **quick)), processor)


def test_ctc_takes_its_letters_from_the_texts_and_refuses_texts_that_it_cannot_spell(processor, tmp_path):
    letters, share = choose_letters(read_rows(clips(tmp_path / "good.parquet")), processor, "")
    assert set(letters) == set("'5abcdeghiklmnoqrstuwyz")
    assert 0.99 < share < 1  # the two dots of ü are no token
    hindi = read_rows(clips(tmp_path / "hindi.parquet", text={index: "यह एक परीक्षण है" for index in range(5)}))
    with pytest.raises(
        DataError, match=r"spell \d+\.\d% of the texts, under 50%, so CTC cannot learn them: give objective"
    ):
        choose_letters(hindi, processor, "")
    with pytest.raises(DataError, match=r"4 letters spell .* leave letters out, give objective=transcript"):
        choose_letters(hindi, processor, "abcd")


VARIATIONS = [
    {},
    {"augment": AugmentRecipe(speed=[0.8, 1.0, 1.3], gain_db=(-3, 3), noise={"share": 0.5}, specaugment={})},
    {"words": WORDS},
    {"no_speech": 0.5},
    {"augment": AugmentRecipe(speed=[0.9, 1.1]), "words": WORDS, "no_speech": 0.3},
]


@pytest.mark.parametrize("settings", VARIATIONS, ids=["plain", "augment", "words", "no-speech", "all"])
def test_the_plan_knows_each_samples_tokens_before_it_is_read(folder, processor, tmp_path, settings):
    for name in ("a.parquet", "b.parquet"):
        clips(tmp_path / name)
    rows, _ = trainable(read_rows(str(tmp_path)))
    variation = vary(rows, processor, seed=3, **settings)
    plan = plan_training(rows, processor, PlanSettings(seed=3, epochs=2, max_batch_clips=3), variation)
    batches = plan.batches(position=0, step_batches=1)
    loader = BatchLoader(LoaderSpec(rows, batches, str(folder), variation))
    planned = dict.fromkeys(range(2), 0)
    loaded_counts = dict.fromkeys(range(2), 0)
    for batch in batches:
        loaded = load(loader, batch)
        assert (loaded["labels"] != -100).sum() == batch.step_label_count
        assert loaded["input_ids"].size <= plan.settings.token_budget
        assert loaded["token_count"] == loaded["attention_mask"].sum()
        epoch = int(batch.position > len(plan.epochs[0]))
        loaded_counts[epoch] += int(loaded["token_count"])
        planned[epoch] = plan.epochs[epoch].token_count
        chosen = np.array(batch.rows)
        counts = plan.columns.token_counts[chosen], plan.columns.label_counts[chosen]
        if plan.counts:
            counts = plan.counts(chosen, np.array(batch.sample_seeds))
        assert (np.abs(loaded["attention_mask"].sum(axis=1) - counts[0]) <= 1).all()
        assert ((loaded["labels"] != -100).sum(axis=1) == counts[1]).all()
    assert loaded_counts == pytest.approx(planned, abs=len(plan.epochs[0].rows))
    if not settings:
        assert plan.columns.row_groups.tolist() == [0] * 7 + [1] * 7


def test_samples_without_speech_have_an_empty_answer(folder, processor, tmp_path):
    rows, _ = trainable(read_rows(clips(tmp_path / "a.parquet")))
    variation = vary(rows, processor, no_speech=0.6)
    plan = plan_training(rows, processor, PlanSettings(epochs=2), variation)
    batches = plan.batches(position=0, step_batches=1)
    loader = BatchLoader(LoaderSpec(rows, batches, str(folder), variation))
    for epoch in plan.epochs:
        assert sorted(epoch.rows.tolist()) == list(range(7 + 4))
    assert (plan.columns.row_groups[7:] == -1).all()
    end = processor.target_ids("")
    row_features: dict[int, list[bytes]] = {}
    for batch in batches:
        loaded = load(loader, batch)
        for place, number in enumerate(batch.rows):
            labels = loaded["labels"][place]
            if number < 7:
                assert (labels != -100).sum() > len(end)
                continue
            assert labels[labels != -100].tolist() == end
            row_features.setdefault(number, []).append(
                loaded["input_features"][place, :, : loaded["audio_frame_counts"][place]].tobytes()
            )
    assert all(len(epochs) == 2 for epochs in row_features.values())
    # Every epoch generates other clips, except for plain silence.
    assert len({features for epochs in row_features.values() for features in epochs}) > 4


def test_weights_and_the_share_without_speech_count_together(processor, tmp_path):
    sources = [Source(files=clips(tmp_path / f"{weight}.parquet"), weight=weight) for weight in (1.0, 0.5, 2.0)]
    rows, _ = trainable(read_rows(sources))
    variation = vary(rows, processor, no_speech=0.2)
    assert len(variation.no_speech_s) == round(0.2 * 3.5 * 7)
    epochs = plan_training(rows, processor, PlanSettings(epochs=4), variation).epochs
    for epoch in epochs:
        times = np.bincount(epoch.rows, minlength=26)
        assert (times[:7] == 1).all()
        assert (times[14:21] == 2).all()
        assert (times[21:] == 1).all()
    assert (sum(np.bincount(epoch.rows, minlength=26) for epoch in epochs)[7:14] == 2).all()


def test_impossible_variation_is_refused(tmp_path):
    reference = GraftProcessor.from_pretrained(
        tiny_models.save_tiny_graft(tmp_path / "graft", prompt_style="reference", text_style="raw")
    )
    rows, _ = trainable(read_rows(clips(tmp_path / "a.parquet")))
    with pytest.raises(RecipeError, match="reference"):
        vary(rows, reference, words=WORDS)
    with pytest.raises(DataError, match=r"nowhere"):
        vary(rows, reference, augment=AugmentRecipe(noise={"data": str(tmp_path / "nowhere.parquet")}))
    assert len(plan_columns(rows, reference, Variation(np.array([1.0])))) == 8
