"""The pictures of the documents are drawn from the tables in docs/data, and the documents quote the same numbers."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PACKAGES = ("cluster", "docs", "graft", "jobs", "serve")
TABLES = sorted(path.stem for path in (DOCS / "data").glob("*.csv"))
PAGES = [*ROOT.glob("*.md"), *(page for name in PACKAGES for page in (ROOT / name).rglob("*.md"))]
LARGEST_BYTES = 200_000
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_draw", DOCS / "draw.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.seconds
def test_committed_pictures_are_what_is_drawn(draw: ModuleType, tmp_path: Path) -> None:
    drawn = draw.draw(tmp_path)
    assert sorted(path.name for path in drawn) == sorted(path.name for path in (DOCS / "pictures").glob("*.svg"))
    for path in drawn:
        committed = DOCS / "pictures" / path.name
        assert texts(path) == texts(committed), f"{path.name}: run python docs/draw.py"
        assert list(marks(path, draw.MARK)) == pytest.approx(list(marks(committed, draw.MARK)), abs=0.5), path.name
        assert committed.stat().st_size < LARGEST_BYTES


def texts(svg: Path) -> list[str]:
    """The texts of a picture, which matplotlib writes beside their paths."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text(), re.DOTALL)


def marks(svg: Path, prefix: str) -> Iterator[float]:
    """The numbers in the paths of all elements whose ids begin with the prefix: they do not depend on fonts."""
    for element in ElementTree.parse(svg).iter():
        if element.get("id", "").startswith(prefix):
            for part in element.iter():
                yield from map(float, NUMBER.findall(" ".join(part.get(key, "") for key in ("d", "x", "y"))))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_where_it_is_from(draw: ModuleType, name: str) -> None:
    about, rows = draw.read_table(name)
    assert {"what", "machine", "date", "command"} <= about.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert rows
    assert all(None not in row and None not in row.values() for row in rows)


@pytest.mark.parametrize("name", TABLES)
def test_the_page_of_a_table_quotes_its_numbers(draw: ModuleType, name: str) -> None:
    about, rows = draw.read_table(name)
    if "page" not in about:
        return
    page = (ROOT / about["page"]).read_text().replace(",", "")
    for row in rows:
        for text in row.values():
            if NUMBER.fullmatch(text):
                assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d.]*\d)", page), f"{text} is not in {about['page']}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_shows_or_links_exist(page: Path) -> None:
    text = page.read_text()
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    linked = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    for name in [*shown, *linked]:
        assert "://" in name or name.startswith("mailto:") or (page.parent / name).exists(), f"{page.name}: {name}"
    dark = {name.replace("-dark.svg", "-light.svg") for name in shown if name.endswith("-dark.svg")}
    assert dark == {name for name in shown if name.endswith("-light.svg")}
