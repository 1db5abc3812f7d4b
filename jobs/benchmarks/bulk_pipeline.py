"""What Ray costs bulk transcription: the pipeline of jobs.transcribe beside a bare loop over the same work, with a stand-in for an H200.

The stand-in takes the time that the device would take. Where one core can't read as fast as that, the device is also slowed until it, and
nothing else, is the bottleneck.
"""

import functools
import itertools
import statistics
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from graft.audio.chunking import Chunker, ChunkSettings
from graft.audio.clip import read_audio
from graft.audio.features import Featurizer
from graft.audio.spans import read_span
from graft.audio.vad import SpeechSettings
from graft.inference.transcriber import Transcriber

from ..common.cluster import connect
from ..common.console import quiet_libraries
from ..transcription.discovery import find_recordings
from ..transcription.pipeline import CALLS, ItemTranscriber, Workers, transcribe_items
from ..transcription.reader import ItemReader, Reading
from ..transcription.work_items import durations, plan_items
from .bulk_engine import MEL_COUNT, Device, open_stand_in
from .bulk_speech import write_archive
from .measuring import Findings, Numbers, in_turns, list_numbers

ITEMS_PER_BATCH = 32
HEADROOM = 4.0
"""How many times as fast one core reads as the slowed device hears."""
AHEAD = 4
"""Batches that the bare loop reads ahead."""
STARTING = 4
"""Batches that are left out: while Ray's listener still opens, its reader is ahead."""
READING = Reading(SpeechSettings(), ChunkSettings())
WORKERS = Workers(readers=1, listeners=1, cpus_per_listener=1, gpus_per_listener=0, items_per_batch=ITEMS_PER_BATCH)

ABOUT = f"""\
clips of 2 to 20 s, 10 on average, FLAC; {ITEMS_PER_BATCH} to a batch, {CALLS} batches are heard at a time
device  the engine's own rate: one H200 at half its peak with a 7B graft at 25 Hz, as a stand-in that only takes its time
bare    one process: a thread decodes and detects, {AHEAD} batches ahead, {CALLS} threads hear (features, engine) and write parquet
ray     one such reader and one such listener through Ray Data, as jobs.transcribe runs them, with checkpoints
slowed  the device made so slow that one core reads {HEADROOM:g} times as fast as it hears
Seconds of audio a second; the first {STARTING} batches are left out."""


@dataclass(frozen=True)
class Archive:
    """A plan of items, and what opens the stand-in that hears them."""

    plan: pa.Table
    opener: Callable[[], Transcriber]


def bench_pipeline(graft: str, *, seconds: float, repetitions: int) -> Findings:
    """Measure Ray's pipeline and the bare loop in turns, each for about so long, at the device's rate and at one that leaves room."""
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        costs = _costs(write_archive(folder / "distinct", 100))
        most = 1 / (costs["decode"] + costs["detection"])
        whole, rows = Device(), CALLS * ITEMS_PER_BATCH
        slowed = whole.slowed(max(1.0, HEADROOM * whole.rate(rows) / most))
        numbers: Numbers = {f"{name}_cpu_ms_per_audio_s": 1000 * cost for name, cost in costs.items()} | {
            "one_core_reads": most
        }
        for name, device in {"device": whole, "slowed": slowed}.items():
            numbers |= _measured(
                name, device.rate(rows), graft, device, folder / name, seconds=seconds, repetitions=repetitions
            )
    return Findings(numbers, f"{ABOUT}\n{list_numbers(numbers)}")


