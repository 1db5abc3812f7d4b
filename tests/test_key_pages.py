"""The tables of keys in the pages are those of the commands."""

from pathlib import Path

import pytest

from tests.support.key_pages import COMMAND, PAGES, with_tables


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_the_tables_of_keys_are_as_the_commands_have_them(path: Path) -> None:
    page = path.read_text()
    assert page == with_tables(page, PAGES[path]()), f"`{COMMAND}` writes the tables anew"
