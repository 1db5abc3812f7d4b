"""Write the tables of keys into jobs/README.md and serve/README.md: `python -m tests.support.key_pages`.

They stand between two markers; the text around them is written by hand.
"""

import re
from pathlib import Path

from pydantic import BaseModel

from graft.keys import key_groups, markdown_tables
from jobs.preparation.pseudo_labels import TextsRecipe
from jobs.schema import NAMES, recipe_class
from jobs.training.recipe import TrainRecipe
from serve.command import ServeRecipe
from tests.support.paths import ROOT

COMMAND = "python -m tests.support.key_pages"
MARKERS = (f"<!-- keys: written by `{COMMAND}` -->", "<!-- end of keys -->")
SHARED: dict[str, type[BaseModel]] = {"stage1 and stage2": TrainRecipe, "label and format": TextsRecipe}
"""Classes whose keys several commands have, and what the page calls them."""


def job_tables() -> str:
    """Write the keys of all jobs: those that commands share first, each group of keys where it first occurs."""
    sections = {f"Keys of {name}": model for name, model in SHARED.items()}
    for command in NAMES:
        sections[f"Keys of {command}"] = recipe_class(command)
    return _sections(sections)


def serve_tables() -> str:
    """Write the keys of the service."""
    return _sections({"Keys of serve": ServeRecipe})


def _sections(sections: dict[str, type[BaseModel]]) -> str:
    known: dict[type[BaseModel], str] = {}
    parts = []
    for title, model in sections.items():
        parts.append(f"### {title}\n\n{markdown_tables(model, known=known, level=4)}")
        link = f"[{title.lower()}](#{title.lower().replace(' ', '-')})"
        known |= {group.model: link for group in key_groups(model) if group.model not in known}
    return "\n\n".join(parts)


PAGES = {ROOT / "jobs" / "README.md": job_tables, ROOT / "serve" / "README.md": serve_tables}


def with_tables(page: str, tables: str) -> str:
    """Put tables between the markers of a page."""
    first, last = MARKERS
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    assert len(pattern.findall(page)) == 1, f"the page wants once the line {first}, and later the line {last}"
    return pattern.sub(lambda _: f"{first}\n\n{tables}\n\n{last}", page)


def main() -> None:
    """Write the tables into both pages."""
    for path, tables in PAGES.items():
        Path(path).write_text(with_tables(path.read_text(), tables()))


if __name__ == "__main__":
    main()
