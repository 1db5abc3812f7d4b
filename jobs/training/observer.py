"""What a training run leaves while it runs: log, metrics, checkpoints, validations, and the batch at which it went wrong."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from graft.text.wer import score
from graft.training.backends import Backend
from graft.training.batch import TrainingBatch
from graft.training.checkpoint import CheckpointWriter
from graft.training.loop import Observer
from graft.training.meter import StepLog
from graft.training.progress import Progress
from graft.training.tracking import Tracker

from .validation import Validation, rank_and_world_size

CHECKPOINTS = "checkpoints"
LOG_FILE = "log.txt"
SKIPPED_FILE = "skipped.jsonl"
STOP_FILE = "stop"
FAULT_FOLDER = "fault"


class RunObserver(Observer):
    """Writes for all workers what the first one is told; the fault's batch and skipped clips each worker writes for itself."""

    def __init__(
        self, recipe: dict[str, Any], out: Path, backend: Backend, *, from_step: int, validation: Validation | None
    ):
        self.out, self.backend, self.validation = out, backend, validation
        self.rank, _ = rank_and_world_size()
        self.shown: dict[str, int] = recipe["validation"] or {}
        self.skipped: list[dict[str, str]] = []
        self.tracker = Tracker(out, recipe, from_step=from_step) if self.rank == 0 else None
        self.writer = CheckpointWriter(out / CHECKPOINTS, keep=recipe["keep_checkpoints"]) if self.rank == 0 else None

    def say(self, line: str) -> None:
        """Add a line to the run's log, which the driver prints as it grows."""
        if self.rank == 0:
            _append(self.out / LOG_FILE, [line])

    def log(self, log: StepLog) -> None:
        if self.tracker:
            self.tracker.write(asdict(log))
        self.say(log.line())
        self._list_skipped()

    def validate(self, step: int) -> float:
        if self.validation is None:
            return super().validate(step)
        loss, heard = self.validation.loss(), self.validation.transcripts()
        found, line = {"validation_loss": loss}, f"step {step}  validation loss {loss:.4f}"
        if scored := heard[: self.shown["wer_clips"]]:
            errors = score([sample["text"] for sample in scored], [sample["heard"] for sample in scored])
            found["validation_wer"] = errors.wer
            line += f"  WER {errors.wer:.1%} [{errors.wer_low:.1%}, {errors.wer_high:.1%}] of {errors.clips} clips"
        shown = heard[: self.shown["transcripts"]]
        if self.tracker:
            self.tracker.write({"step": step, **found})
            self.tracker.write_transcripts(step, shown)
        self.say(line)
        for sample in shown:
            self.say(f"  {sample['id']}: {sample['text']!r} -> {sample['heard']!r}")
        return loss

    def checkpoint(self, progress: Progress) -> None:
        state = self.backend.state()  # gathered from all workers
        if self.writer:
            self.writer.write(state, progress)

    def wants_stop(self) -> bool:
        return self.rank == 0 and (self.out / STOP_FILE).exists()

    def fault(self, batches: Sequence[TrainingBatch], reason: str) -> None:
        folder = self.out / FAULT_FOLDER
        folder.mkdir(exist_ok=True)
        tensors = {
            f"{index}.{name}": tensor.cpu()
            for index, batch in enumerate(batches)
            for name, tensor in batch.inputs.items()
        }
        save_file(tensors, folder / f"worker-{self.rank}.safetensors")
        told = {"reason": reason, "batches": [{"position": batch.position, "ids": batch.ids} for batch in batches]}
        (folder / f"worker-{self.rank}.json").write_text(json.dumps(told, indent=2) + "\n")

    def close(self) -> None:
        """Return when all is written."""
        if self.writer:
            self.writer.wait()
        if self.tracker:
            self.tracker.close()

    def _list_skipped(self) -> None:
        """List clips that were masked, each once however many epochs and resumptions meet it, and forget them."""
        skipped = self.skipped[:]
        del self.skipped[: len(skipped)]  # a thread adds to it meanwhile
        path = self.out / SKIPPED_FILE
        listed = set(path.read_text().splitlines()) if path.is_file() else set()
        if new := [line for line in dict.fromkeys(map(json.dumps, skipped)) if line not in listed]:
            _append(path, new)
            _append(
                self.out / LOG_FILE, [f"{len(new)} clips could not be decoded and do not count, see {SKIPPED_FILE}"]
            )


def _append(path: Path, lines: Sequence[str]) -> None:
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)
