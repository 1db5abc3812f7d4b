"""What it costs to split a run's batches over 1, 8, 64 stand-ins for workers: by itself, and behind the real loaders."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import WhisperFeatureExtractor

from graft.data.dataset import RowTable, read_rows
from graft.processor import GraftProcessor
from graft.training.plan import PlanSettings

from ..training.loader import BatchLoader, Delivery
from ..training.samples import plan_training
from .ingest import DEVICE_RATE, MEL_COUNT
from .measuring import Findings, Numbers, table
from .processes import alone
from .scale_split import DATA_WORKERS, FEWEST_BATCHES, Block, Passed, Stream, pass_through
from .scale_usage import ABOUT_KINDS, KINDS
from .speech import write_speech_corpus

CLIPS = 100
FULL_CONSUMERS = 8
"""As many as share a node; for 64 of them its object store would have to hold gigabytes."""
QUICK_BATCHES_PER_S = 200
"""About what a split sends at once, to make a stream of about so many seconds."""
REAL_BUDGET = 1024
REAL_RATE = 1200.0
"""Seconds of audio a second that all stand-ins together take of real batches: two loaders on two cores can feed them."""

ABOUT_SPLIT = f"""\
A run's batches go from {DATA_WORKERS} loaders by Ray Data's streaming_split, as Ray Train has it, to processes without torch,
which copy each and sleep as long as an H200 takes for it in stage 1 of a 7B graft, {DEVICE_RATE:.0f} s of audio a second.
light    one batch of 8192 tokens, made beforehand and sent again and again, less its features: what splitting costs by itself
whole    the same with its features ({MEL_COUNT} mels), up to {FULL_CONSUMERS} workers: what moving them on one node costs
at once  light, and nobody sleeps"""
ABOUT_REAL = f"""\
FLAC in parquet through the plan and the real loaders ({MEL_COUNT} mels, batches of {REAL_BUDGET} tokens) to the same stand-ins,
whose steps are stretched so that all together take {REAL_RATE:.0f} s of audio a second, however many they are."""


def bench_split(graft: str, *, consumers: Sequence[int], seconds: float) -> Findings:
    """Measure what the split costs by itself, and how many batches a second it has at most."""
    with tempfile.TemporaryDirectory() as folder:
        block = _typical_block(graft, Path(folder))
    passed = alone(pass_through, list(_made_streams(block, consumers, seconds)))
    step_s = float(block["audio_s"][0]) / DEVICE_RATE
    last = {one.name: one for one in passed}  # the one with the most workers
    whole, at_once = last["whole"], last["at once"]
    coordinator_ms = at_once.cpu_ms["coordinator"]  # of paced batches, part is its turning while there is nothing to do
    most, limit = max(one.batches_per_s for one in passed), 1000 / coordinator_ms
    numbers = _numbers(passed) | {
        "step_s": step_s,
        "batch_mb": whole.batch_mb,
        "most_batches_per_s": most,
        "most_h200s": most * step_s,
        "limit_batches_per_s": limit,
        "limit_h200s": limit * step_s,
        "node_mb_per_s": 8 * whole.batch_mb / step_s,
    }
    told = f"""\
measured      at most {most:.0f} batches a second, on cores that the loaders and the workers share; {most * step_s:.0f} H200s ask for as
              many, as each takes one, of {whole.batch_mb:.1f} MB, every {step_s:.2f} s
extrapolated  the coordinator, one process, has {coordinator_ms:.1f} ms of work with a batch at once for {at_once.workers} workers:
              on a core of its own it ends at {limit:.0f} batches a second, {limit * step_s:.0f} H200s
