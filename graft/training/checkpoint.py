"""A checkpoint: the trained weights and the optimizer's moments by name, and one line on where the run stands."""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.storage.atomic import atomic_folder
from graft.training.progress import PROGRESS_FILE, Progress, checkpoint_name, read_progress

STATE_FILE = "trained.safetensors"

State = dict[str, dict[str, Tensor]]
"""Parameter name -> weight, exp_avg, exp_avg_sq, each float32 in the parameter's shape."""


class CheckpointWriter:
    """Writes checkpoints into a folder while training goes on, one at a time; what fails is raised by the next call."""

    def __init__(self, folder: str | Path, *, keep: int):
        self.folder, self.keep = Path(folder), keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-checkpoint")
        self._last: Future[Path] | None = None

    def write(self, state: State, progress: Progress) -> None:
        """Begin to write; `state` must not change any more."""
        self.wait()
        self._last = self._pool.submit(write_checkpoint, self.folder, state, progress, keep=self.keep)

    def wait(self) -> None:
        """Return when all is written."""
        if self._last:
            self._last.result()


def write_checkpoint(folder: str | Path, state: State, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint of its own name into a folder, whole or not at all; remove all but the `keep` newest and the best."""
    path = Path(folder) / checkpoint_name(progress.step)
    tensors = {f"{key}:{name}": tensor.contiguous() for name, entry in state.items() for key, tensor in entry.items()}
    with atomic_folder(path, replace=True) as partial:
        save_file(tensors, partial / STATE_FILE)
        (partial / PROGRESS_FILE).write_text(json.dumps(asdict(progress)) + "\n")
    for old in sorted(Path(folder).glob("step-*"))[:-keep]:
        if progress.best_step is None or old.name != checkpoint_name(progress.best_step):
            shutil.rmtree(old)
    return path


def load_checkpoint(path: str | Path) -> tuple[State, Progress]:
    """Read what write_checkpoint wrote."""
    state: State = {}
    for key_and_name, tensor in load_file(Path(path) / STATE_FILE).items():
        key, _, name = key_and_name.partition(":")
        state.setdefault(name, {})[key] = tensor
    return state, read_progress(path)
