"""Write and read training checkpoints: trained weights, AdamW's moments by parameter name, and the run's progress."""

import contextlib
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.storage.atomic import atomic_folder
from graft.training.progress import Progress, read_progress, step_folder, write_progress

STATE_FILE = "trained.safetensors"
AVERAGE_FOLDER = "average"

State = dict[str, dict[str, Tensor]]
"""Maps a parameter's name to its weight, exp_avg and exp_avg_sq, each float32 in the parameter's shape."""


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time; the next call raises the errors of the last write."""

    def __init__(self, folder: str | Path, *, keep: int):
        self.folder, self.keep = Path(folder), keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-checkpoint")
        self._last: Future[Path] | None = None

    def write(self, state: State, progress: Progress, *, also: Collection[int] = ()) -> None:
        """Start to write a checkpoint; the caller must not change `state` afterwards."""
        self.wait()
        self._last = self._pool.submit(write_checkpoint, self.folder, state, progress, keep=self.keep, also=also)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._last:
            self._last.result()


def write_checkpoint(
    folder: str | Path, state: State, progress: Progress, *, keep: int, also: Collection[int] = ()
) -> Path:
    """Write a checkpoint into its own subfolder, atomically.

    All others are removed but the `keep` newest, the best, and those of the steps `also`.
    """
    path = Path(folder) / step_folder(progress.step)
    _write_state(path, state, progress)
    kept = {step_folder(step) for step in {progress.best_step, *also} if step is not None}
    for old in sorted(Path(folder).glob("step-*"))[:-keep]:
        if old.name not in kept:
            shutil.rmtree(old)
    return path


def write_average(folder: str | Path, state: State, progress: Progress) -> Path:
    """Write averaged weights, which need no moments, beside a run's checkpoints, of which they are none."""
    path = Path(folder) / AVERAGE_FOLDER
    _write_state(path, state, progress)
    return path


def average_weights(folders: Sequence[str | Path], newest: State) -> State:
    """Average the trained weights of checkpoints and of the newest state, in float32.

    One tensor at a time is read of each checkpoint.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(Path(folder) / STATE_FILE, framework="pt")) for folder in folders]
        averaged: State = {}
        for name, entry in newest.items():
            total = entry["weight"].clone()
            for file in files:
                total += file.get_tensor(f"weight:{name}")
            averaged[name] = {"weight": total / (len(files) + 1)}
    return averaged


def _write_state(path: Path, state: State, progress: Progress) -> None:
    tensors = {f"{key}:{name}": tensor.contiguous() for name, entry in state.items() for key, tensor in entry.items()}
    with atomic_folder(path, replace=True) as partial:
        save_file(tensors, partial / STATE_FILE)
        write_progress(partial, progress)


def load_checkpoint(path: str | Path) -> tuple[State, Progress]:
    """Read a checkpoint that write_checkpoint wrote."""
    state: State = {}
    for key_and_name, tensor in load_file(Path(path) / STATE_FILE).items():
        key, _, name = key_and_name.partition(":")
        state.setdefault(name, {})[key] = tensor
    return state, read_progress(path)
