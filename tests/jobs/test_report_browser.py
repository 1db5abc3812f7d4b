"""Test the page of an evaluation in a browser, where it opens without a network, filters, plays and keeps verdicts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.audio.clip import read_audio
from graft.data.dataset import clip_row
from jobs.evaluation.predict import write_clip_index
from jobs.evaluation.predictions import Prediction, write_predictions
from jobs.evaluation.test_sets import labelled
from jobs.report import main
from tests.support import media
from tests.support.faults import until
from tests.support.speech_corpus import corpus

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
COUNT = 30

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of real clips: graft leaves out a word of each odd one, and both write "x" for the label of the last."""
    folder = tmp_path_factory.mktemp("browser")
    files = media.SHORTEST_FIRST[:COUNT]
    rows = [clip_row(f"clip {place}", read_audio(path), f"alpha beta {place}") for place, path in enumerate(files)]
    items = labelled("dev", corpus(folder / "dev.parquet", rows), limit=None)
    write_clip_index(items, folder / "clips.parquet", work=folder / "work")
    lines = []
    for place, item in enumerate(items):
        for system in ("graft", "whisper"):
            text = f"alpha {place}" if place % 2 and system == "graft" else item.text
            text = "x" if place == COUNT - 1 else text
            more = {"mean_logprob": -0.1}
            lines.append(Prediction(item.id, "dev", system, item.text, text, item.duration_s, "en", more=more))
    with (folder / "predictions.jsonl").open("w") as file:
        write_predictions(lines, file)
    assert main(argv=[str(folder), "page.audio_clips=5"]) == 0
    manifest = [json.loads(line) for line in (folder / "exports" / "manifest.jsonl").read_text().splitlines()]
    named = [folder / "exports" / line["audio_filepath"] for line in manifest]
    assert sum(path.is_file() for path in named) == 5
    assert all(read_audio(path).duration_s > 0.3 for path in named if path.is_file())
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    context = browser.new_context(accept_downloads=True)
    page, faults = context.new_page(), list[str]()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith(("file:", "data:", "blob:")) else faults.append(one.url))
    page.goto(report.as_uri())
    yield page
    assert not faults
    context.close()


def ids(page: Any) -> list[str]:
    return [text.removesuffix("♪").strip() for text in page.locator("#clip-table .row-button").all_inner_texts()]


def test_clips_are_searched_filtered_and_sorted(page: Any) -> None:
    assert len(ids(page)) == 25
    assert ids(page)[0] == f"clip {COUNT - 1}"  # the most errors
    page.get_by_label("Search").fill("clip 7")
    rows = page.locator("#clip-table .row-button")
    playwright.expect(rows).to_have_count(1)
    page.get_by_label("Search").fill("")
    playwright.expect(rows).to_have_count(25)
    page.get_by_label("Show").select_option("wrong")
    assert sorted(ids(page)) == sorted(f"clip {place}" for place in range(1, COUNT, 2))
    page.get_by_label("Show").select_option("differ")
    assert f"clip {COUNT - 1}" not in ids(page)
    page.get_by_label("Show").select_option("all")
    page.locator("#sort-id").click()
    assert ids(page) == [f"clip {place}" for place in range(25)]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Clip")
    page.get_by_role("button", name="Next").click()
    assert ids(page) == [f"clip {place}" for place in range(25, COUNT)]


def test_the_keyboard_opens_a_clip_and_its_audio_plays(page: Any) -> None:
    button = page.locator("#clip-table .row-button").first
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("#clip-table .row-button").first.get_attribute("aria-expanded") == "true"
    detail = page.locator(".clip-detail")
    assert sorted(detail.locator(".difference").first.inner_text().split()) == [str(COUNT - 1), "alpha", "beta", "x"]
    assert detail.locator("img.mel").evaluate("image => image.naturalHeight") == 80
    detail.locator("audio").evaluate("audio => audio.play()")
    until(lambda: detail.locator("audio").evaluate("audio => audio.currentTime") > 0.1)
    page.keyboard.press("Enter")
    assert page.locator(".clip-detail").count() == 0


def test_verdicts_are_kept_exported_and_imported(page: Any, tmp_path: Path) -> None:
    sheet = page.locator("#audit-table tbody tr")
    assert sheet.count() == COUNT // 2
    assert f"clip {COUNT - 1}" in sheet.first.inner_text()  # both systems agree against the label
    sheet.first.locator("select").select_option(label="the label is wrong")
    sheet.first.locator("textarea").fill("heard <b>twice</b>")
    assert page.locator("#audit-status").inner_text().startswith(f"1 of {COUNT // 2} judged: the label is wrong 1.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export verdicts").click()
    path = tmp_path / "verdicts.json"
    download.value.save_as(path)
    exported = json.loads(path.read_text())
    first = exported["clips"][0]
    assert (first["id"], first["verdict"], first["note"]) == (f"clip {COUNT - 1}", "label", "heard <b>twice</b>")
    assert first["hypotheses"] == {"graft": "x", "whisper": "x"}
    exported["clips"][1]["verdict"] = "model"
    path.write_text(json.dumps(exported))
    page.reload()
    assert sheet.first.locator("select").input_value() == "label"  # the browser has kept it
    page.get_by_label("Import verdicts").set_input_files(path)
    playwright.expect(page.locator("#audit-status")).to_contain_text("2 of")
    path.write_text("[]")
    page.get_by_label("Import verdicts").set_input_files(path)
    playwright.expect(page.locator("#audit-status")).to_contain_text("no export of such a sheet")


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_the_page_is_accessible(browser: Any, report: Path, look: str) -> None:
    looks: dict[str, dict[str, Any]] = {
        "light": {},
        "dark": {"color_scheme": "dark"},
        "phone": {"viewport": {"width": 360, "height": 740}},
    }
    page = browser.new_page(**looks[look])
    page.goto(report.as_uri())
    page.locator("#clip-table .row-button").first.click()
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
