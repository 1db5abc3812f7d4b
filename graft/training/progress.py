"""Where a run stands, as its checkpoints tell it by their names and one line of JSON; reads no tensors and needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: updates done, the real batches of the plan behind it, and how its validations went."""

    step: int = 0
    position: int = 0
    clips: int = 0
    audio_s: float = 0.0
    first_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    """Validations since the best one."""


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint in a folder; None where there is none."""
    return max(Path(folder).glob("step-*"), default=None)


def best_checkpoint(folder: str | Path) -> Path | None:
    """Find the checkpoint with the best validation, without validations the newest; None where there is none."""
    latest = latest_checkpoint(folder)
    best_step = read_progress(latest).best_step if latest else None
    return Path(folder) / checkpoint_name(best_step) if best_step is not None else latest


def read_progress(path: str | Path | None) -> Progress:
    """Read where a checkpoint stands; None is the start of a run."""
    return Progress(**json.loads(Path(path, PROGRESS_FILE).read_text())) if path else Progress()


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"
