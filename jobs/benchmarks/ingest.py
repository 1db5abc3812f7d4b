"""Whether Ray keeps an H200 busy: a training worker whose step only sleeps as long as stage 1 of a 7B graft takes there.

All else is what a training run does: FLAC files in parquet, the plan, loader actors, Ray Train's worker, the training loop.
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from graft.data.dataset import read_rows
from graft.processor import IGNORED_LABEL, GraftProcessor
from graft.training.batch import TrainingBatch
from graft.training.checkpoint import State
from graft.training.loop import LoopSettings, Observer, train
from graft.training.meter import StepLog
from graft.training.plan import PlanSettings
from graft.training.progress import Progress

from ..common.cluster import connect
from ..training.loader import BatchLoader, Delivery, prefetch, training_batches
from ..training.ray_dataset import RemainingBatches, iter_blocks
from ..training.ray_entry import make_trainer
from ..training.samples import plan_training
from .measuring import Findings, Numbers, list_numbers, spent_on
from .speech import write_speech_corpus

MEL_COUNT = 128
"""As a 7B graft's encoder hears."""
DEVICE_RATE = 370.0
"""Seconds of audio a second: of one H200 at half its peak, in stage 1 of a 7B graft at 25 Hz; 37 clips of 10 s."""
DATA_WORKERS = 2
LOG_EVERY = 4
STARTING_STEPS = 8
"""While these run, the second loader is still importing."""
SETTINGS = LoopSettings(learning_rate=1e-3, log_every=LOG_EVERY, checkpoint_every=1_000_000)

ABOUT = f"""\
a step sleeps as long as an H200 takes for it: {DEVICE_RATE:.0f} s of audio a second, 37 clips of 10 s
bare  the training loop over batches that lie in memory
fed   the same batches from FLAC in parquet, by {DATA_WORKERS} Ray Data loaders ({MEL_COUNT} mels), to a worker of Ray Train
The first {STARTING_STEPS} steps are left out. data wait: the share of a log line's time that the step waited for its batch."""


class SleepingBackend:
    """A backend whose device is a clock: backward sleeps, and nothing is trained."""

    def __init__(self) -> None:
        self.model: nn.Module = nn.Identity()

    def backward(self, inputs: Mapping[str, Tensor], *, label_count: int, is_last: bool) -> Tensor:
        time.sleep(int(inputs["audio_frame_counts"].sum()) / 100 / DEVICE_RATE)
        return (inputs["labels"] != IGNORED_LABEL).sum() / label_count

    def step(self, learning_rate: float) -> float:
        return 0.0

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def state(self) -> State:
        return {}

    def load_state(self, state: State, *, step: int) -> None:
        """There is none."""


class LogLines(Observer):
    """Keeps of every log line when it came and how long was waited."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, log: StepLog) -> None:
        self.lines.append({"step": log.step, "at_s": time.perf_counter(), "data_wait": log.data_wait})


def bench_ingest(graft: str, *, clips: int) -> Findings:
    """Measure the stand-in's steps, fed by Ray and bare."""
    with tempfile.TemporaryDirectory() as folder:
        delivery = _delivery(graft, Path(folder), clips)
        batches, loaded_s = _loaded(delivery)
        bare = _steady(_train(batches, len(batches)))
        fed = _steady(_train_fed(delivery, Path(folder)))
    audio_s = sum(batch.audio_s for batch in batches)
    steady_audio_s = sum(batch.audio_s for batch in batches[STARTING_STEPS:])
    waits = [line["data_wait"] for line in fed[1:]]
    numbers: Numbers = {
        "steps": len(batches) - STARTING_STEPS,
        "audio_s": steady_audio_s,
        "bare_audio_s_per_s": steady_audio_s / _elapsed(bare),
        "fed_audio_s_per_s": steady_audio_s / _elapsed(fed),
        "fed_to_bare": _elapsed(bare) / _elapsed(fed),
        "data_wait_percent_mean": 100 * statistics.mean(waits),
        "data_wait_percent_most": 100 * max(waits),
        "loader_cpu_ms_per_audio_s": 1000 * loaded_s / audio_s,
    }
    return Findings(numbers, f"{ABOUT}\n{list_numbers(numbers)}")


def _train_fed(delivery: Delivery, folder: Path) -> list[dict[str, float]]:
    """Run the stand-in in a worker of Ray Train, fed as a training run is; returns its log lines."""
    import ray

    connect()
    lines = folder / "lines.json"
    remaining = RemainingBatches(
        ray.put(delivery), delivery.batches.step_positions, str(folder / "checkpoints"), DATA_WORKERS
    )
    config = {"total_steps": len(delivery.batches), "lines": str(lines)}
    make_trainer(_fed_worker, config, remaining, workers=1, gpu=False, retries=0, storage=str(folder / "ray")).fit()
    return json.loads(lines.read_text())


def _steady(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """The log lines from STARTING_STEPS on: the first says where the others start."""
    return [line for line in lines if line["step"] >= STARTING_STEPS]


def _fed_worker(config: dict[str, Any]) -> None:
    import ray.train

    torch.set_num_threads(1)
    blocks = iter_blocks(ray.train.get_dataset_shard("train"))
    batches = prefetch(training_batches(blocks, torch.device("cpu"), []))
    Path(config["lines"]).write_text(json.dumps(_train(batches, config["total_steps"])))


def _train(batches: Iterable[TrainingBatch], total_steps: int) -> list[dict[str, float]]:
    log = LogLines()
    train(batches, SleepingBackend(), SETTINGS, progress=Progress(), total_steps=total_steps, observer=log)
    return log.lines


def _delivery(graft: str, folder: Path, clips: int) -> Delivery:
    """Write a corpus of so many clips, a hundred of them different, and plan an epoch."""
    processor = GraftProcessor.from_pretrained(graft)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=MEL_COUNT)
    processor.save_pretrained(folder / "processor")
    distinct = min(clips, 100)
    rows = read_rows(write_speech_corpus(folder / "speech.parquet", clips=distinct, times=clips // distinct))
    batches = plan_training(rows, processor, PlanSettings()).delivery(position=0, step_batches=1)
    return Delivery(rows, batches, str(folder / "processor"))


def _loaded(delivery: Delivery) -> tuple[list[TrainingBatch], float]:
    """All batches of a delivery, and the CPU seconds that it took to load them."""
    torch.set_num_threads(1)  # as on Ray's workers
    loader, blocks = BatchLoader(delivery), list[dict[str, np.ndarray]]()
    spent = spent_on(lambda: blocks.extend(loader.block(number) for number in range(len(delivery.batches))))
    return list(training_batches(blocks, torch.device("cpu"), [])), spent.cpu_s


def _elapsed(lines: list[dict[str, float]]) -> float:
    return lines[-1]["at_s"] - lines[0]["at_s"]
