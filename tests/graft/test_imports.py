"""Heavy imports are done without collections of garbage in between, and leave the collector as it was."""

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.imports import import_heavy

MODULE = "import gc\n\nWAS_ENABLED = gc.isenabled()\nKEPT = [[number] for number in range(1000)]\n"


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "heavy_one.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "heavy_one"
    sys.modules.pop("heavy_one", None)
    gc.unfreeze()
    gc.enable()


class Circle:
    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize("is_enabled", [True, False])
def test_nothing_is_collected_in_between_and_what_is_imported_never(heavy: str, is_enabled: bool) -> None:
    garbage = weakref.ref(Circle())
    (gc.enable if is_enabled else gc.disable)()
    frozen = gc.get_freeze_count()
    module = import_heavy(heavy)
    assert not module.WAS_ENABLED
    assert gc.isenabled() == is_enabled
    assert garbage() is None
    assert (after := gc.get_freeze_count()) > frozen + 1000
    assert import_heavy(heavy) is module
    assert gc.get_freeze_count() == after


def test_a_failed_import_leaves_the_collector_as_it_was(heavy: str, tmp_path: Path) -> None:
    (tmp_path / "heavy_one.py").write_text("raise KeyError")
    with pytest.raises(KeyError):
        import_heavy(heavy)
    assert gc.isenabled()
