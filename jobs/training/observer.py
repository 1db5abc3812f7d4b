"""Write a training run's files: log, metrics, checkpoints, validations, skipped clips, and a failed step's batches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from graft.errors import DataError
from graft.training.backends import Backend, TrainingBatch
from graft.training.checkpoint import CheckpointWriter
from graft.training.loop import Observer, ValidationResult
from graft.training.meter import StepLog
from graft.training.progress import Progress
from graft.training.tracking import Tracker

from .recipe import ValidationRecipe
from .validation import Validation, rank_and_world_size
from .validation_report import SetResult, report_lines, sample_fields, validation_metrics

CHECKPOINTS = "checkpoints"
LOG_FILE = "log.txt"
SKIPPED_FILE = "skipped.jsonl"
STOP_FILE = "stop"
FAULT_FOLDER = "fault"


class RunObserver(Observer):
    """Writes the run's files on the first worker; skipped clips and failed batches are written by each worker."""

    def __init__(
        self, recipe: dict[str, Any], out: Path, backend: Backend, *, from_step: int, sets: Mapping[str, Validation]
    ):
        self.out, self.backend, self.sets = out, backend, sets
        self.rank, _ = rank_and_world_size()
        self.settings = ValidationRecipe.model_validate(recipe["validation"]) if recipe["validation"] else None
        self.skipped: list[dict[str, str]] = [clip for one in sets.values() for clip in one.masked]
        self.tracker = Tracker(out, recipe, from_step=from_step) if self.rank == 0 else None
        self.writer = CheckpointWriter(out / CHECKPOINTS, keep=recipe["keep_checkpoints"]) if self.rank == 0 else None

    def say(self, line: str) -> None:
        """Append a line to the run's log, which the driver prints as it grows."""
        if self.rank == 0:
            _append(self.out / LOG_FILE, [line])

    def log(self, log: StepLog) -> None:
        if self.tracker:
            self.tracker.write(asdict(log))
        self.say(log.line())
        # Newly masked clips are listed, each once over all epochs and resumptions.
        skipped = self.skipped[:]
        del self.skipped[: len(skipped)]  # a thread may append meanwhile
        path = self.out / SKIPPED_FILE
        listed = set(path.read_text().splitlines()) if path.is_file() else set()
        if new := [line for line in dict.fromkeys(map(json.dumps, skipped)) if line not in listed]:
            _append(path, new)
            _append(self.out / LOG_FILE, [f"{len(new)} clips could not be used and are left out, see {SKIPPED_FILE}"])

    def validate(self, step: int) -> ValidationResult:
        """Validate on every set. Raises DataError where the metric that chooses the best could not be measured."""
        if self.settings is None:
            return super().validate(step)
        results, shown = {}, []
        for name, one in self.sets.items():
            loss, transcripts = one.summed_loss(), one.transcripts()
            results[name] = SetResult(*loss, transcripts[: self.settings.wer_clips])
            shown += [(name, clip) for clip in transcripts[: self.settings.transcripts]]
        metrics = validation_metrics(results)
        if self.tracker:
            self.tracker.write({"step": step, **metrics})
            self.tracker.write_transcripts(step, [sample_fields(name, clip) for name, clip in shown])
        for line in report_lines(step, results, [clip for _, clip in shown]):
            self.say(line)
        if self.settings.monitor not in metrics:
            raise DataError("validation.best_by=wer: no clip of validation.data can be transcribed: give others")
        return ValidationResult(metrics, self.settings.monitor)

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
        report = {"reason": reason, "batches": [{"position": batch.position, "ids": batch.ids} for batch in batches]}
        (folder / f"worker-{self.rank}.json").write_text(json.dumps(report, indent=2) + "\n")

    def close(self) -> None:
        """Wait until everything is written."""
        if self.writer:
            self.writer.wait()
        if self.tracker:
            self.tracker.close()


def _append(path: Path, lines: Sequence[str]) -> None:
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)
