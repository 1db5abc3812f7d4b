"""Test jobs.score: files of any system are scored as a user gives them, and mistakes are told in one line."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer
import pytest

from jobs.score import main
from tests.support.paths import ROOT

REFERENCES = {"a": "good morning to you", "b": "the lazy dog", "c": "white paper", "d": "quick fox"}
ONE = {"a": "good morning you", "b": "the lazy dog", "c": "white paper", "d": "brown fox"}
TWO = {"a": "good", "b": "lazy dog", "c": "whitepaper", "d": ""}


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(path: Path, found: Mapping[str, str], key: str = "text") -> Path:
    return write_lines(path, [{"id": clip_id, key: text} for clip_id, text in found.items()])


def wer(found: Mapping[str, str]) -> float:
    return jiwer.wer(list(REFERENCES.values()), [found.get(clip_id, "") for clip_id in REFERENCES])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "refs.jsonl", REFERENCES)
    texts(tmp_path / "one.jsonl", ONE)
    texts(tmp_path / "two.jsonl", TWO, "hypothesis")
    return tmp_path


def scores_of(*arguments: str) -> dict[str, Any]:
    """Score into a folder of its own; returns scores.json."""
    out = Path(f"scores-{len(list(Path.cwd().iterdir()))}")
    assert main(argv=[*arguments, f"out={out}"]) == 0
    return json.loads((out / "scores.json").read_text())


def test_the_first_file_holds_the_references(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv=["refs.jsonl", "one.jsonl", "two.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:5] for line in printed.splitlines()[1:3]] == [
        ["all", "one", "4", "11", f"{wer(ONE):.1%}"],
        ["all", "two", "4", "11", f"{wer(TWO):.1%}"],
    ]
    assert not list(files.glob("scores*"))
    systems = scores_of("refs.jsonl", "one.jsonl", "two.jsonl")["sets"]["all"]["systems"]
    assert {name: one["wer"] for name, one in systems.items()} == pytest.approx({"one": wer(ONE), "two": wer(TWO)})
    named = scores_of("refs=refs.jsonl", "hyps.graft=one.jsonl", "hyps.whisper=two.jsonl")
    assert list(named["sets"]["all"]["systems"]) == ["graft", "whisper"]
    listed = scores_of("refs=refs.jsonl", "hyps=one.jsonl,two.jsonl")
    assert listed["sets"]["all"]["systems"] == systems
    mixed = scores_of("refs.jsonl", "hyps=two.jsonl")
    assert mixed["sets"]["all"]["systems"] == {"two": systems["two"]}
    (files / "recipe.yaml").write_text("refs: [refs.jsonl]\nhyps: {graft: one.jsonl}\n")
    assert list(scores_of("--recipe", "recipe.yaml")["sets"]["all"]["systems"]) == ["graft"]


def test_files_that_changed_are_scored_again(files: Path) -> None:
    for found in (ONE, TWO):
        texts(files / "system.jsonl", found)
        assert main(argv=["refs.jsonl", "system.jsonl", "out=scored"]) == 0
        scores = json.loads((files / "scored" / "scores.json").read_text())
        assert scores["sets"]["all"]["systems"]["system"]["wer"] == pytest.approx(wer(found))
    assert {path.name for path in (files / "scored").iterdir()} == {"scores.json", "recipe.yaml"}


def test_files_of_every_format_give_the_same_scores(files: Path) -> None:
    expected = scores_of("refs.jsonl", "one.jsonl")["sets"]["all"]["systems"]["one"]
    for name, lines in {"refs": REFERENCES, "one": ONE}.items():
        (files / f"{name}.trn").write_text("".join(f"{text} ({clip_id})\n" for clip_id, text in lines.items()))
        (files / f"{name}.txt").write_text("".join(f"{clip_id} {text}\n" for clip_id, text in lines.items()))
        (files / f"{name}.stm").write_text("".join(f"{clip_id} A s 0 1 {text}\n" for clip_id, text in lines.items()))
        segments = [{"session_id": clip_id, "words": text} for clip_id, text in lines.items()]
        (files / f"{name}.seglst.json").write_text(json.dumps(segments))
        with (files / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *lines.items()])
    words = [(clip_id, place, word) for clip_id, text in ONE.items() for place, word in enumerate(text.split())]
    (files / "one.ctm").write_text("".join(f"{clip_id} A {place} 1 {word} 0.9\n" for clip_id, place, word in words))
    nemo = [{"audio_filepath": f"wav/{clip_id}.wav", "text": text} for clip_id, text in REFERENCES.items()]
    write_lines(files / "nemo.json", [line | {"pred_text": ONE[key]} for line, key in zip(nemo, ONE, strict=True)])
    answers = {suffix: f"one.{suffix}" for suffix in ("trn", "txt", "stm", "seglst.json", "csv", "ctm")}
    pairs = [("refs.jsonl", given) for given in (*answers.values(), "hyps.one=nemo.json")]
    pairs += [(f"refs.{suffix}", "one.ctm") for suffix in answers if suffix != "ctm"]
    for references, given in pairs:
        found = scores_of(references, given)["sets"]["all"]["systems"]["one"]
        assert found == expected, (references, given)
    found = scores_of("nemo.json")["sets"]["all"]["systems"]["nemo"]
    assert found["counts"] == expected["counts"]


def test_one_file_with_both_is_enough(files: Path) -> None:
    lines = [
        {"set": set_name, "system": system, "id": clip_id, "reference": text, "hypothesis": found.get(clip_id)}
        for set_name in ("dev", "test")
        for system, found in (("one", ONE), ("two", {"a": "good"}))
        for clip_id, text in REFERENCES.items()
    ]
    write_lines(files / "predictions.jsonl", lines)
    scores = scores_of("predictions.jsonl")
    assert scores["sets"].keys() == {"dev", "test"}
    two = scores["sets"]["dev"]["systems"]["two"]
    assert (two["wer"], list(two["failed"])) == (pytest.approx(10 / 11), ["b", "c", "d"])
    assert scores["overall"]["systems"].keys() == {"one", "two"}
    # Shards by a glob are one system; refs= says which clips count.
    for place in range(2):
        write_lines(files / f"part-{place}.jsonl", lines[place::2])
    shards = scores_of("part-*.jsonl")
    assert shards["sets"] == scores["sets"]
    write_lines(files / "few.jsonl", [{"set": "dev", "id": "a", "reference": REFERENCES["a"]}])
    few = scores_of("refs=few.jsonl", "predictions.jsonl")
    assert few["sets"]["dev"]["clips"] == 1
    assert few["misfits"]["unknown"].keys() == {"one", "two"}


def test_files_of_references_are_sets(files: Path) -> None:
    texts(files / "more.jsonl", {"x": "hello"})
    texts(files / "more-one.jsonl", {"x": "hello"})
    scores = scores_of("refs=refs.jsonl,more.jsonl", "hyps.one=*one.jsonl")
    assert {name: one["systems"]["one"]["wer"] for name, one in scores["sets"].items()} == {
        "refs": pytest.approx(wer(ONE)),
        "more": 0.0,
    }


def test_files_of_the_same_name_are_named_after_their_folders(files: Path) -> None:
    for folder, found in {"x": ONE, "y": TWO}.items():
        (files / folder).mkdir()
        texts(files / folder / "hyps.jsonl", found)
    assert list(scores_of("refs.jsonl", "x/hyps.jsonl", "y/hyps.jsonl")["sets"]["all"]["systems"]) == [
        "x/hyps",
        "y/hyps",
    ]


def test_the_rule_of_the_leaderboard_and_its_checkout(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scores_of("refs.jsonl", "two.jsonl", "scorer=open-asr")
    assert found["sets"]["all"]["systems"]["two"]["wer"] == pytest.approx(6 / 11)  # whitepaper is right
    (files / "board" / "normalizer").mkdir(parents=True)
    (files / "board" / "normalizer" / "__init__.py").write_text("from .rules import EnglishTextNormalizer\n")
    rules = "class EnglishTextNormalizer:\n    def __call__(self, text):\n        return text.replace('lazy ', '')\n"
    (files / "board" / "normalizer" / "rules.py").write_text(rules)
    found = scores_of("refs.jsonl", "two.jsonl", "scorer=open-asr", "leaderboard=board")["sets"]["all"]
    assert found["normalizer"].startswith("open-asr-leaderboard ")
    assert found["systems"]["two"]["words"] == 10
    (files / "board" / "normalizer" / "rules.py").write_text("import no_such_package\n")
    assert main(argv=["refs.jsonl", "two.jsonl", "leaderboard=board"]) == 2
    assert "leaderboard=board needs no_such_package: pip install no_such_package" in capsys.readouterr().err


def test_mistakes_are_told_in_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts(files / "other.jsonl", {"x": "hello"})
    write_lines(files / "both.jsonl", [{"id": "a", "system": name, "hypothesis": "b"} for name in ("p", "q")])
    (files / "empty.jsonl").touch()
    assert main(argv=["refs.jsonl", "one.jsonl", "out=scored"]) == 0
    capsys.readouterr()
    for arguments, words in [
        ([], "there is nothing to score: give the file of the references"),
        (["refs.jsonl"], "there are references, but no hypotheses"),
        (["refs.jsonl", "no.jsonl"], "no such file or folder: files=no.jsonl"),
        (["refs.jsonl", "other.jsonl"], "no id of a hypothesis is that of a reference: other has 'x'"),
        (["refs.jsonl", "hyps.p=both.jsonl"], "hyps.p=both.jsonl holds several systems (p, q): give it without a name"),
        (["refs.jsonl", "empty.jsonl"], "empty.jsonl is empty"),
        (["refs.jsonl", "one.jsonl", "columns.hypothesis=mine"], "no text among id, text"),
        (["refs.jsonl", "one.jsonl", "columns.hyp=mine"], "unknown key columns.hyp"),
        (["refs.jsonl", "one.jsonl", "by=sex,colour"], "by=colour: no clip has such a column: give some of duration"),
        (["refs.jsonl", "one.jsonl", "leaderboard=."], "leaderboard=. has no package normalizer"),
        (["refs.jsonl", "one.jsonl", "scorer=jiwer"], "scorer=jiwer: give graft or open-asr"),
        (["refs.jsonl", "two.jsonl", "out=scored"], "output scored holds another recipe's results: files was"),
    ]:
        assert main(argv=arguments) == 2, arguments
        errors = capsys.readouterr().err
        assert words in errors
        assert errors.count("\n") == 1


@pytest.mark.processes
def test_it_needs_neither_ray_nor_torch(files: Path) -> None:
    code = (
        "import sys; from jobs.score import main; code = main(argv=['refs.jsonl', 'one.jsonl', 'scorer=open-asr']); "
        "sys.exit(code or bool({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
