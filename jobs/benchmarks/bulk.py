"""Measure bulk transcription with a stand-in for an H200: Ray's pipeline beside a bare loop, and its memory."""

import asyncio
import contextlib
import functools
import io
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import WhisperFeatureExtractor

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.checkpoints.loading import open_processor
from graft.inference.engines.protocol import EngineCounts, EngineRequest, Token
from graft.inference.transcriber import Transcriber

from ..common.cluster import connect
from ..common.console import quiet_libraries
from ..transcribe import TranscribeRecipe, transcribe
from ..transcription.assembly import read_index
from ..transcription.discovery import find_recordings
from ..transcription.pipeline import CONCURRENT_BATCHES, ItemTranscriber, Pipeline, Workers, transcribe_items
from ..transcription.reader import ItemReader, Reading
from ..transcription.work_items import at_attempts, durations, plan_items
from .features import MEL_COUNT, reading_costs
from .measuring import Numbers, report, watch
from .speech import DISTINCT, MEAN_S, WORDS, link_files, write_archive, write_long_recording

# Seconds of audio that one H200, at half its peak, transcribes in a second with a 7B graft, 96 clips at a time: 10 s
# take 0.68 TFLOP to encode and 3.67 to read, at 790 TFLOP/s, and 30 steps that read 14.1 GB of weights at 4.8 TB/s.
H200_RATE = 765.0
# Tokens of an answer for a second of speech in lower case.
TOKENS_PER_S = 3.0
ITEMS_PER_BATCH = 32
# How many times as fast as the slowed device one core reads.
HEADROOM = 4.0
# Batches that the bare loop reads ahead.
AHEAD = 4
# Batches that are left out: while Ray's transcriber still opens, its reader is ahead.
STARTING = 4
READING = Reading(SpeechSettings(), ChunkSettings())
WORKERS = Workers(
    readers=1, transcribers=1, cpus_per_transcriber=1, gpus_per_transcriber=0, items_per_batch=ITEMS_PER_BATCH
)
FEW, MANY, PLANNED = 100, 10_000, 1_000_000
SHORT_S, LONG_HOURS = 0.3, 10.0

ABOUT_PIPELINE = f"""\
clips of 2 to 20 s, 10 on average, FLAC; {ITEMS_PER_BATCH} to a batch, {CONCURRENT_BATCHES} batches at a time
device  a stand-in that takes as long as one H200 at half its peak with a 7B graft, {H200_RATE:g} s of audio a second
slowed  the device made so slow that one core reads {HEADROOM:g} times as fast as it transcribes
bare    one process: a thread at a time reads, {AHEAD} batches ahead, {CONCURRENT_BATCHES} transcribe and write parquet
ray     one such reader and one such transcriber through Ray Data, as jobs.transcribe runs them, with checkpoints
Seconds of audio a second; the first {STARTING} batches are left out."""
ABOUT_MEMORY = f"""\
few, many  recordings of {SHORT_S} s through jobs.transcribe; driver: its own process
long       one recording (8 kHz, as telephones make it), by one reader and one transcriber
plan       files in folders listed, planned and written; none is opened
Megabytes (2^20 bytes) that a process held at most, memory shared with Ray's object store included."""


class StandInEngine:
    """An Engine without a model: it takes one clip after the other, at `rate` seconds of audio a second."""

    def __init__(self, rate: float, answer_ids: Sequence[int]) -> None:
        self._rate = rate
        self._answer_ids = answer_ids
        self._free_at = 0.0
        self._lock = threading.Lock()  # several event loops ask at the same time

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """See Engine."""
        audio_s = request.features.frame_count / 100
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + audio_s / self._rate
            delay_s = self._free_at - now
        await asyncio.sleep(delay_s)
        for token_id in self._answer_ids[: round(TOKENS_PER_S * audio_s)]:
            yield Token(token_id, -0.1)

    def abort(self, request_id: str) -> None:
        """Do nothing: an answer comes to its end."""

    def counts(self) -> EngineCounts:
        """Count nothing."""
        return EngineCounts(0, 0, 0, 0, 0, 0.0)

    def close(self) -> None:
        """Do nothing: there is no model to release."""


def open_stand_in(graft: str, rate: float) -> Transcriber:
    """Open a Transcriber with a graft's processor, a 7B graft's mel bands and the stand-in as its engine."""
    torch.set_num_threads(1)
    processor = open_processor(graft)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=MEL_COUNT)
    words = np.random.default_rng(0).choice(WORDS, size=round(30 * TOKENS_PER_S))
    return Transcriber(StandInEngine(rate, processor.target_ids(" ".join(words))), processor, "stand-in")


