"""Test token tables: forced probabilities are the model's loss, and free tokens are what it writes."""

import math
from pathlib import Path

import pytest
import torch

from graft.audio.clip import read_audio
from graft.checkpoints.loading import open_graft
from graft.inference.transcriber import open_transcriber
from jobs.evaluation.predictions import Prediction
from jobs.evaluation.test_sets import labelled
from jobs.evaluation.token_tables import token_tables, worst_clips
from tests.support import media, tiny_models
from tests.support.speech_corpus import corpus, row

TEXT = "please hold the line"


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("tokens") / "graft")


def test_forced_tokens_spell_the_reference_and_give_the_loss(graft: Path) -> None:
    clip = read_audio(media.SHORTEST_FIRST[0])
    (table,) = token_tables(str(graft), [(clip, TEXT)])
    model, processor = open_graft(graft)
    made = processor.training_batch([processor.example(clip, TEXT)])
    batch = {key: torch.from_numpy(one) for key, one in made.items()}
    with torch.no_grad():
        loss = float(model(**batch).loss)
    forced = table["forced"]
    assert -sum(math.log(one["p"]) for one in forced) / len(forced) == pytest.approx(loss, rel=1e-4)
    assert "".join(one["token"] for one in forced[:-1]).strip() == TEXT
    assert all(one["choice_p"] >= one["p"] for one in forced)


def test_free_tokens_are_what_the_engine_writes(graft: Path) -> None:
    clip = read_audio(media.SHORTEST_FIRST[1])
    (table,) = token_tables(str(graft), [(clip, TEXT)])
    own = open_transcriber(graft, chunker=lambda one: [chunk for chunk in _whole(one)])
    written = own.transcribe(clip).text
    own.close()
    free = table["free"]
    assert all(0 < one["p"] <= 1 for one in free)
    assert "".join(one["token"] for one in free).startswith(written[:5])


def _whole(clip):
    from graft.audio.chunking import windows

    return windows(clip)


def test_the_worst_clips_that_fit_a_window_are_chosen(tmp_path: Path) -> None:
    rows = [row(f"r{place}", place, text="one two three four") for place in range(4)]
    items = labelled("test", corpus(tmp_path / "test.parquet", rows), limit=None)
    wrong = {"r0": "one two three four", "r1": "", "r2": "one two", "r3": None}
    systems = ("graft", "other")
    predictions = [Prediction(item.id, "test", one, item.text, wrong[item.id]) for item in items for one in systems]
    chosen = worst_clips(predictions, items, system="graft", count=2)
    assert [(one.id, item.id) for one, item in chosen] == [("r1", "r1"), ("r2", "r2")]
    assert worst_clips(predictions, [], system="graft", count=2) == []
