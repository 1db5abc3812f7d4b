"""Give a job its output folder: it belongs to the recipe that stands in it, and holds no other one's results."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from graft.config import Recipe, recipe_yaml
from graft.errors import OutputError
from graft.storage.atomic import atomic_folder, write_atomic

RECIPE_FILE = "recipe.yaml"


def claim_output(out: str, recipe: Recipe, *, ignore: frozenset[str] = frozenset()) -> Path:
    """Make the folder `out` the home of this recipe's results, or come back to it; returns the folder.

    `ignore` holds dotted keys that may differ between runs (how many workers, not what is computed). Raises OutputError when the folder
    holds another recipe's results, with the first key that differs, and when it cannot be made.
    """
    holds_results(out, recipe, ignore=ignore)
    folder = Path(out)
    with _output_errors(folder):
        write_atomic(folder / RECIPE_FILE, recipe_yaml(recipe))
    return folder


@contextlib.contextmanager
def staged_output(out: str, recipe: Recipe) -> Iterator[Path]:
    """A hidden sibling of `out` to write into; it moves to `out` when the block ends well and is removed when it does not.

    For jobs that finish in one go: then `out` exists only when it is complete. Raises OutputError when `out` holds anything.
    """
    final = _local(out)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise OutputError(f"output {out} exists: choose another out= or remove it")
    with contextlib.ExitStack() as stack:
        with _output_errors(final):
            stage = stack.enter_context(atomic_folder(final))
        yield stage
        write_atomic(stage / RECIPE_FILE, recipe_yaml(recipe))
        with _output_errors(final):
            stack.close()  # moves the folder into its place


def holds_results(out: str, recipe: Recipe, *, ignore: frozenset[str] = frozenset()) -> bool:
    """Whether the folder `out` already belongs to this recipe. Raises OutputError when it belongs to another one, and when it is a URI."""
    path = _local(out) / RECIPE_FILE
    if not path.is_file():
        return False
    try:
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OutputError(
            f"output {out}: its {RECIPE_FILE} is not readable: choose another out= or remove the folder"
        ) from error
    if not isinstance(there, dict):
        raise OutputError(f"output {out}: its {RECIPE_FILE} is not a recipe: choose another out= or remove the folder")
    old, new = _flat(there), _flat(yaml.safe_load(recipe_yaml(recipe)))
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in ignore and (key not in old or key not in new or old[key] != new[key]):
            was, wanted = (_shown(values, key) for values in (old, new))
            raise OutputError(
                f"output {out} holds another recipe's results: {key} was {was} there and is {wanted} now: "
                "choose another out= or remove the folder"
            )
    return True


def _local(out: str) -> Path:
    """The path that `out` is: as one, a URI would name a folder in the working folder of whichever node runs the job."""
    if "://" in out:
        raise OutputError(f"output {out} is no path: give a folder that every node sees, and copy it there afterwards")
    return Path(out)


@contextlib.contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"output {folder} cannot be written: {error.strerror or error}: choose another out="
        ) from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(values: dict[str, Any], key: str) -> str:
    return f"{values[key]!r:.80}" if key in values else "absent"