def _measured(
    name: str, rate: float, graft: str, device: Device, folder: Path, *, seconds: float, repetitions: int
) -> Numbers:
    clips = max(round(seconds * rate / 10), ITEMS_PER_BATCH * 3 * STARTING)
    write_archive(folder / "archive", clips)
    plan = plan_items(find_recordings([str(folder / "archive")]), item_s=1800.0, probe=durations)
    archive = Archive(plan, functools.partial(open_stand_in, graft, device))
    ways = {"bare": transcribe_bare, "ray": transcribe_on_ray}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for repetition, (way, work) in itertools.product(range(repetitions), ways.items()):
        home = folder / f"{way}-{repetition}"
        home.mkdir()
        work(archive, home)
        rates[way].append(steady_rate(home, clips))
    ratios = [ray / bare for ray, bare in zip(rates["ray"], rates["bare"], strict=True)]
    return {
        f"{name}_rate": rate,
        f"{name}_bare": statistics.median(rates["bare"]),
        f"{name}_ray": statistics.median(rates["ray"]),
        f"{name}_ray_to_bare": statistics.median(ratios),
        f"{name}_ray_to_bare_least": min(ratios),
        f"{name}_ray_to_rate": statistics.median(rates["ray"]) / rate,
    }


def transcribe_on_ray(archive: Archive, home: Path) -> None:
    """Transcribe an archive as jobs.transcribe does."""
    connect()
    pq.write_table(archive.plan, home / "plan.parquet")
    transcribe_items(home / "plan.parquet", home, READING, archive.opener, {}, WORKERS)


def transcribe_bare(archive: Archive, home: Path) -> None:
    """Transcribe an archive in this process, reading ahead in a thread, with as many batches heard at a time as Ray's listener hears."""
    transcriber = archive.opener()
    reader, listener = ItemReader(READING), ItemTranscriber(lambda: transcriber, {})
    (home / "items").mkdir()
    batches = [archive.plan.slice(start, ITEMS_PER_BATCH) for start in range(0, len(archive.plan), ITEMS_PER_BATCH)]
    turn = threading.Lock()
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(CALLS) as hearing:
        read = enumerate(_ahead(reading, lambda batch: pa.concat_tables(reader(batch)), batches))

        def hear() -> None:
            while True:
                with turn:
                    number, table = next(read, (0, None))
                if table is None:
                    return
                pq.write_table(listener(table), home / "items" / f"{number}.parquet")

        for done in [hearing.submit(hear) for _ in range(CALLS)]:
            done.result()
    transcriber.close()


def steady_rate(home: Path, clips: int) -> float:
    """Seconds of audio a second, by when files of results were written, without the first. Raises RuntimeError where one is missing."""
    files = sorted((home / "items").glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    tables = [pq.read_table(path, columns=["duration_s", "error"], partitioning=None) for path in files]
    if sum(map(len, tables)) != clips or any(table["error"].null_count < len(table) for table in tables):
        raise RuntimeError(f"{sum(map(len, tables))} of {clips} clips have results, or some have errors")
    audio_s = sum(pc.sum(table["duration_s"]).as_py() for table in tables[STARTING:])
    return audio_s / (files[-1].stat().st_mtime - files[STARTING - 1].stat().st_mtime)


def _ahead(
    thread: ThreadPoolExecutor, read: Callable[[pa.Table], pa.Table], batches: Sequence[pa.Table]
) -> Iterator[pa.Table]:
    """What a thread reads, in order, AHEAD of what is taken."""
    waiting: deque[Future[pa.Table]] = deque()
    for batch in batches:
        waiting.append(thread.submit(read, batch))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _costs(files: Sequence[Path]) -> dict[str, float]:
    """CPU seconds for a second of audio."""
    chunker, featurizer = Chunker(), Featurizer(MEL_COUNT)
    clips = [read_audio(path) for path in files]
    ways: dict[str, Callable[[], object]] = {
        "decode": lambda: [list(read_span(str(path))) for path in files],
        "detection": lambda: [chunker(clip) for clip in clips],
        "features": lambda: [featurizer(clip) for clip in clips],
    }
    audio_s = sum(clip.duration_s for clip in clips)
    return {
        name: statistics.median(one.cpu_s for one in spent[1:]) / audio_s for name, spent in in_turns(ways, 4).items()
    }
