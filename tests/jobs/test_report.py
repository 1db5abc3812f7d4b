"""Test jobs.report: the page tells what an evaluation holds, whatever its texts, and exports give the same rates."""

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.report import main
from jobs.score import ScoreRecipe, score

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)> &amp; <!-- "
CLIPS = {
    # id -> reference, and the texts of graft and whisper; None is a failure
    "a/1.wav": ("good morning to you", "good morning you", "good morning to you"),
    '<b> "odd" & id\'s; №2': ("the lazy dog", HOSTILE, "the lazy dog"),
    "rtl": ("שלום עולם", "שלום", "שלום עולם"),
    "cjk": ("今天天气很好", "今天天氣很好", "今天很好"),
    "failed": ("quick fox", None, "quick fox"),
    "empty": ("brown fox", "", "brown socks"),
    "label": ("the white house", "a white house", "a white house"),
}


def lines() -> list[dict[str, Any]]:
    found = []
    for clip_id, (reference, *texts) in CLIPS.items():
        for system, text in zip(("graft", "whisper"), texts, strict=True):
            line = {"set": "dev", "system": system, "id": clip_id, "reference": reference, "duration_s": 2.5}
            line |= {"language": "en", "speaker": "anna b", "mean_logprob": -0.1}
            found.append(line | ({"error": "no audio"} if text is None else {"hypothesis": text}))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder of graft evaluate with texts that a page could trip over."""
    out = tmp_path / "scores"
    out.mkdir()
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    (out / "recipe.yaml").write_text("model: small # <b>\n")
    scores = score(ScoreRecipe(files=[str(out / "predictions.jsonl")]))
    report = {"model": "runs/<i>merged", "pipeline": "speech", **scores, "expected": [], "rtfx": {"graft": 12.25}}
    (out / "report.json").write_text(json.dumps(report))
    return out


class Page(HTMLParser):
    """The elements of a page, its texts outside of scripts, and the contents of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id") or "page" if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.texts.append(data)
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts["data"])


def page_of(folder: Path, *arguments: str) -> Page:
    assert main(argv=[str(folder), *arguments]) == 0
    return Page(folder / "report.html")


def test_the_page_tells_the_scores_and_verdicts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(folder)
    assert capsys.readouterr().out.startswith(f"report: {folder / 'report.html'} (")
    report = json.loads((folder / "report.json").read_text())
    assert report["sets"]["dev"]["comparisons"][0]["all"]["verdict"] in page.text
    for system, found in report["sets"]["dev"]["systems"].items():
        low, high = (f"{100 * found[key]:.1f} %" for key in ("wer_low", "wer_high"))
        assert f"dev {system} {100 * found['wer']:.1f} % {low} – {high}" in page.text
    assert "12.2" in page.text
    assert "Evaluation of runs/<i>merged" in page.text
    assert "model: small # <b>" in page.text


def test_texts_of_clips_are_never_markup(folder: Path) -> None:
    page = page_of(folder)
    assert {clip["id"]: clip["reference"] for clip in page.data["clips"]} == {
        clip_id: texts[0] for clip_id, texts in CLIPS.items()
    }
    answers = {clip["id"]: clip["answers"]["graft"] for clip in page.data["clips"]}
    assert {clip_id: one["text"] for clip_id, one in answers.items()} == {
        clip_id: texts[1] for clip_id, texts in CLIPS.items()
    }
    assert answers["failed"]["error"] == "no audio"
    assert page.scripts.keys() == {"data", "page"}
    assert "img" not in {tag for tag, _ in page.elements}
    assert "innerHTML" not in page.scripts["page"]


def test_the_page_asks_no_network(folder: Path) -> None:
    page = page_of(folder)
    places = [value for _, values in page.elements for key, value in values.items() if key in ("src", "href")]
    assert places
    assert all(place.startswith(("#", "data:")) for place in places)
    (policy,) = (values["content"] for _, values in page.elements if "http-equiv" in values)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"url\((?!#)", (folder / "report.html").read_text())


