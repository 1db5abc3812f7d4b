"""Published figures: evaluation says whether what it finds agrees with them."""

import json
from pathlib import Path

import pytest
import tiny
from tiny_speech import corpus, row

from jobs.cli import run_job
from jobs.cluster import connect
from jobs.evaluate import EvaluateRecipe, main


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    connect()
    yield
    ray.shutdown()


def test_rates_are_compared_with_what_is_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graft = tiny.save_tiny_graft(tmp_path / "graft")
    data = corpus(tmp_path / "test.parquet", [row(f"t{seed}", seed) for seed in range(2)])

    def evaluate(out: str, *expected: str) -> int:
        given = [f"model={graft}", f"data.test={data}", f"out={tmp_path / out}", "baseline="]
        return run_job(EvaluateRecipe, main, summary="", argv=[*given, *expected])

    assert evaluate("other", "expected.nothing.wer=[0, 1]") == 2
    assert "expected=nothing is no set of data (test)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert evaluate("free") == 0
    found = json.loads((tmp_path / "free" / "report.json").read_text())
    assert found["expected"] == []
    wer, cer = (found["sets"]["test"]["graft"][rate] for rate in ("wer_raw", "cer_raw"))
    assert evaluate("agreed", f"expected.test.wer_raw=[{wer - 0.001}, {wer + 0.001}]") == 0
    assert f"test: wer_raw {wer:.2%} agrees with the expected {wer - 0.001:.2%} to {wer + 0.001:.2%}" in capsys.readouterr().out
    both = [f"expected.test.wer_raw=[{wer}, {wer}]", f"expected.test.cer_raw=[{cer + 0.001}, 99.0]"]
    assert evaluate("differing", *both) == 1
    assert "cer_raw" in (text := capsys.readouterr().out)
    assert "does not agree with" in text
    verdicts = json.loads((tmp_path / "differing" / "report.json").read_text())["expected"]
    assert [verdict["agrees"] for verdict in verdicts] == [True, False]
