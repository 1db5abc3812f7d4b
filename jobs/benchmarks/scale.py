"""Measure how Ray feeds training workers and how many it can feed: stand-ins, whose step only sleeps, and real ones.

    windows -> planned_dataset's reader -> its loaders -> Ray's split coordinator -> Consumers

torch is imported by functions only: each of the 64 processes that take Consumer from here would hold it.
"""

import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graft.errors import GraftError

from ..common.cluster import connect
from ..training.ray_dataset import BATCH, DataStep, LoadBatches, ReadWindows, iter_blocks, planned_dataset
from ..training.ray_entry import ordered_data_config
from .measuring import Numbers, Row, Watched, cpu_s, report, report_table, watch

# A row for each batch: when it came to its worker (time.monotonic), how long it was waited for, position, audio s.
Taken = np.ndarray

# Mel bands that the encoder of a 7B graft takes.
MEL_COUNT = 128
# Seconds of audio that one H200, at half its peak, trains on in a second: stage 1 of a 7B graft at 25 Hz.
H200_RATE = 370.0
DATA_WORKERS = 2
# The fewest batches that a worker takes: at the first and the last one nothing is measured.
FEWEST_BATCHES = 4
CLIPS, FED_CLIPS, FED_EPOCHS, STEPS = 100, 1000, 3, 24
# About as many batches as a split passes on in a second, to make a stream that lasts as long as asked.
QUICK_BATCHES_PER_S = 200
WORKER_BUDGET = 1024
# A kind of process -> what stands in its title.
KINDS = {"coordinator": "SplitCoordinator", "reader": "(Read", "loaders": "(Load", "workers": "Consumer"}
# Numbers of loaders of which the reads are counted, and the clips of a window there.
LOADERS, COUNTED_WINDOW_CLIPS = (1, 4, 16, 32), 200
# Batches that a stand-in for a window has.
WINDOW_BATCHES = 100

ABOUT_INGEST = f"""\
A worker is fed FLAC in parquet by {DATA_WORKERS} Ray Data loaders; its step sleeps as long as an H200
takes in stage 1 of a 7B graft, {H200_RATE:.0f} s of audio a second. fed_percent: the share of this speed left.
loaders_ms_per_audio_s: the loaders' CPU time where a worker takes each batch at once, and the reader's.
read_by_N_loaders: bytes that the reader fetches in an epoch for so many loaders, over those of the corpus and of its
noise corpus; short_first: in a first epoch that goes from short clips to long ones."""
ABOUT_SPLIT = f"""\
One batch of 8192 tokens, made beforehand, without its features, goes again and again from {DATA_WORKERS} loaders by
Ray Data's streaming_split, as in Ray Train, to processes that take each batch at once: the cost of the split itself.
ms: CPU time of all processes of a kind for each batch. wait %: share of the workers' time.
MB: the most memory that a process held, shared memory included."""
ABOUT_LIMITS = "An H200 takes a batch every step_s; the coordinator's CPU time is the limit; a node has 8 H200s."
ABOUT_WORKERS = f"""\
jobs.stage1 (DDP over gloo, a thread for each worker), batches of {WORKER_BUDGET} tokens, the last {STEPS // 2} steps
x: times as fast as the first number of workers; MB: the most memory that a process held, shared memory included."""


class Consumer:
    """A Ray actor that takes its batches, copies each as to a device, and sleeps as long as a step takes."""

    def consume(self, shard: Any, rate: float) -> Taken:
        """Take all batches at `rate` seconds of audio a second."""
        taken, asked = [], time.monotonic()
        for block in iter_blocks(shard):
            copied = {name: np.array(array[0]) for name, array in block.items()}
            came, audio_s = time.monotonic(), float(copied["audio_s"])
            taken.append((came, came - asked, int(copied["position"]), audio_s))
            time.sleep(audio_s / rate)
            asked = time.monotonic()
        return np.array(taken)


class ReadNothing:
    """A reader that yields the numbers of `spec` batches, in windows of WINDOW_BATCHES."""

    def __init__(self, spec: int, first_window: int, first: int):
        self.count = spec

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        for window in block["id"]:
            start = int(window) * WINDOW_BATCHES
            for number in range(start, min(start + WINDOW_BATCHES, self.count)):
                yield {BATCH: np.array([number])}


class LoadNothing:
    """A loader that makes nothing: `spec` refers to a block, which it sends with each number as its position."""

    def __init__(self, spec: Any):
        import ray

        self.block = ray.get(spec)

    def __call__(self, block: Any) -> Iterator[dict[str, Any]]:
        for number in block[BATCH].to_pylist():
            yield {**self.block, "position": np.array([number])}


