"""The keys of recipes are described for people: values, headings, one sentence, each group once; inputs are found."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from graft.config import Recipe
from graft.keys import (
    Checkpoint,
    DataKey,
    Location,
    MachineKey,
    by_heading,
    first_sentence,
    help_lines,
    inputs_of,
    key_groups,
    markdown_tables,
    values_text,
)


class Columns(Recipe):
    """Names of columns."""

    text: str = "text"
    """Name of the column of texts."""


class Source(Recipe):
    """Files of one kind. There may be several."""

    files: Location | list[Location]
    """Files, e.g. a.wav, that are read. Globs are files, too."""
    columns: Columns = Columns()
    """Names of the columns."""


Sources = Location | Source | list[Location | Source]


class Validation(Recipe):
    """Clips for validation."""

    data: Sources
    """Clips."""
    every: int = Field(default=500, ge=1)
    """Steps between two validations."""


class Shared(Recipe):
    model: Checkpoint
    """Model to train."""
    workers: MachineKey[int] = Field(default=1, ge=1)
    """Number of workers."""


class Job(Shared):
    data: DataKey[Sources]
    """Clips to train on."""
    validation: DataKey[Validation | None] = None
    """Validation on other clips."""
    sets: DataKey[dict[str, Sources]] = Field(default={})
    """Test sets by name."""
    noise: DataKey[Columns] = Columns(text="noise")
    """Names of the columns of noise."""
    workers: MachineKey[int] = Field(default=2, ge=1)
    """Number of workers."""


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (str, "text"),
        (Location | None, "path | null"),
        (bool, "true | false"),
        (Literal["a", 1] | None, "a | 1 | null"),
        (Annotated[int, Field(ge=1)], "integer of at least 1"),
        (Annotated[float, Field(gt=0, le=1)], "number over 0 and of at most 1"),
        (Annotated[float, Field(ge=0, le=1)], "number from 0 to 1"),
        (Annotated[float, Field(lt=1)], "number under 1"),
        (list[Annotated[float, Field(ge=0.5, le=2)]], "[number from 0.5 to 2, ...]"),
        (tuple[int, str], "[integer, text]"),
        (dict[str, Sources], "{text: path | {...} | [path | {...}, ...]}"),
        (Any, "any value"),
    ],
)
def test_a_type_is_said_as_the_values_that_it_allows(annotation, text):
    assert values_text(annotation) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One."),
        ("One, e.g. this, or i.e. that. null none.", "One, e.g. this, or i.e. that."),
        ("Version 0.5 is\n  enough; so be it.", "Version 0.5 is enough; so be it."),
        (None, ""),
    ],
)
def test_the_first_sentence_is_whole(text, sentence):
    assert first_sentence(text) == sentence


def test_each_group_of_keys_is_listed_once():
    groups = key_groups(Job)
    assert [group.model for group in groups] == [Job, Source, Validation, Columns]
    assert groups[1].holders == ["data", "sets.NAME", "validation.data"]
    headings = by_heading(groups[0].members)
    assert {heading: [key.name for key in keys] for heading, keys in headings.items()} == {
        "data": ["data", "validation", "sets", "noise"],
        "machine": ["workers"],
        "keys": ["model"],
    }
    lines = "\n".join(help_lines(Job, width=80))
    assert lines.count("files (") == lines.count("text = text (text)") == 1
    assert "  noise = {text: noise} ({...})\n" in lines
    assert (
        "\ndata, sets.NAME, validation.data: Files of one kind.\n  data.files (path | [path, ...], required)\n" in lines
    )
    assert "      Files, e.g. a.wav, that are read.\n" in lines
    assert "Globs" not in lines


def test_tables_leave_out_what_the_page_describes_elsewhere():
    table = markdown_tables(Job, known={Shared: "[shared](#shared)", Source: "[sources](#sources)"}, level=3)
    assert "And the keys of [shared](#shared)." in table
    assert "| `model` |" not in table
    assert "| `workers` | `integer of at least 1` | `2` | Number of workers. |" in table
    assert "`data`, `sets.NAME`, `validation.data`: see [sources](#sources)." in table
    assert "| `data` | `path \\| {...} \\| [path \\| {...}, ...]` | required | Clips to train on. |" in table


def test_inputs_are_the_texts_that_name_files_and_models():
    recipe = Job(
        model="m",
        data=["a", Source(files=["b", "c"])],
        validation=Validation(data="d"),
        sets={"x": "e", "y": [Source(files="f")]},
    )
    assert [(one.key, one.value, one.is_file) for one in inputs_of(recipe)] == [
        ("model", "m", False),
        ("data", "a", True),
        ("data.files", "b", True),
        ("data.files", "c", True),
        ("validation.data", "d", True),
        ("sets.x", "e", True),
        ("sets.y.files", "f", True),
    ]
