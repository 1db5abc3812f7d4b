"""Test the checks of an evaluation: each finds what it is for, and says so when there is nothing to check."""

from pathlib import Path
from typing import Any

import pytest

from graft.data.dataset import read_rows
from jobs.evaluation import honesty
from jobs.evaluation.check_sets import CONTEXT, SWAPPED, context_clips, spread, swapped
from jobs.evaluation.checking import NO_TRAINING, training_rows
from jobs.evaluation.overlap import find_duplicates, find_overlap
from jobs.evaluation.predictions import Prediction
from jobs.evaluation.samples import ScoringSettings
from jobs.evaluation.scoring import score_predictions
from jobs.evaluation.test_sets import labelled
from tests.support.speech_corpus import BROKEN, corpus, row

LONG = "these are five words or more"


def answer(name: str, reference: str, hypothesis: str | None, **more: Any) -> Prediction:
    known = {"set_name": "test", "system": "graft", "duration_s": 6.0}
    return Prediction(**{"id": name, "reference": reference, "hypothesis": hypothesis} | known | more)


def test_clips_that_stand_twice_are_found_by_id_text_and_audio(tmp_path: Path) -> None:
    rows = [
        row("a", 0, text=LONG),
        row("a", 1, text="other words of another clip here"),  # its id stands there twice
        row("b", 2, text="These are FIVE words, or more!"),  # its text, too
        row("c", 0, text="nothing of that kind is said"),  # the audio of the first
        row("d", 3, text="yes"),
        row("e", 4, text="yes"),  # too short to tell
        row("broken", 5, text="this one can not be read", **BROKEN),
    ]
    items = labelled("test", corpus(tmp_path / "test.parquet", rows), limit=None)
    found = find_duplicates(items)
    assert (found.ids, found.texts, found.audio) == ([("test", "a#2")], [("test", "b")], [("test", "c")])
    predictions = [answer(item.id, item.text, "" if item.id in ("b", "c") else item.text) for item in items]
    made = honesty.check_duplicates(found, predictions)
    assert made["ok"] is False
    assert made["ids"] == [["test", "a#2"], ["test", "b"], ["test", "c"]]
    assert "3 of 7 clips stand twice (1 by id, 1 by text, 1 by audio)" in made["verdict"]
    assert made["numbers"]["wer_without"] == {"graft": 0.0}
    assert made["numbers"]["wer"]["graft"] == pytest.approx(12 / 32)
    assert honesty.check_duplicates(find_duplicates(items[1:2]), predictions)["ok"] is True


def test_test_clips_in_the_training_data_are_found(tmp_path: Path) -> None:
    test = [row("a", 0, text=LONG), row("b", 1, text="only its audio is known there"), row("c", 2, text="a new clip")]
    training = [row("a", 7, text="x"), row("y", 8, text=LONG.upper()), row("z", 1, text="labelled otherwise")]
    items = labelled("test", corpus(tmp_path / "test.parquet", test), limit=None)
    rows = read_rows(corpus(tmp_path / "train.parquet", training))
    found = find_overlap(items, rows)
    assert (found.ids, found.texts, found.audio) == ([("test", "a")], [("test", "a")], [("test", "b")])
    assert found.compared["training"] == 3
    predictions = [answer(item.id, item.text, "") for item in items]
    made = honesty.check_overlap(found, predictions)
    assert made["ok"] is False
    assert "hold 2 of 3 clips, compared with 3 training clips (1 by id, 1 by text, 1 by audio)" in made["verdict"]
    assert honesty.check_overlap(find_overlap(items[2:], rows), predictions)["ok"] is True


def test_training_data_are_those_of_the_recipes_in_the_folder(tmp_path: Path) -> None:
    data = corpus(tmp_path / "train.parquet", [row("a", 0)])
    (tmp_path / "stage2").mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "stage2" / "recipe.yaml").write_text(f"data: [{data}]\nlearning_rate: 0.1\nmodel: {tmp_path}/merged\n")
    (tmp_path / "merged" / "recipe.yaml").write_text(f"model: {tmp_path}/stage2\n")
    rows = training_rows(None, str(tmp_path / "merged"))
    assert not isinstance(rows, str)
    assert rows.ids.to_pylist() == ["a"]
    assert training_rows(None, str(tmp_path)) == NO_TRAINING
    gone = training_rows(str(tmp_path / "gone.parquet"), "small")
    assert isinstance(gone, str)
    assert gone.startswith("its training data cannot be read")