def bench_ingest(graft: str) -> Numbers:
    """Measure whether Ray keeps an H200 busy, and what the loaders work for that."""
    with tempfile.TemporaryDirectory() as folder:
        spec, padding = _loader_spec(graft, folder, clips=FED_CLIPS, epochs=FED_EPOCHS)
        positions = [batch.position for batch in spec.batches]
        fed, flat_out = (measured(watch(pass_through, 1, positions, spec, rate)) for rate in (H200_RATE, math.inf))
        reads = count_reads(folder)
    loaders_ms, reader_ms = (flat_out[f"{kind} ms"] / flat_out["audio s/batch"] for kind in ("loaders", "reader"))
    numbers = {
        "steps": len(positions),
        "padding_percent": 100 * padding,
        "fed_percent": 100 - fed["wait %"],
        "wait_percent": fed["wait %"],
        "loaders_ms_per_audio_s": loaders_ms,
        "reader_ms_per_audio_s": reader_ms,
        "extrapolated_cores_per_h200": H200_RATE * (loaders_ms + reader_ms) / 1000,
    }
    return report(ABOUT_INGEST, numbers | reads)


def count_reads(folder: str) -> Numbers:
    """Count the bytes that an epoch fetches with the real plan and reader, whose batches are dealt out to loaders.

    `folder` has a processor and speech.parquet.
    """
    from graft.data.dataset import read_rows
    from graft.data.settings import AugmentRecipe, NoiseRecipe
    from graft.processor import read_graft_processor
    from graft.training.plan import PlanSettings

    from ..training.loader import LoaderSpec
    from ..training.reader import AheadReader
    from ..training.samples import plan_training, vary
    from .speech import write_speech_corpus

    processor, data = read_graft_processor(folder), str(Path(folder, "speech.parquet"))
    augment = AugmentRecipe(noise=NoiseRecipe(data=write_speech_corpus(Path(folder, "noise.parquet"), CLIPS)))
    rows = read_rows(data)
    variation = vary(rows, processor, augment=augment)
    size = sum(Path(folder, name).stat().st_size for name in ("speech.parquet", "noise.parquet"))
    numbers: Numbers = {}
    for name, short_first in (("", False), ("_short_first", True)):
        settings = PlanSettings(window_clips=COUNTED_WINDOW_CLIPS, short_first=short_first)
        plan = plan_training(rows, processor, settings, variation)
        batches, windows = plan.batches(position=0, step_batches=1), plan.epochs[0].window_count
        spec = LoaderSpec(rows, batches, folder, variation, epoch_windows=windows)
        for count in LOADERS:
            before, reader = _bytes_read(), AheadReader(spec.reader, 0)
            read = (batch for number in range(windows) for batch in reader.window(number))
            dealt = [0] * count
            for number, batch in enumerate(read):
                dealt[number % count] += len(batch.samples)
            if sum(dealt) != len(rows):
                raise RuntimeError(f"{count} loaders got {sum(dealt)} of {len(rows)} clips")
            numbers[f"read_by_{count}_loaders{name}"] = (_bytes_read() - before) / size
    return numbers


def _bytes_read() -> int:
    """Return the number of bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def bench_split(graft: str, consumers: Sequence[int], seconds: float) -> Numbers:
    """Measure what the split costs by itself, and how many batches a second it passes on at most."""
    from ..training.loader import BatchLoader

    with tempfile.TemporaryDirectory() as folder:
        spec, _ = _loader_spec(graft, folder)
        (block,) = BatchLoader(spec).blocks([len(spec.batches) // 2])
    light = block | {"input_features": block["input_features"][..., :0]}

    def rows() -> Iterator[Row]:
        for count in consumers:
            batches = count * max(FEWEST_BATCHES, round(QUICK_BATCHES_PER_S * seconds / count))
            yield f"split {count}", measured(watch(pass_through, count, range(batches), light, math.inf))

    numbers = report_table(ABOUT_SPLIT, rows())
    step_s, batch_mb = float(block["audio_s"][0]) / H200_RATE, sum(array.nbytes for array in block.values()) / 1e6
    most = max(numbers[f"split {count} batches/s"] for count in consumers)
    limit = 1000 / numbers[f"split {consumers[-1]} coordinator ms"]
    limits = {
        "step_s": step_s,
        "batch_mb": batch_mb,
        "measured_batches_per_s": most,
        "measured_h200s": most * step_s,
        "extrapolated_batches_per_s": limit,
        "extrapolated_h200s": limit * step_s,
        "extrapolated_node_mb_per_s": 8 * batch_mb / step_s,
    }
    return numbers | report(ABOUT_LIMITS, limits)


def _loader_spec(graft: str, folder: str, *, clips: int = CLIPS, epochs: int = 1) -> tuple[Any, float]:
    """Write a corpus and plan a run, with a 7B graft's mel bands; returns its LoaderSpec and its share of padding."""
    from transformers import WhisperFeatureExtractor

    from graft.data.dataset import read_rows
    from graft.model.configuration import read_graft_config
    from graft.processor import read_graft_processor
    from graft.training.plan import PlanSettings

    from ..training.loader import LoaderSpec
    from ..training.samples import plan_training
    from .speech import write_speech_corpus

    processor = read_graft_processor(graft)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=MEL_COUNT)
    processor.save_pretrained(folder)
    read_graft_config(graft).save_pretrained(folder)  # says whose prompts the processor writes
    rows = read_rows(write_speech_corpus(Path(folder, "speech.parquet"), clips))
    plan = plan_training(rows, processor, PlanSettings(epochs=epochs))
    return LoaderSpec(rows, plan.batches(position=0, step_batches=1), folder), plan.padding_waste()


