"""Give a command its output folder: for one run at a time, and for the recipe in it alone."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from graft.config import Recipe, recipe_yaml
from graft.errors import OutputError
from graft.storage.atomic import atomic_folder, write_atomic

from .folder_lock import FolderLock, lock_folder

R = TypeVar("R", bound=Recipe)
RECIPE_FILE = "recipe.yaml"
LOCK = ".lock"


@contextlib.contextmanager
def locked_output(out: str) -> Iterator[None]:
    """Keep other runs out of the folder `out` while the block runs; it is made, and removed again if it stays empty.

    Raises OutputError that names the run which is there, and when the folder cannot be written.
    """
    with _locked(_local_path(out) / LOCK, out):
        yield


def output_files(out: str) -> list[Path]:
    """List what a folder that this run has locked holds; nothing where there is no folder."""
    folder = _local_path(out)
    files = folder.iterdir() if folder.is_dir() else ()
    return [path for path in files if not path.name.startswith(f"{LOCK}-")]


def claim_output(out: str, recipe: Recipe, *, ignore: frozenset[str] = frozenset()) -> Path:
    """Make the folder `out`, which the run has locked, this recipe's, or find it to be so already; returns the folder.

    `ignore` holds dotted keys that may differ between runs, such as the number of workers. Raises OutputError when the
    folder holds another recipe's results, naming the first key that differs, and when it cannot be made.
    """
    holds_results(out, recipe, ignore=ignore)
    folder = Path(out)
    with _output_errors(folder):
        write_atomic(folder / RECIPE_FILE, recipe_yaml(recipe))
    return folder


@contextlib.contextmanager
def staged_output(out: str, recipe: Recipe) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that becomes `out` when the block ends well, and is removed when it fails.

    It is for commands that finish in one go: `out` exists only when it is complete. Raises OutputError if `out` exists
    and is not empty, or is the working folder or one around it, or if another run is making it.
    """
    final = _local_path(out)
    _check_vacant(final, out)
    if Path.cwd().resolve().is_relative_to(final.resolve()):
        raise OutputError(
            f"output {out} is the working folder, or holds it, and would be replaced: choose another out="
        )
    with _locked(final.absolute().with_name(f".{final.name}{LOCK}"), out) as lock, contextlib.ExitStack() as stack:
        _check_vacant(final, out)  # another run may just have made it
        with _output_errors(final):
            stage = stack.enter_context(atomic_folder(final))
        yield stage
        write_atomic(stage / RECIPE_FILE, recipe_yaml(recipe))
        lock.check()
        with _output_errors(final):
            stack.close()  # moves the folder into its place


def _check_vacant(final: Path, out: str) -> None:
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise OutputError(f"output {out} exists: choose another out= or remove it")


@contextlib.contextmanager
def _locked(stem: Path, out: str) -> Iterator[FolderLock]:
    with contextlib.ExitStack() as stack:
        with _output_errors(Path(out)):
            lock = stack.enter_context(lock_folder(stem, output=out))
        yield lock


def holds_results(out: str, recipe: Recipe, *, ignore: frozenset[str] = frozenset()) -> bool:
    """Tell whether the folder `out` belongs to this recipe. Raises OutputError if it is another recipe's, or a URI.

    A key that an earlier version did not know, and so did not write, had its default there.
    """
    path = _local_path(out) / RECIPE_FILE
    if not path.is_file():
        return False
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        with contextlib.suppress(ValidationError):  # of another command, or with keys that are gone
            values = yaml.safe_load(recipe_yaml(type(recipe).model_validate(values)))
        old = _dotted_keys(values)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:  # AttributeError: YAML of other things
        raise OutputError(
            f"output {out}: its {RECIPE_FILE} is not a readable recipe: choose another out= or remove the folder"
        ) from error
    new = _dotted_keys(yaml.safe_load(recipe_yaml(recipe)))
    for key in dict.fromkeys([*new, *old]):
        if key not in ignore and (key not in old or key not in new or _meaning(old[key]) != _meaning(new[key])):
            was, wanted = (_shown(values[key]) if key in values else "absent" for values in (old, new))
            raise OutputError(
                f"output {out} holds another recipe's results: {key} was {was} there and is {wanted} now: "
                "choose another out= or remove the folder"
            )
    return True


def held_recipe(out: str, recipe_class: type[R]) -> R | None:
    """Read the recipe whose results a folder holds; None where there is none, or one that is not of this class."""
    path = _local_path(out) / RECIPE_FILE
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        return recipe_class.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    return None


def _local_path(out: str) -> Path:
    """Return `out` as a path. Raises OutputError for a URI, which would name a folder on the node that runs the job."""
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


def _meaning(value: Any) -> Any:
    """Return what two spellings of a value share: `calls`, `calls/`, `[calls]` and its absolute path are one folder."""
    if isinstance(value, list):
        return _meaning(value[0]) if len(value) == 1 else [_meaning(one) for one in value]
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.80}"


def _dotted_keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested groups: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_group = isinstance(value, dict) and value
        flat |= _dotted_keys(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return flat
