"""Fixtures that the tests of commands share."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Give what mounts a disk in memory by its options, or changes those of the one that is mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def change(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
            pytest.skip(f"this machine lets nobody mount a disk: {done.stderr.strip()}")
        return disk

    yield change
    subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)