extrapolated  a node of 8 H200s takes in {8 * whole.batch_mb / step_s:.0f} MB a second"""
    return Findings(numbers, f"{ABOUT_SPLIT}\n{ABOUT_KINDS}\n{_table(passed)}\n{told}")


def bench_real(graft: str, *, consumers: Sequence[int], seconds: float) -> Findings:
    """Measure the whole way of real clips to more and more stand-ins, at a rate that the loaders can feed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _corpus(graft, Path(folder))
        passed = alone(pass_through, [_real_stream(rows, folder, count, seconds) for count in consumers])
    last = passed[-1]
    loader_ms = last.cpu_ms["loaders"] * last.batches / last.audio_s
    cores = DEVICE_RATE * loader_ms / 1000
    numbers = _numbers(passed) | {"loader_cpu_ms_per_audio_s": loader_ms, "cores_per_h200": cores}
    told = f"""\
measured      the loaders have {loader_ms:.2f} ms of work with a second of audio
extrapolated  an H200 wants {cores:.2f} cores like these for loaders, 64 of them {64 * cores:.0f}"""
    return Findings(numbers, f"{ABOUT_REAL}\n{ABOUT_KINDS}\n{_table(passed)}\n{told}")


def _made_streams(block: Block, consumers: Sequence[int], seconds: float) -> Iterator[Stream]:
    light = block | {"input_features": block["input_features"][..., :0]}
    paced = max(FEWEST_BATCHES, math.ceil(seconds * DEVICE_RATE / float(block["audio_s"][0])))
    for count in consumers:
        quick = max(FEWEST_BATCHES, round(QUICK_BATCHES_PER_S * seconds / count))
        yield Stream("light", count, range(count * paced), light, DEVICE_RATE, is_made=True)
        if count <= FULL_CONSUMERS:
            yield Stream("whole", count, range(count * paced), block, DEVICE_RATE, is_made=True)
        yield Stream("at once", count, range(count * quick), light, math.inf, is_made=True)


def _real_stream(rows: RowTable, processor: str, count: int, seconds: float) -> Stream:
    """So many batches that each worker has some, and all of them so many seconds of work."""
    audio_s = max(REAL_RATE * seconds, FEWEST_BATCHES * count * REAL_BUDGET / 25)
    settings = PlanSettings(epochs=math.ceil(audio_s / rows.duration_s.sum()), token_budget=REAL_BUDGET)
    batches = plan_training(rows, GraftProcessor.from_pretrained(processor), settings).delivery(
        position=0, step_batches=count
    )
    return Stream(
        "real", count, [batch.position for batch in batches], Delivery(rows, batches, processor), REAL_RATE / count
    )


def _typical_block(graft: str, folder: Path) -> Block:
    """A batch of the default budget as the loaders make it."""
    rows = _corpus(graft, folder)
    batches = plan_training(rows, GraftProcessor.from_pretrained(folder), PlanSettings()).delivery(
        position=0, step_batches=1
    )
    return BatchLoader(Delivery(rows, batches, str(folder))).block(len(batches) // 2)


def _corpus(graft: str, folder: Path) -> RowTable:
    """Write clips into a folder, and a graft's processor that hears them as a 7B graft does."""
    processor = GraftProcessor.from_pretrained(graft)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=MEL_COUNT)
    processor.save_pretrained(folder)
    return read_rows(write_speech_corpus(folder / "speech.parquet", clips=CLIPS, times=1))


def _numbers(passed: Sequence[Passed]) -> Numbers:
    numbers: Numbers = {}
    for one in passed:
        values = {"batches_per_s": one.batches_per_s, "waited": one.waited}
        values |= {f"{kind}_cpu_ms": one.cpu_ms.get(kind, 0.0) for kind in KINDS}
        values |= {"coordinator_mb": one.coordinator_mb, "driver_mb": one.driver_mb}
        numbers |= {f"{one.name} {one.workers} {name}": value for name, value in values.items()}
    return numbers


def _table(passed: Sequence[Passed]) -> str:
    header = [
        "",
        "workers",
        "batches/s",
        "asked",
        "waited",
        *(f"{kind} ms" for kind in KINDS),
        "coordinator MB",
        "driver MB",
    ]
    rows = []
    for one in passed:
        asked = "-" if math.isinf(one.asked_per_s) else f"{one.asked_per_s:.1f}"
        milliseconds = [f"{one.cpu_ms.get(kind, 0):.1f}" for kind in KINDS]
        memory = [f"{one.coordinator_mb:.0f}", f"{one.driver_mb:.0f}"]
        rows.append(
            [one.name, str(one.workers), f"{one.batches_per_s:.1f}", asked, f"{one.waited:.1%}", *milliseconds, *memory]
        )
    return table(header, rows)
