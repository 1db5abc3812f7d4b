"""The service beside its engine offline, on clips of 5 s: all that it can take, nobody else, and 70 % of what it can take."""

import asyncio
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.inference.engines.protocol import EngineCounts

from ..common.console import quiet_libraries
from .bulk_speech import write_archive
from .measuring import Findings, Numbers, list_numbers
from .processes import alone
from .serve_load import Load, ask_at, ask_for
from .serve_service import Service, service

CLIP_S = 5.0
CLIPS = 32
"""That differ."""
LOAD = 0.7
STARTING = 0.2
"""Of the time of a load, which is left out."""
LOOK_S = 0.25

ABOUT = f"""\
clips of {CLIP_S:g} s, FLAC; rtfx: seconds of audio a second
offline    the engine in a process of its own, with as many clips at a time as there are clients, for as long
saturated  the service by `serve run`: one ingress, one engine, and clients that ask again as soon as they are answered
unloaded   the same with one client
loaded     the same with {LOAD:.0%} of the saturated rate, at random times
busy: the share of the time in which the engine computes (saturated_to_offline_busy should be 0.9 or more); busy_rtfx: seconds of audio in
each of those seconds; loaded_p95_to_unloaded_p50 should be under 3;
clients_cpu: the share of a core that the clients take. Engine, ingress, proxy and clients share this machine's cores."""


@dataclass(frozen=True)
class Worked:
    """What an engine did in some time."""

    wall_s: float
    busy_s: float
    tokens: int

    @classmethod
    def between(cls, first: "Look", last: "Look") -> "Worked":
        """What it did between two looks at it."""
        (first_s, one), (last_s, other) = first, last
        return cls(last_s - first_s, other.busy_s - one.busy_s, other.tokens - one.tokens)

    def numbers(self, name: str, tokens_per_clip: float) -> Numbers:
        """Its rates; of clips so many tokens come, so that those that are not done count by what is."""
        audio_s = CLIP_S * self.tokens / tokens_per_clip
        return {
            f"{name}_rtfx": audio_s / self.wall_s,
            f"{name}_busy": self.busy_s / self.wall_s,
            f"{name}_busy_rtfx": audio_s / self.busy_s,
        }


Look = tuple[float, EngineCounts]
"""A time in seconds, and what an engine had done then."""


def bench_saturation(graft: str, *, threads: int, clients: int, seconds: float) -> Findings:
    """Measure throughput and latency, and how busy the engine is kept."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        uploads = [path.read_bytes() for path in write_archive(Path(folder, "clips"), CLIPS, seconds=CLIP_S)]
    offline, tokens_per_clip = alone(_offline, graft, uploads, threads, clients, seconds)
    numbers = {"tokens_per_clip": tokens_per_clip} | offline.numbers("offline", tokens_per_clip)
    with service(graft, threads=threads, max_ongoing_chunks=2 * clients) as served:
        ask_for(served.url, uploads, clients=2, seconds=min(5.0, seconds))  # warm
        saturated, worked = _saturated(served, uploads, clients, seconds)
        numbers |= worked.numbers("saturated", tokens_per_clip) | _told("saturated", saturated)
        unloaded = ask_for(served.url, uploads, clients=1, seconds=seconds)
        loaded = ask_at(served.url, uploads, per_s=LOAD * numbers["saturated_rtfx"] / CLIP_S, seconds=seconds)
    numbers |= _told("unloaded", unloaded) | _told("loaded", loaded)
    numbers |= {
        "saturated_to_offline_rtfx": numbers["saturated_rtfx"] / numbers["offline_rtfx"],
        "saturated_to_offline_busy": numbers["saturated_busy"] / numbers["offline_busy"],
        "loaded_p95_to_unloaded_p50": loaded.latency_s(95) / unloaded.latency_s(50),
    }
    return Findings(numbers, f"{ABOUT}\n{list_numbers(numbers)}")


def _saturated(served: Service, uploads: Sequence[bytes], clients: int, seconds: float) -> tuple[Load, Worked]:
    """A load, and what the engine did between two looks at it, past the start of the load and before its end."""
    looks: list[Look] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            looks.append((time.time(), served.counts()))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        load = ask_for(served.url, uploads, clients=clients, seconds=seconds)
    finally:
        over.set()
        looking.join()
    start, end = load.began_s + STARTING * seconds, load.began_s + seconds
    first, *_, last = [one for one in looks if start <= one[0] <= end]
    return load, Worked.between(first, last)


def _told(name: str, load: Load) -> Numbers:
    return {
        f"{name}_p50_s": load.latency_s(50),
        f"{name}_p95_s": load.latency_s(95),
        f"{name}_answers": len(load.answers),
        f"{name}_failed": load.failed,
        f"{name}_clients_cpu": load.cpu_share,
    }


def _offline(graft: str, uploads: Sequence[bytes], threads: int, clients: int, seconds: float) -> tuple[Worked, float]:
    """The same clips by the same engine, so many at a time, without a service; and how many tokens come of a clip."""
    import torch

    from graft.audio.chunking import Chunk, windows
    from graft.audio.clip import read_audio
    from graft.inference.transcriber import open_transcriber

    quiet_libraries()
    torch.set_num_threads(threads)
    transcriber = open_transcriber(graft, device="cpu", chunker=windows)
    chunks = [Chunk(0.0, read_audio(upload)) for upload in uploads]
    heard = 0

    async def client(number: int, end: float) -> None:
        nonlocal heard
        while time.time() < end:
            await transcriber.transcribe_chunks([chunks[number % len(chunks)]])
            number, heard = number + 1, heard + 1

    def look() -> Look:
        return time.time(), transcriber.counts()

    async def work() -> tuple[Worked, float]:
        end = time.time() + seconds
        asked = asyncio.gather(*(client(number, end) for number in range(clients)))
        await asyncio.sleep(STARTING * seconds)
        first = look()
        await asyncio.sleep((1 - STARTING) * seconds)
        last = look()
        await asked
        return Worked.between(first, last), transcriber.counts().tokens / heard

    return asyncio.run(work())
