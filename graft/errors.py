r"""Errors that a user can mend; every message is one line that says what is wrong, where, and the remedy.

GraftError
 |- RecipeError    a recipe's key or value
 |- AudioError     a file or upload that is not usable audio
 |   |- AudioTooLong      audio that is usable, but longer than the limit
 |   \- AudioTrackError   a file without the audio track that was asked for
 |- DataError      a manifest, a parquet file or a row
 |   \- UnreachableError  a place that does not answer, after retries
 |- ModelError     a checkpoint, its parts or its origin
 |- OutputError    a folder that holds other results
 |- MissingExtra   a capability whose packages are not installed
"""

import importlib
from pathlib import Path
from types import ModuleType


class GraftError(Exception):
    """The root of every error that a user can mend."""


class RecipeError(GraftError):
    """A recipe holds an unknown key or a wrong value."""


class AudioError(GraftError):
    """Audio is missing, unreadable, empty or too long."""


class AudioTooLong(AudioError):
    """Audio is longer than the limit."""


class AudioTrackError(AudioError):
    """A file does not have the audio track that was asked for."""


class DataError(GraftError):
    """Training or evaluation data is missing or malformed."""


class UnreachableError(DataError):
    """A place that did not answer, though it was asked several times, and may answer later."""


class ModelError(GraftError):
    """A checkpoint is missing, of another kind, or trained on other bases."""


class OutputError(GraftError):
    """An output folder holds another recipe's results."""


class MissingExtra(GraftError):
    """A package of an optional extra is not installed."""


def checkout() -> Path | None:
    """Return the folder of the checkout that this code is run from; None where graft is installed from a wheel."""
    package = Path(__file__).parent
    return None if (package / "jobs").is_dir() else package.parent  # a wheel holds the jobs inside this package


def install_command(extra: str = "") -> str:
    """Return the command that installs graft with an optional extra, from the checkout or from the package index."""
    source = checkout()
    extras = f"[{extra}]" if extra else ""
    return f"pip install -e '{source}{extras}'" if source else f"pip install 'graft-asr{extras}'"


def require(module: str, *, extra: str) -> ModuleType:
    """Import a module of an optional extra. Raises MissingExtra with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.split(".")[0]):
            raise
        raise MissingExtra(f"{module} is not installed: {install_command(extra)}") from error
