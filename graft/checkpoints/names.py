"""Name checkpoints, which are folders or hub ids, for people and for processes in other working folders."""

import os
from pathlib import Path

# Name of the bundled Whisper base, as a model and as an aligner.
WHISPER = "whisper"
# Name of the precision that rounds a model's linear layers to 8 bits when it is opened, for CPUs.
INT8 = "int8"


def checkpoint_name(checkpoint: str | os.PathLike[str]) -> str:
    """Return the name that people use: the folder's own name, or the hub id."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else os.fspath(checkpoint)


def absolute_checkpoint(checkpoint: str) -> str:
    """Return a name that is valid in any working folder: the folder's absolute path, or the hub id."""
    return os.path.abspath(checkpoint) if os.path.exists(checkpoint) else checkpoint
