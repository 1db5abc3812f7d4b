"""A checkpoint: the trained weights and the optimizer's moments by name, and one line on where the run stands."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from graft.training.backends import State

STATE_FILE = "trained.safetensors"
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: updates done, and the real batches of the plan behind it."""

    step: int = 0
    position: int = 0
    clips: int = 0
    audio_s: float = 0.0
    first_loss: float | None = None


def write_checkpoint(folder: str | Path, state: State, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint of its own name into a folder, whole or not at all, and remove all but the `keep` newest."""
    path = Path(folder) / f"step-{progress.step:08d}"
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"{key}:{name}": tensor.contiguous() for name, entry in state.items() for key, tensor in entry.items()}
    save_file(tensors, partial / STATE_FILE)
    (partial / PROGRESS_FILE).write_text(json.dumps(asdict(progress)) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)
    for old in sorted(Path(folder).glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint in a folder; None where there is none."""
    return max(Path(folder).glob("step-*"), default=None)


def load_checkpoint(folder: str | Path) -> tuple[State, Progress]:
    """Read what write_checkpoint wrote."""
    state: State = {}
    for key_and_name, tensor in load_file(Path(folder) / STATE_FILE).items():
        key, _, name = key_and_name.partition(":")
        state.setdefault(name, {})[key] = tensor
    return state, Progress(**json.loads(Path(folder, PROGRESS_FILE).read_text()))
