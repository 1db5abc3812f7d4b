"""jobs.stage1 itself with several workers on this machine: gloo, and a model of one layer each, so that what surrounds a step counts.

The run is a process of its own; its log and what its processes use are looked at from outside until it is done.
"""

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from graft.errors import GraftError
from graft.model.configuration import GraftConfig
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import GraftProcessor
from graft.training.tracking import METRICS_FILE

from .. import stage1
from ..common.console import quiet_libraries
from .measuring import Findings, Numbers, table
from .scale_usage import ABOUT_KINDS, DRIVER, KINDS, Usage, cpu_s, peak_mb, usage
from .speech import write_speech_corpus

POLL_S = 0.5
LOG_EVERY = 4
"""Steps; between the first log line and the last one is measured."""
TOKEN_BUDGET = 1024
CLIPS = 100
CONTROLLER = "controller"

ABOUT = f"""\
jobs.stage1 with so many workers (DDP over gloo, a thread each) on FLAC in parquet, batches of {TOKEN_BUDGET} tokens;
the models have one random layer each, so that what surrounds a step counts."""


@dataclass(frozen=True)
class Trained:
    """What came of a run, between its first log line and its last one, but for the memory."""

    workers: int
    batches_per_s: float
    audio_s_per_s: float
    waited: float
    """Share of a step that is waited for data, by the worker that waits longest."""
    cpu_ms: dict[str, float]
    """A batch, by kind of process."""
    controller_mb: float
    coordinator_mb: float
    driver_mb: float


def bench_train(graft: str, *, workers: Sequence[int], steps: int) -> Findings:
    """Measure training runs with more and more workers."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shallow_graft(graft, folder / "graft")
        data = write_speech_corpus(folder / "speech.parquet", clips=CLIPS, times=1)
        runs = [
            train(str(folder / "graft"), data, folder / str(count), workers=count, steps=steps) for count in workers
        ]
    kinds, held = [*KINDS, CONTROLLER, DRIVER], ["coordinator_mb", "controller_mb", "driver_mb"]
    numbers: Numbers = {}
    rows = []
    for run in runs:
        values = {"batches_per_s": run.batches_per_s, "audio_s_per_s": run.audio_s_per_s, "waited": run.waited}
        values |= {f"{kind}_cpu_ms": run.cpu_ms.get(kind, 0.0) for kind in kinds} | {
            name: getattr(run, name) for name in held
        }
        numbers |= {f"train {run.workers} {name}": value for name, value in values.items()}
        rates = [f"{run.batches_per_s:.1f}", f"{run.audio_s_per_s:.0f}", f"{run.waited:.1%}"]
        costs = [f"{run.cpu_ms.get(kind, 0):.1f}" for kind in kinds]
        rows.append([str(run.workers), *rates, *costs, *(f"{getattr(run, name):.0f}" for name in held)])
    header = [
        "workers",
        "batches/s",
        "audio-s/s",
        "waited",
        *(f"{kind} ms" for kind in kinds),
        *(name.replace("_mb", " MB") for name in held),
    ]
    return Findings(numbers, f"{ABOUT}\n{ABOUT_KINDS}\n{table(header, rows)}")


def write_shallow_graft(graft: str, out: Path) -> None:
    """Write a graft of one random layer in each of its two models, and as wide and with the same words as another."""
    config = GraftConfig.from_pretrained(graft)
    text: Any = config.text_config
    text.num_hidden_layers = config.audio_config.encoder_layers = 1
    text.layer_types = text.layer_types[:1]
    config.base_digests = None
    torch.manual_seed(0)
    model = GraftForConditionalGeneration(config)
    for parameter in model.audio_tower.parameters():
        parameter.data.normal_(std=0.2)  # of std 0.02 it hears next to nothing, and the run's preflight finds that out
    model.save_pretrained(out)
    GraftProcessor.from_pretrained(graft).save_pretrained(out)


def train(graft: str, data: str, out: Path, *, workers: int, steps: int) -> Trained:
    """Run stage 1 for so many steps, and see what it takes. Raises what the job raises, GraftError for too few steps."""
    settings = {"model": graft, "data": data, "out": str(out), "workers": workers, "max_steps": steps, "epochs": 1000}
    settings |= {"token_budget": TOKEN_BUDGET, "log_every": LOG_EVERY, "backend": "torch", "dtype": "fp32"}
    looks: list[Look] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        driver = pool.submit(os.getpid).result()
        running = pool.submit(_run, settings)
        while not running.done():
            lines = _lines(out)
            looks.append(Look(lines[-1]["step"] if lines else 0, time.monotonic(), usage(driver)))
            time.sleep(POLL_S)
        running.result()
    return _measured(workers, looks, _lines(out))


@dataclass(frozen=True)
class Look:
    """The newest step in the run's log at some time, and what its processes had used by then."""

    step: int
    at_s: float
    used: Usage


def _measured(workers: int, looks: Sequence[Look], lines: Sequence[dict[str, Any]]) -> Trained:
    """Take the figures between the first look at each end's log line."""
    ends = [
        next((look for look in looks if look.step >= step), None) for step in (LOG_EVERY, lines[-1]["step"] - LOG_EVERY)
    ]
    begin, end = ends
    if begin is None or end is None or end.step <= begin.step:
        raise GraftError(f"{workers} workers: too few steps to measure: give more --steps")
    batches = (end.step - begin.step) * workers
    steady = [line for line in lines if begin.step < line["step"] <= end.step]
    spent = cpu_s(begin.used, end.used)
    peaks = {kind: max(peak_mb(look.used, kind) for look in looks) for kind in (CONTROLLER, "coordinator", DRIVER)}
    return Trained(
        workers,
        batches_per_s=batches / (end.at_s - begin.at_s),
        audio_s_per_s=statistics.mean(line["audio_s_per_s"] for line in steady),
        waited=statistics.mean(line["data_wait"] for line in steady),
        cpu_ms={kind: 1000 * seconds / batches for kind, seconds in spent.items()},
        controller_mb=peaks[CONTROLLER],
        coordinator_mb=peaks["coordinator"],
        driver_mb=peaks[DRIVER],
    )


def _run(settings: dict[str, Any]) -> None:
    import ray

    quiet_libraries()
    with contextlib.redirect_stdout(io.StringIO()):
        stage1.run(stage1.Stage1Recipe.model_validate(settings))
    ray.shutdown()


def _lines(out: Path) -> list[dict[str, Any]]:
    file = out / METRICS_FILE
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
