"""Test validation on several sets: the metrics of each, by language, and which of them chooses the best weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.config import read_recipe
from graft.errors import RecipeError
from graft.text.wer import score
from jobs import stage1
from jobs.common.cli import run_job
from jobs.training.validation import TranscribedClip, _by_turns
from jobs.training.validation_report import SetResult, report_lines, sample_fields, validation_metrics
from tests.support.plans import never
from tests.support.speech_corpus import corpus, row
from tests.support.stage_runs import arguments, stage1_recipe, train_here

GERMAN = [TranscribedClip("a", "Grüße aus Köln", "Grüsse aus Köln", "de"), TranscribedClip("b", "ja", "nein", "de")]
HINDI = [TranscribedClip("c", "नमस्ते दुनिया", "नमस्ते", "hi")]
CHINESE = [TranscribedClip("d", "你好世界", "你好", "zh")]


def test_error_rates_are_counted_by_set_and_language_each_after_its_normaliser() -> None:
    results = {"calls": SetResult(8.0, 4, [*GERMAN, *CHINESE]), "read": SetResult(2.0, 16, HINDI)}
    assert validation_metrics(results) == {
        "validation_loss": 0.5,
        "validation_wer": pytest.approx((2 + 2 + 1) / (4 + 4 + 2)),
        "validation_loss/calls": 2.0,
        "validation_wer/calls": pytest.approx((2 + 2) / (4 + 4)),
        "validation_wer/calls de": 0.5,
        "validation_wer/calls zh": 0.5,
        "validation_loss/read": 0.125,
        "validation_wer/read": 0.5,
    }
    wrong = score([clip.text for clip in GERMAN], [clip.heard for clip in GERMAN], language="en")
    assert wrong.normalizer != results["calls"].scores["de"].normalizer
    lines = list(report_lines("step 30", results, [GERMAN[0]]))
    assert lines[0] == "step 30  validation loss 0.5000  WER 50.0% of 4 clips"
    assert lines[1] == "  calls: loss 2.0000  WER 50.0% of 3 clips"
    assert lines[2].startswith("  calls de:  WER 50.0% [")
    assert lines[2].endswith("] of 2 clips (basic)")
    assert lines[3].endswith(" of 1 clips (basic, by character)")
    assert lines[4].startswith("  read: loss 0.1250  WER 50.0% [")
    assert lines[5:] == ["  a: 'Grüße aus Köln' -> 'Grüsse aus Köln'"]
    assert sample_fields("calls", GERMAN[1]) == {
        "set": "calls",
        "language": "de",
        "id": "b",
        "text": "ja",
        "heard": "nein",
    }


def test_a_single_set_has_no_name_and_a_loss_without_labels_is_no_number() -> None:
    assert validation_metrics({"": SetResult(3.0, 2, [])}) == {"validation_loss": 1.5}
    both = validation_metrics({"": SetResult(3.0, 2, [*GERMAN, *HINDI])})
    assert {"validation_wer/de", "validation_wer/hi"} < both.keys()
    empty = validation_metrics({"calls": SetResult(0.0, 0, []), "read": SetResult(3.0, 2, [])})
    assert np.isnan(empty["validation_loss/calls"])
    assert list(report_lines("step 1", {"": SetResult(3.0, 2, [])}, [])) == ["step 1  validation loss 1.5000"]


def test_languages_take_turns() -> None:
    assert _by_turns(np.array([0, 0, 0, 2, 2, 1])).tolist() == [0, 3, 5, 1, 4, 2]
    assert _by_turns(np.zeros(4, np.int16)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data=x", "best_by=wer"], "best_by=wer needs transcripts: give wer_clips"),
        (["data=x", "best_set=calls"], "best_set=calls: give data.NAME for each set, or leave it out"),
        (["data.a=x", "data.b=y", "best_set=c"], "there is no validation set best_set=c: give one of a, b"),
        (["data={a/b: x}"], "key validation.data.a/b: string should match pattern"),
        (["data.a={file: x}"], "unknown key validation.data.a.file=x (did you mean 'files'?"),
        (["data={file: x, language: de}"], "unknown key validation.data.file=x (did you mean 'files'?"),
    ],
)
def test_wrong_settings_of_validation_are_named(settings: list[str], words: str) -> None:
    given = ["model=m", "data=d", "out=o", *(f"validation.{setting}" for setting in settings)]
    with pytest.raises(RecipeError) as caught:
        read_recipe(stage1.Stage1Recipe, None, given)
    assert words in str(caught.value)


def sets(folder: Path) -> dict[str, Any]:
    """Write two validation sets, one of two languages."""
    german, hindi, read = (
        corpus(folder / f"{name}.parquet", [row(f"{name}{seed}", 10 * start + seed, **more) for seed in range(count)])
        for start, (name, count, more) in enumerate(
            [("de", 3, {"text": "ja oder nein"}), ("hi", 2, {"text": "one two"}), ("read", 4, {})]
        )
    )
    return {"calls": [{"files": german, "language": "de"}, {"files": hindi, "language": "hi"}], "read": read}


@pytest.mark.slow
def test_a_run_validates_each_set_and_keeps_the_weights_of_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(monkeypatch)
    validation = {"data": sets(tmp_path), "every": 1, "wer_clips": 3, "transcripts": 2, "best_set": "read"}
    recipe = stage1_recipe(tmp_path, dtype="fp32", epochs=3, max_steps=3, validation=validation, learning_rate=1e-2)
    result = stage1.run(recipe)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in metrics if "validation_loss" in line]
    assert len(found) == 3
    names = {"validation_loss", "validation_wer", *(f"validation_wer/calls {code}" for code in ("de", "hi"))}
    names |= {f"validation_{metric}/{name}" for metric in ("loss", "wer") for name in ("calls", "read")}
    assert all(line.keys() == names | {"step"} for line in found)
    best = min(found, key=lambda line: line["validation_loss/read"])
    assert {key: result[key] for key in names} == {key: best[key] for key in names}
    assert result["best_step"] == best["step"]
    heard = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    shown = [("calls", "de", "de0"), ("calls", "hi", "hi0"), ("read", None, "read0"), ("read", None, "read1")]
    assert [(line["set"], line.get("language"), line["id"]) for line in heard] == shown * 3
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("\n  calls: loss ") == log.count("\n  calls hi:  WER ") == log.count("\n  read: loss ") == 3

    # A plan counts every set.
    plan = [*arguments(recipe), "--plan"]
    assert run_job(stage1.Stage1Recipe, never, summary="", plan=stage1.plan, argv=plan) == 0
    printed = capsys.readouterr().out
    assert "validation  3 times 9 clips (calls 5, read 4), 0.00 h: " in printed
    assert "6 clips are transcribed each time" in printed