def bench_pipeline(graft: str, seconds: float) -> Numbers:
    """Measure Ray's pipeline and the bare loop for about `seconds` each, with a fast and with a slow device."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        costs = reading_costs(write_archive(folder / "distinct", DISTINCT), repetitions=3)
        one_core = 1 / (costs["decode"] + costs["detection"])
        numbers: Numbers = {f"{name}_cpu_ms_per_audio_s": 1000 * cost for name, cost in costs.items()}
        for name, rate in {"device": H200_RATE, "slowed": min(H200_RATE, one_core / HEADROOM)}.items():
            clips = max(round(seconds * rate / MEAN_S), ITEMS_PER_BATCH * 3 * STARTING)
            write_archive(folder / name, clips)
            plan = plan_items(find_recordings([str(folder / name)]), probe=durations)
            for way, work in {"bare": transcribe_bare, "ray": transcribe_on_ray}.items():
                home = folder / f"{name}-{way}"
                home.mkdir()
                work(plan, functools.partial(open_stand_in, graft, rate), home)
                numbers[f"{name}_{way}"] = steady_rate(home, clips)
            numbers[f"{name}_ray_to_bare"] = numbers[f"{name}_ray"] / numbers[f"{name}_bare"]
    return report(ABOUT_PIPELINE, numbers)


def transcribe_on_ray(plan: pa.Table, opener: Callable[[], Transcriber], home: Path) -> None:
    """Transcribe a plan's items as jobs.transcribe does."""
    connect()
    pq.write_table(plan, home / "plan.parquet")
    transcribe_items(home / "plan.parquet", home, Pipeline(READING, opener, WORKERS))


def transcribe_bare(plan: pa.Table, opener: Callable[[], Transcriber], home: Path) -> None:
    """Transcribe a plan's items in this process, as many batches at a time as on Ray."""
    transcriber = opener()
    reader, item_transcriber = ItemReader(READING), ItemTranscriber(lambda: transcriber, {})
    (home / "items").mkdir()
    reading, transcribing = threading.Lock(), threading.Semaphore(CONCURRENT_BATCHES)

    def work(number: int) -> None:
        with reading:
            read = pa.concat_tables(reader(plan.slice(number * ITEMS_PER_BATCH, ITEMS_PER_BATCH)))
        with transcribing:
            pq.write_table(item_transcriber(read), home / "items" / f"{number}.parquet")

    with ThreadPoolExecutor(AHEAD + CONCURRENT_BATCHES) as pool:
        list(pool.map(work, range(-(-len(plan) // ITEMS_PER_BATCH))))
    transcriber.close()


def steady_rate(home: Path, clips: int) -> float:
    """Return seconds of audio a second by the times of result files. Raises RuntimeError where one is missing."""
    files = sorted((home / "items").glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    tables = [pq.read_table(path, columns=["duration_s", "error"], partitioning=None) for path in files]
    if sum(map(len, tables)) != clips or any(table["error"].null_count < len(table) for table in tables):
        raise RuntimeError(f"{sum(map(len, tables))} of {clips} clips have results, or some have errors")
    audio_s = sum(pc.sum(table["duration_s"]).as_py() for table in tables[STARTING:])
    return audio_s / (files[-1].stat().st_mtime - files[STARTING - 1].stat().st_mtime)


def bench_memory(graft: str) -> Numbers:
    """Measure drivers with few and with many recordings, the workers on a long one, and a large plan."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = write_archive(folder / "few", FEW, seconds=SHORT_S)
        write_archive(folder / "many", MANY, seconds=SHORT_S)
        (folder / "long").mkdir()
        write_long_recording(folder / "long" / "long.wav", LONG_HOURS)
        (folder / "planned").mkdir()
        link_files(folder / "planned", files, range(PLANNED))
        watched = {name: watch(_transcribe, graft, folder / name) for name in ("few", "many", "long")}
        watched["plan"] = watch(_plan, folder / "planned")
    numbers: Numbers = {"few_recordings": FEW, "many_recordings": MANY, "long_hours": LONG_HOURS, "plan_rows": PLANNED}
    for name, one in watched.items():
        numbers |= {f"{name}_driver_mb": one.peak_mb(), f"{name}_s": one.result}
    workers = {"reader": ItemReader, "transcriber": ItemTranscriber}
    numbers |= {f"long_{name}_mb": watched["long"].peak_mb(worker.__name__) for name, worker in workers.items()}
    return report(ABOUT_MEMORY, numbers)


def _transcribe(graft: str, audio: Path) -> float:
    """Transcribe an archive by jobs.transcribe; returns the seconds. Raises RuntimeError if a recording fails."""
    quiet_libraries()
    out = audio.with_name(f"{audio.name}-out")
    out.mkdir()
    recipe = TranscribeRecipe(
        model=graft, audio=str(audio), out=str(out), workers=1, threads=1, readers=1, gpus_per_worker=0
    )
    opener = functools.partial(open_stand_in, graft, H200_RATE)
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        summary = transcribe(find_recordings([str(audio)]), recipe, out, opener)
    if summary["failed"]:
        raise RuntimeError(f"{summary['failed']} recordings failed: {summary['failed_by_reason']}")
    return time.monotonic() - start


def _plan(audio: Path) -> float:
    """Plan an archive as jobs.transcribe does; returns the seconds."""
    start = time.monotonic()
    plan = plan_items(find_recordings([str(audio)]), probe=durations)
    plan = at_attempts(plan, read_index(audio.parent), retry_errors=False)
    pq.write_table(plan, audio.parent / "plan.parquet", row_group_size=50_000)
    return time.monotonic() - start
