"""The graft that is measured: the one that is given, or one of the bundled weights."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graft.checkpoints.loading import check_graft

from ..build import BuildRecipe, run


@contextlib.contextmanager
def graft_or_built(folder: str | None) -> Iterator[str]:
    """A graft's folder, by default one that is built of the bundled weights for as long as the context lasts. Raises ModelError."""
    if folder:
        check_graft(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        built = str(Path(scratch, "graft"))
        run(BuildRecipe(out=built))
        yield built
