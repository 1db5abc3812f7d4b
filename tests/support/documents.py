"""Read the pages of this repository: headings, links, code blocks, commands, and the names that they mention."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from tests.support.paths import ROOT

FOLDERS = ("graft", "jobs", "serve", "cluster", "docs", "tests")
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (?:graft|make|python -m|ray|serve|kubectl|docker) \S.*$", re.MULTILINE)
_MEASURED = re.compile(r"`((?:python -m jobs\.|graft )bench [^`]+)`")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A Markdown file, by its path below the repository."""

    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks and comments."""
        return _COMMENT.sub("", _FENCE.sub("", self.text))

    def blocks(self, language: str) -> list[str]:
        """List the code blocks in a language."""
        return [code for _, found, code in _FENCE.findall(self.text) if found == language]

    def commands(self) -> list[str]:
        """List the commands in shell blocks, in indented lines, and benchmarks in sentences, each once.

        Continued lines are joined, and where the output goes is left out.
        """
        found = [*self.blocks("sh"), *_INDENTED.findall(self.prose), *_MEASURED.findall(self.prose)]
        lines = (line.partition(" > ")[0] for line in "\n".join(found).replace("\\\n", " ").splitlines())
        commands = (shlex.split(line, comments=True) for line in lines)
        return list(dict.fromkeys(shlex.join(words) for words in commands if words))

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors that GitHub gives to the headings."""
        seen: dict[str, int] = {}
        for heading in re.findall(r"^#{1,6} +(.+?) *#*$", self.prose, re.MULTILINE):
            shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
            slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            number = seen.setdefault(slug, 0)
            seen[slug] += 1
            if number:
                seen[f"{slug}-{number}"] = 1
        return set(seen)

    def links(self) -> Iterator[str]:
        """Yield the targets of links and pictures that lie in this repository."""
        plain = _CODE.sub("", self.prose)
        found = re.findall(r"\]\(([^)\s]+)[^)]*\)", plain)
        found += re.findall(r"\b(?:src|srcset|href)=\"([^\"\s]+)", plain)
        yield from (link for link in found if not urlsplit(link).scheme)

    def code(self) -> list[str]:
        """List the code in the prose, without its backticks."""
        return [" ".join(code.split()) for _, code in _CODE.findall(self.prose)]

    def section(self, heading: str) -> str:
        """Return what stands below a heading, up to the next one of its level or above."""
        level = heading.partition(" ")[0]
        end = rf"(?=^#{{1,{len(level)}}} |\Z)"
        found = re.search(rf"^{re.escape(heading)}$(.*?){end}", self.text, re.MULTILINE | re.DOTALL)
        assert found, f"{self.name} has no heading {heading!r}"
        return found[1]

    def table(self, heading: str, *, column: str) -> list[dict[str, str]]:
        """Return the rows of the table below a heading that has this column."""
        for block in re.findall(r"(?:^\|.*\|\n)+", self.section(heading), re.MULTILINE):
            names, _, *rows = (_cells(line) for line in block.splitlines())
            if column in names:
                return [dict(zip(names, row, strict=True)) for row in rows]
        raise AssertionError(f"{self.name} has no table with the column {column!r} under {heading!r}")


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def codes(cell: str) -> list[str]:
    """List the code in a cell of a table."""
    return [code for _, code in _CODE.findall(cell)]


PAGES = [
    Page(path.relative_to(ROOT).as_posix())
    for path in sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
]


def shown_recipe() -> str:
    """Return the recipe of several manifests that jobs/README.md shows and runs as my-data.yaml."""
    (recipe,) = (block for block in Page("jobs/README.md").blocks("yaml") if block.startswith("sources:"))
    return recipe
