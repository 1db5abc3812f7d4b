"""Take the English normaliser of a checkout of the Open ASR Leaderboard, whose rules change from time to time."""

import hashlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

from graft.errors import DataError

PACKAGE = "normalizer"
"""Folder of the checkout, and name of the package in it."""


def leaderboard_normalizer(checkout: str) -> tuple[str, Callable[[str], str]]:
    """Return the name of a checkout's normaliser, with the digest of its files, and its function.

    Raises DataError where there is none, or a package that it needs is missing.
    """
    root = Path(checkout).expanduser()
    spec = PathFinder.find_spec(PACKAGE, [str(root)])
    if spec is None or spec.loader is None:
        raise DataError(f"leaderboard={checkout} has no package {PACKAGE}: give a checkout of the Open ASR Leaderboard")
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]  # of another checkout
    module = sys.modules[PACKAGE] = module_from_spec(spec)  # its modules import each other by this name
    try:
        spec.loader.exec_module(module)
        normalizer = module.EnglishTextNormalizer()
    except ModuleNotFoundError as error:
        raise DataError(f"leaderboard={checkout} needs {error.name}: pip install {error.name}") from error
    except AttributeError as error:
        raise DataError(
            f"leaderboard={checkout}: its {PACKAGE} has no EnglishTextNormalizer: give a checkout"
        ) from error
    digest = hashlib.sha256()
    for file in sorted((root / PACKAGE).glob("*.py")):
        digest.update(file.read_bytes())
    return f"open-asr-leaderboard {digest.hexdigest()[:12]}", normalizer