def test_differences_are_those_that_are_counted(folder: Path) -> None:
    clips = page_of(folder).data["clips"]
    for clip in clips:
        for answer in clip["answers"].values():
            parts = answer.get("difference", [])
            counted = {"~": lambda own, one: max(len(own), len(one)), "-": lambda own, _: len(own)}
            counted |= {"+": lambda _, one: len(one), "=": lambda own, one: 0 if own == one else 99}
            errors = sum(counted[sign](own.split(), one.split()) for sign, own, one in parts)
            assert errors == answer["errors"]
            assert sum(len(own.split()) for _, own, _ in parts) == clip["words"]
    report = json.loads((folder / "report.json").read_text())
    found = report["sets"]["dev"]["systems"]["graft"]
    errors = [clip["answers"]["graft"]["errors"] for clip in clips]
    assert sum(errors) == found["substitutions"] + found["deletions"] + found["insertions"]


def test_clips_that_may_have_a_wrong_label_are_ranked(folder: Path) -> None:
    data = page_of(folder).data
    ids = [data["clips"][place]["id"] for place in data["audit"]]
    assert ids[0] == "label"  # both systems agree against it
    assert "failed" not in ids
    assert "empty" not in ids


def test_the_same_evaluation_gives_the_same_bytes(folder: Path) -> None:
    page_of(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    page_of(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("form", ["stm", "seglst.json"])
def test_exports_give_the_same_rates(folder: Path, form: str) -> None:
    page_of(folder)
    exports = folder / "exports"
    names = [str(exports / f"{name}.{form}") for name in ("reference", "graft", "whisper")]
    found = score(ScoreRecipe(files=names, language="en"))["sets"]
    (systems,) = (one["systems"] for one in found.values())
    report = json.loads((folder / "report.json").read_text())
    for (_, one), wanted in zip(systems.items(), report["sets"]["dev"]["systems"].values(), strict=True):
        assert one["wer"] == pytest.approx(wanted["wer"])
        assert one["clips"] == wanted["clips"]


def test_the_nemo_manifest_holds_every_text(folder: Path) -> None:
    page_of(folder)
    found = [json.loads(line) for line in (folder / "exports" / "manifest.jsonl").read_text().splitlines()]
    assert [(one["text"], one["pred_text"], one["pred_text_whisper"]) for one in found] == [
        (reference, text or "", other) for reference, text, other in CLIPS.values()
    ]
    assert all({"audio_filepath", "duration"} <= one.keys() for one in found)


def test_fewer_clips_are_those_with_the_most_errors(folder: Path) -> None:
    whole = {clip["id"]: clip for clip in page_of(folder).data["clips"]}
    page = page_of(folder, "page.clips=2", "page.audit_clips=0")
    errors = {key: sum(one["errors"] for one in clip["answers"].values()) for key, clip in whole.items()}
    assert [errors[clip["id"]] for clip in page.data["clips"]] == sorted(errors.values())[:-3:-1]
    assert "The 2 of 7 clips with the most errors." in page.text


def test_files_of_other_systems_make_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts in {"refs": ("a b c", "d e"), "one": ("a b c", "d"), "two": ("a b", "d e")}.items():
        rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [str(tmp_path / f"{name}.jsonl") for name in ("refs", "one", "two")]
    assert main(argv=[*names, f"out={tmp_path / 'page'}"]) == 0
    assert Page(tmp_path / "page" / "report.html").data["systems"] == ["one", "two"]
    assert main(argv=[*names, f"out={tmp_path / 'page'}"]) == 0
    capsys.readouterr()
    assert main(argv=names) == 2
    assert capsys.readouterr().err.endswith("give the folder for the page as out=FOLDER\n")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("report.json", "[1", "is no folder of graft evaluate"),
        ("report.json", "{}", "holds no scores of this version: evaluate again"),
        ("predictions.jsonl", '{"id": 1', "line 1 is no prediction"),
        ("predictions.jsonl", '{"id": "a", "reference": "x"}', "there are references, but no hypotheses"),
    ],
)
def test_what_is_no_evaluation_ends_in_one_line(
    folder: Path, name: str, content: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(content)
    assert main(argv=[str(folder)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"graft: error: .*\n", error)
    assert told in error
    assert not (folder / "report.html").exists()