def pass_through(count: int, positions: Sequence[int], spec: Any, rate: float) -> list[Taken]:
    """Pass batches on to `count` workers, each of which takes `rate` seconds of audio a second, on a Ray of their own.

    `spec` is a LoaderSpec, or the block that LoadNothing sends. Raises RuntimeError if a worker gets others' batches.
    """
    import ray

    connect(cpus=DATA_WORKERS)
    if isinstance(spec, dict):
        steps = DataStep(ReadNothing, len(positions)), DataStep(LoadNothing, ray.put(spec))
        windows = range(-(-len(positions) // WINDOW_BATCHES))
    else:
        steps = DataStep(ReadWindows, ray.put(spec.reader)), DataStep(LoadBatches, ray.put(spec.without_rows()))
        windows = range(int(spec.batches.windows[-1]) + 1)
    dataset = planned_dataset(*steps, windows, data_workers=DATA_WORKERS)
    nodes = [ray.get_runtime_context().get_node_id()] * count
    shards = ordered_data_config().configure(
        {"train": dataset}, world_size=count, worker_handles=None, worker_node_ids=nodes
    )
    consumer: Any = ray.remote(num_cpus=0)(Consumer)
    consumers = [consumer.remote() for _ in shards]
    working = [actor.consume.remote(shard["train"], rate) for actor, shard in zip(consumers, shards, strict=True)]
    taken = ray.get(working)
    for rank, mine in enumerate(taken):
        if mine[:, 2].tolist() != list(positions[rank::count]):
            raise RuntimeError(f"worker {rank} of {count} did not get its own batches in order")
    return taken


def measured(watched: Watched[list[Taken]]) -> Numbers:
    """Take the figures between the first and the last look at which all workers were busy. Raises GraftError."""
    taken = watched.result
    start, stop = max(mine[0, 0] for mine in taken), min(mine[-1, 0] for mine in taken)
    inside = [look for look in watched.looks if start <= look[0] <= stop]
    (begin, before), (end, _) = (inside[0], inside[-1]) if inside else ((0.0, {}), (0.0, {}))
    after = {pid: process for _, look in inside for pid, process in look.items()}  # also of processes that have ended
    batches = np.concatenate(taken)
    batches = batches[(batches[:, 0] > begin) & (batches[:, 0] <= end)]
    if not len(batches):
        raise GraftError(f"{len(taken)} workers: too few batches to measure: give more --seconds")
    waited_s = np.minimum(batches[:, 1], batches[:, 0] - begin).sum()  # part of the first waits lies before the begin
    return {
        "batches/s": len(batches) / (end - begin),
        "audio s/batch": float(batches[:, 3].mean()),
        "wait %": 100 * float(waited_s) / (end - begin) / len(taken),
        **{f"{kind} ms": 1000 * cpu_s(before, after, title) / len(batches) for kind, title in KINDS.items()},
        "coordinator MB": watched.peak_mb(KINDS["coordinator"]),
        "driver MB": watched.peak_mb(),
    }


def bench_workers(graft: str, workers: Sequence[int]) -> Numbers:
    """Measure runs of stage 1 with more and more workers."""
    from graft.training.tracking import METRICS_FILE

    from .speech import write_speech_corpus

    def rows() -> Iterator[Row]:
        first = None
        for count in workers:
            out = Path(folder, str(count))
            watched = watch(_run_stage1, {"model": graft, "data": data, "out": str(out), "workers": count})
            line = json.loads((out / METRICS_FILE).read_text().splitlines()[-1])
            first = first or line["audio_s_per_s"]
            numbers = {
                "audio s/s": line["audio_s_per_s"],
                "x": line["audio_s_per_s"] / first,
                "wait %": 100 * line["data_wait"],
                "coordinator MB": watched.peak_mb(KINDS["coordinator"]),
                "controller MB": watched.peak_mb("TrainController"),
                "driver MB": watched.peak_mb(),
            }
            yield f"workers {count}", numbers

    with tempfile.TemporaryDirectory() as folder:
        data = write_speech_corpus(Path(folder, "speech.parquet"), CLIPS)
        return report_table(ABOUT_WORKERS, rows())


def _run_stage1(settings: dict[str, Any]) -> None:
    from graft.checkpoints.loading import multiplies_bf16

    from .. import stage1
    from ..common.console import quiet_libraries

    quiet_libraries()
    settings |= {"token_budget": WORKER_BUDGET, "epochs": 1000, "max_steps": STEPS, "log_every": STEPS // 2}
    settings["dtype"] = "bf16" if multiplies_bf16("cpu") else "fp32"
    with contextlib.redirect_stdout(io.StringIO()):
        stage1.run(stage1.Stage1Recipe.model_validate(settings | {"backend": "torch"}))
