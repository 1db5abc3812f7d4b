"""Checkpoints as recipes name them: folders, and ids of a hub."""

import os
from pathlib import Path


def checkpoint_name(checkpoint: str | os.PathLike[str]) -> str:
    """What people call it: a folder's own name, or the hub id."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else os.fspath(checkpoint)


def from_anywhere(checkpoint: str) -> str:
    """Name it to processes with another working folder: by a folder's absolute path, or the hub id."""
    return os.path.abspath(checkpoint) if os.path.exists(checkpoint) else checkpoint
