"""Write a training run's files: log, metrics, checkpoints, validations, skipped clips, and a failed step's batches."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from graft.errors import DataError
from graft.storage.atomic import write_atomic
from graft.training.backends import Backend, TrainingBatch
from graft.training.checkpoint import CheckpointWriter, State, average_weights, write_average
from graft.training.loop import Observer, ValidationResult
from graft.training.meter import StepLog
from graft.training.progress import Progress, step_folder
from graft.training.tracking import Tracker

from .recipe import ValidationRecipe
from .validation import TranscribedClip, Validation, rank_and_world_size
from .validation_report import SetResult, report_lines, sample_fields, validation_metrics

CHECKPOINTS = "checkpoints"
AVERAGE_FILE = "average.json"
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
        self.average_checkpoints, self.checkpoint_every = recipe["average_checkpoints"], recipe["checkpoint_every"]
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
        results, shown = self._results(self.settings)
        metrics = validation_metrics(results)
        if self.tracker:
            self.tracker.write({"step": step, **metrics})
            self.tracker.write_transcripts(step, [sample_fields(name, clip) for name, clip in shown])
        for line in report_lines(f"step {step}", results, [clip for _, clip in shown]):
            self.say(line)
        if self.settings.monitor not in metrics:
            raise DataError("validation.best_by=wer: no clip of validation.data can be transcribed: give others")
        return ValidationResult(metrics, self.settings.monitor)

    def _results(self, settings: ValidationRecipe) -> tuple[dict[str, SetResult], list[tuple[str, TranscribedClip]]]:
        """Measure every set; returns the results by name, and the transcripts to show, each with its set's name."""
        results, shown = dict[str, SetResult](), []
        for name, one in self.sets.items():
            loss, transcripts = one.summed_loss(), one.transcripts()
            results[name] = SetResult(*loss, transcripts[: settings.wer_clips])
            shown += [(name, clip) for clip in transcripts[: settings.transcripts]]
        return results, shown

    def checkpoint(self, progress: Progress, *, is_last: bool) -> None:
        state = self.backend.state()  # gathered from all workers
        if is_last and self.average_checkpoints > 1:
            self._average(state, progress)
        if self.writer:
            self.writer.write(state, progress, also=self._averaged_steps(progress.step + 1, progress))

    def _averaged_steps(self, end: int, progress: Progress) -> range:
        """Return the steps before `end` whose checkpoints the average has, besides the last one of the run.

        Only every checkpoint_every-th step counts, so that neither validations nor interruptions change the average,
        and none before the present schedule.
        """
        last, first = (end - 1) // self.checkpoint_every, progress.schedule_start // self.checkpoint_every
        count = min(self.average_checkpoints - 1, last - first)
        return range((last - count + 1) * self.checkpoint_every, end, self.checkpoint_every)

    def _average(self, newest: State, progress: Progress) -> None:
        """Average the last checkpoints' weights, and validate the average: it is the result where it is better.

        The model has the averaged weights afterwards. Without validation the average is the result.
        """
        if self.writer:
            self.writer.wait()
        folder = self.out / CHECKPOINTS
        steps = [
            [step for step in self._averaged_steps(progress.step, progress) if (folder / step_folder(step)).is_dir()]
        ]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(steps, src=0)  # a shared file system may show others less
        averaged = average_weights([folder / step_folder(step) for step in steps[0]], newest)
        self.backend.load_state(averaged, step=0)
        named = ", ".join(map(str, [*steps[0], progress.step]))
        metrics, is_better = dict[str, float](), True
        if self.settings:
            results, _ = self._results(self.settings)
            metrics = validation_metrics(results)
            is_better = ValidationResult(metrics, self.settings.monitor).is_better(progress.best_metrics)
            for line in report_lines(f"average of steps {named}", results, []):
                self.say(line)
            monitor, best = self.settings.monitor, progress.best_metrics.get(self.settings.monitor, math.nan)
            self.say(f"  {monitor} is {metrics[monitor]:.4f}, and {best:.4f} at the best step, {progress.best_step}")
        self.say(f"the {'average' if is_better else 'best step'} is the result")
        if self.tracker and metrics:
            self.tracker.write({"step": progress.step, **{f"average_{name}": value for name, value in metrics.items()}})
        if self.rank == 0:
            path = write_average(folder, averaged, progress)
            report = {"steps": [*steps[0], progress.step], "is_result": is_better, "metrics": metrics}
            write_atomic(path / AVERAGE_FILE, json.dumps(report) + "\n")

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
