"""Read a run's progress from its checkpoints' names and progress.json, without torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from graft.storage.atomic import write_atomic

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """The progress of a run: updates done, real batches of the plan done, and the results of validations."""

    step: int = 0
    position: int = 0
    clips: int = 0
    masked: int = 0
    """Number of clips that were masked, which `clips` does not count."""
    audio_s: float = 0.0
    first_loss: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the best validation; none before the first one."""
    best_step: int | None = None
    stale_validations: int = 0
    """Number of validations since the best one."""
    schedule_start: int = 0
    """Number of updates at which the present schedule of the learning rate began."""


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint in a folder; return None where there is none."""
    return max(Path(folder).glob("step-*"), default=None)


def best_checkpoint(folder: str | Path) -> Path | None:
    """Find the checkpoint of the best validation, or the newest one where there was no validation."""
    latest = latest_checkpoint(folder)
    best_step = read_progress(latest).best_step if latest else None
    return Path(folder) / step_folder(best_step) if best_step is not None else latest


def read_progress(path: str | Path | None) -> Progress:
    """Read a checkpoint's progress; None stands for the start of a run."""
    return Progress(**json.loads(Path(path, PROGRESS_FILE).read_text())) if path else Progress()


def write_progress(path: str | Path, progress: Progress) -> None:
    """Write the progress of a checkpoint, which is given by its folder."""
    write_atomic(Path(path, PROGRESS_FILE), json.dumps(asdict(progress)) + "\n")


def step_folder(step: int) -> str:
    return f"step-{step:08d}"
