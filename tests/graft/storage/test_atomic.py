"""Files and folders appear whole or not at all, whatever interrupts their writer."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from graft.storage.atomic import atomic_file, atomic_folder, write_atomic


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.json"
    write_atomic(path, "é")
    assert path.read_text(encoding="utf-8") == "é"
    write_atomic(str(path), b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(TypeError):
        write_atomic(path, [3])  # type: ignore[arg-type]
    assert os.listdir(path.parent) == ["a.json"]
    assert path.read_bytes() == b"two"


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    atomic, plain = ((tmp_path / name).stat().st_mode for name in ("atomic", "plain"))
    assert stat.S_IMODE(atomic) == stat.S_IMODE(plain)


def fail_after(path: Path) -> None:
    path.write_text("new")
    raise ZeroDivisionError


@pytest.mark.parametrize("sync", [True, False])
def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path, sync=sync) as temporary:
        fail_after(temporary)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_text() == "old"


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_file(path) as slow:
        slow.write_text("sl")
        with atomic_file(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
        with slow.open("a") as file:
            file.write("ow")
    assert path.read_text() == "slow"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_in_the_place_of_a_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "file" / "a", "")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "file" / "a"):
        pass
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "file", replace=True):
        pass
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "out"
    with atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("a")
        assert not path.exists()
    assert (path / "inner" / "a").read_text() == "a"
    assert os.listdir(path.parent) == ["out"]


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(path, replace=True) as temporary:
        fail_after(temporary / "new")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(path) == ["old"]


def test_only_replace_removes_a_folder_with_content(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with atomic_folder(path) as temporary:  # an empty one may be filled
        (temporary / "first").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(path) as temporary:
        (temporary / "second").touch()
    assert os.listdir(path) == ["first"]
    with atomic_folder(path, replace=True) as temporary:
        (temporary / "second").touch()
    assert os.listdir(path) == ["second"]
    assert os.listdir(tmp_path) == ["out"]


KILLED_WRITER = """
import os, signal, sys
from graft.storage.atomic import atomic_file, atomic_folder
with atomic_folder(sys.argv[1] + "/folder", replace=True) as folder, atomic_file(sys.argv[1] + "/file") as file:
    (folder / "a").write_text("half")
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder/a", "file"):
        (tmp_path / name).write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert {(tmp_path / name).read_text() for name in ("folder/a", "file")} == {"old"}
    assert (tmp_path / ".folder.partial" / "a").read_text() == "half"
    with atomic_folder(tmp_path / "folder", replace=True) as folder:  # over what the killed writer left
        assert os.listdir(folder) == []
        (folder / "b").touch()
    assert os.listdir(tmp_path / "folder") == ["b"]
    assert not (tmp_path / ".folder.partial").exists()
