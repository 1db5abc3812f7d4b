"""Write and read training checkpoints: trained weights, AdamW's moments by parameter name, and the run's progress."""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.storage.atomic import atomic_folder
from graft.training.progress import Progress, read_progress, step_folder, write_progress

STATE_FILE = "trained.safetensors"

State = dict[str, dict[str, Tensor]]
"""Maps a parameter's name to its weight, exp_avg and exp_avg_sq, each float32 in the parameter's shape."""


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time; the next call raises the errors of the last write."""

    def __init__(self, folder: str | Path, *, keep: int):
        self.folder, self.keep = Path(folder), keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-checkpoint")
        self._last: Future[Path] | None = None

    def write(self, state: State, progress: Progress) -> None:
        """Start to write a checkpoint; the caller must not change `state` afterwards."""
        self.wait()
        self._last = self._pool.submit(write_checkpoint, self.folder, state, progress, keep=self.keep)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._last:
            self._last.result()


def write_checkpoint(folder: str | Path, state: State, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint into its own subfolder, atomically, and remove all but the `keep` newest and the best."""
    path = Path(folder) / step_folder(progress.step)
    tensors = {f"{key}:{name}": tensor.contiguous() for name, entry in state.items() for key, tensor in entry.items()}
    with atomic_folder(path, replace=True) as partial:
        save_file(tensors, partial / STATE_FILE)
        write_progress(partial, progress)
    for old in sorted(Path(folder).glob("step-*"))[:-keep]:
        if progress.best_step is None or old.name != step_folder(progress.best_step):
            shutil.rmtree(old)
    return path


def load_checkpoint(path: str | Path) -> tuple[State, Progress]:
    """Read a checkpoint that write_checkpoint wrote."""
    state: State = {}
    for key_and_name, tensor in load_file(Path(path) / STATE_FILE).items():
        key, _, name = key_and_name.partition(":")
        state.setdefault(name, {})[key] = tensor
    return state, read_progress(path)