@pytest.mark.parametrize(
    ("own", "others", "ok"),
    [("a b c", "x y z", True), ("a b c", "a b c", False), ("x y z", "x y z", None)],
)
def test_a_model_that_listens_fails_with_other_audio(own: str, others: str, ok: bool | None) -> None:
    predictions = [answer(str(place), "a b c", own) for place in range(3)]
    answers = [answer(str(place), "a b c", others, set_name=SWAPPED) for place in range(3)]
    assert honesty.check_swapped_audio(predictions, answers, "graft")["ok"] is ok
    assert "It was not checked" in honesty.check_swapped_audio(predictions, [], "graft")["verdict"]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "ok"),
    [
        ("good morning", "Good morning.", True),
        ("good morning", "Transcribe this audio. Good morning.", False),
        ("transcribe this audio", "Transcribe this audio.", True),  # that was said
        ("good morning", "good <|im_end|> morning", False),
        ("good morning", "in brief good morning", False),
        ("good morning", None, True),
    ],
)
def test_answers_that_repeat_the_prompt_are_found(reference: str, hypothesis: str | None, ok: bool) -> None:
    made = honesty.check_prompt_leakage([answer("a", reference, hypothesis)], ["In brief"])
    assert made["ok"] is ok
    assert made["ids"] == ([] if ok else [["test", "a"]])


def test_text_where_nobody_speaks_is_counted_by_kind() -> None:
    predictions = [answer("s", "", "", set_name="silence"), answer("n", "", "abcdef", set_name="noise")]
    made = honesty.check_no_speech([*predictions, answer("t", "word", "word")], "graft")
    assert made["numbers"] == {"silence": 0.0, "noise": 60.0}
    assert (made["ok"], made["ids"]) == (False, [["noise", "n"]])
    assert honesty.check_no_speech(predictions[:1], "graft")["ok"] is True
    assert honesty.check_no_speech([], "graft")["ok"] is None


def test_context_words_that_are_said_and_those_that_are_not_are_told_apart() -> None:
    told = {"set_name": CONTEXT, "system": honesty.told_name("graft")}
    answers = [
        answer("a", "we met Dvorak", "we met for jack", set_name=CONTEXT),
        answer("a", "we met Dvorak", "we met Dvorak", **told),
        answer("b", "the town of Brno", "the town of Brno", set_name=CONTEXT),
        answer("b", "the town of Brno", "the town of Brno Dvorak", **told),
    ]
    made = honesty.check_context_words(answers, ["Dvorak", "Brno"], "graft")
    assert made["numbers"] == {
        "clips": 2,
        "words": 2,
        "recall_without": 0.5,
        "leaks_without": 0.0,
        "wrong_words_without": 0,
        "recall_with": 1.0,
        "leaks_with": 0.5,
        "wrong_words_with": 1,
    }
    assert made["ok"] is False
    made = honesty.check_context_words([], [], "graft", "the model takes no words")
    assert (made["ok"], made["verdict"]) == (None, "It was not checked: the model takes no words.")


def test_labels_that_systems_contradict_together_move_the_rate() -> None:
    predictions = []
    for place in range(4):
        text = "wrong label here" if place == 3 else "a b c"
        predictions += [answer(str(place), text, "a b c", system=system) for system in ("graft", "whisper")]
    made = honesty.check_label_noise(score_predictions(predictions, ScoringSettings(resamples=20)))
    assert made["ids"] == [["test", "3"]]
    assert "without 1 clip, graft 25.0% -> 0.0%" in made["verdict"]
    alone = [one for one in predictions if one.system == "graft"]
    alone_scores = score_predictions(alone, ScoringSettings(resamples=20))
    assert "that takes two systems" in honesty.check_label_noise(alone_scores)["verdict"]


def test_clips_of_the_checks_are_spread_and_marked(tmp_path: Path) -> None:
    common = "it is the one that we have and that they had and it was the one"
    texts = [f"{common} of Dvorak", f"{common} in Prague!", f"{common} by Smetana, {common}", common]
    rows = [row(f"r{place}", place, text=texts[place % 4]) for place in range(8)]
    items = labelled("test", corpus(tmp_path / "test.parquet", rows), limit=None)
    assert [item.id for item in spread(items, 4)] == ["r0", "r2", "r4", "r6"]
    assert spread(items, 20) == items
    other = swapped(items[:3])
    assert [(item.id, item.audio_id, item.clip) for item in other] == [
        (own.id, one.id, one.clip) for own, one in zip(items[:3], [*items[1:3], items[0]], strict=True)
    ]
    assert all(item.is_check for item in other)
    assert swapped(items[:1]) == []
    found = context_clips(items)
    assert found is not None
    assert found.words == ["Dvorak", "Prague", "Smetana"]
    assert [item.id for item in found.items] == ["r0", "r1", "r2"]
    assert all(item.is_check for item in found.items)
    assert context_clips(items[3:4]) is None
