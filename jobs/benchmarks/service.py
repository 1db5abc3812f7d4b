"""Measure the service: beside its engine offline, beside another server, and as engines come and go.

It runs as `serve run` runs it. The clients are a process of their own, whose CPU time is reported.
"""

import contextlib
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests

from graft.audio.chunking import windows
from graft.audio.clip import encode_flac
from graft.errors import require
from graft.inference.engines.protocol import EngineCounts
from graft.inference.transcriber import open_transcriber
from graft.text.wer import score

from ..common.cluster import connect
from ..common.local_service import free_port, running, serving
from . import peers
from .measuring import Numbers, Row, alone, report, report_table
from .speech import labelled_speech, spoken_clips

APP = "bench"
# Arguments of the service: here clients wait and are not refused.
LIMITS = {"request_timeout_s": 600, "max_ongoing_requests": 10_000}
SCALING = {"max_replicas": 2, "max_ongoing_chunks": 8, "upscale_delay_s": 2, "downscale_delay_s": 10}
CLIP_S, CLIPS = 5.0, 32
# The share of the saturated rate that is a lasting load, and the share of a load's time that is left out.
LOAD, STARTING = 0.7, 0.2
LOOK_S = 0.25
CLIENTS = (1, 4, 16)
# Clients that ask at random times, so many that none of them is late.
MOST_CLIENTS = 256
FEW, MANY, PATIENCE_S = 1, 16, 300.0

ABOUT_SATURATION = f"""\
clips of {CLIP_S:g} s, FLAC; rtfx: seconds of audio a second
offline    the engine in a process of its own, with as many clips at a time as there are clients, for as long
saturated  the service by `serve run`: one ingress, one engine, and clients that ask again as soon as they are answered
unloaded   the same with one client
loaded     the same with {LOAD:.0%} of the saturated rate, at random times
busy: the share of the time in which the engine computes; clients_cpu: the share of a core that the clients take."""
ABOUT_SERVERS = """\
graft           its service by `serve run`, one engine
faster-whisper  Whisper base converted for CTranslate2, int8, greedy, behind a plain FastAPI server
Each clip once, by so many clients that ask one after the other; clients_cpu: the share of a core that they take."""
ABOUT_REPLICAS = f"""\
clips of {CLIP_S:g} s; {FEW} client, then {MANY}, then {FEW} again; an engine for each 4 chunks in hand, at most two;
upscale_delay_s 2, downscale_delay_s 10; seconds from the change of load to the change of engines"""


class Answer(NamedTuple):
    """The answer to an upload, by its number; its status is 0 where there is none."""

    upload: int
    seconds: float
    status: int
    text: str


def ask(
    url: str, uploads: Sequence[bytes], clients: int = 1, seconds: float = 0.0, per_s: float = 0.0
) -> tuple[list[Answer], Numbers]:
    """Have each upload transcribed once, or for `seconds` over and over, by clients that ask one after the other.

    With `per_s` so many uploads a second are sent instead, at random times. Returns all answers, and their numbers:
    latency is that of good answers.
    """
    return alone(_ask, url, list(uploads), clients, seconds, per_s)


def _ask(url: str, uploads: list[bytes], clients: int, seconds: float, per_s: float) -> tuple[list[Answer], Numbers]:
    model = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    uploaded: Iterator[int] = itertools.count() if seconds else iter(range(len(uploads)))
    answers, start, cpu = list[Answer](), time.perf_counter(), time.process_time()
    end = start + (seconds or math.inf)

    def send(number: int) -> None:
        upload, sent, status, text = number % len(uploads), time.perf_counter(), 0, ""
        with contextlib.suppress(requests.RequestException):
            files, form = {"file": ("clip.flac", uploads[upload], "audio/flac")}, {"model": model}
            response = requests.post(f"{url}/v1/audio/transcriptions", files=files, data=form, timeout=600)
            text = response.json()["text"] if response.status_code == 200 else ""
            status = response.status_code
        answers.append(Answer(upload, time.perf_counter() - sent, status, text))

    def send_in_turn(_: int) -> None:
        for number in uploaded:
            if time.perf_counter() >= end:
                break
            send(number)

    def send_at(second: float) -> None:
        time.sleep(max(0.0, start + second - time.perf_counter()))
        send(next(uploaded))

    with ThreadPoolExecutor(MOST_CLIENTS if per_s else clients) as pool:
        if per_s:
            at_random = np.sort(np.random.default_rng(0).uniform(0, seconds, round(per_s * seconds)))
            list(pool.map(send_at, at_random))
        else:
            list(pool.map(send_in_turn, range(clients)))
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    seconds_each = [answer.seconds for answer in answers if answer.status == 200]
    p50_s, p95_s = np.percentile(seconds_each or [np.nan], [50, 95]).tolist()
    numbers = {"answers": len(answers), "failed": len(answers) - len(seconds_each), "seconds": wall_s}
    return answers, numbers | {"p50_s": p50_s, "p95_s": p95_s, "clients_cpu": cpu_s / wall_s}


@contextlib.contextmanager
def service(model: str, **settings: Any) -> Iterator[tuple[str, Any]]:
    """Run the service with these of its arguments; yields its URL and ray.serve. Raises ServerFailed, MissingExtra."""
    serve = require("ray.serve", extra="serve")
    connect(cpus=8)
    with tempfile.TemporaryDirectory() as folder, serving(model, Path(folder), app=APP, **LIMITS, **settings) as url:
        yield url, serve


def bench_saturation(graft: str, clients: int, seconds: float) -> Numbers:
    """Measure throughput and latency, and how busy the engine is kept."""
    uploads = [encode_flac(clip) for clip, _ in spoken_clips(CLIPS, seconds=CLIP_S)]
    tokens_per_clip, offline = alone(_offline, graft, clients, seconds)
    with service(graft, max_ongoing_chunks=2 * clients) as (url, serve), ThreadPoolExecutor(1) as thread:
        engine = serve.get_deployment_handle("Engine", APP)
        ask(url, uploads, clients=2, seconds=min(5.0, seconds))  # warm up
        saturating = thread.submit(ask, url, uploads, clients, seconds)
        saturated = _engine_rates(lambda: engine.counts.remote().result(), seconds, saturating)
        numbers: Numbers = {}
        for name, (tokens_per_s, busy) in {"offline": offline, "saturated": saturated}.items():
            # Clips that are not done count by their tokens.
            numbers |= {f"{name}_rtfx": CLIP_S * tokens_per_s / tokens_per_clip, f"{name}_busy": busy}
        loads = {"saturated": saturating.result(), "unloaded": ask(url, uploads, seconds=seconds)}
        per_s = LOAD * numbers["saturated_rtfx"] / CLIP_S
        loads["loaded"] = ask(url, uploads, per_s=per_s, seconds=seconds)
    for name, (_, load) in loads.items():
        numbers |= {f"{name}_{key}": value for key, value in load.items()}
    numbers["saturated_to_offline_rtfx"] = numbers["saturated_rtfx"] / numbers["offline_rtfx"]
    numbers["loaded_p95_to_unloaded_p50"] = numbers["loaded_p95_s"] / numbers["unloaded_p50_s"]
    return report(ABOUT_SATURATION, numbers)


def _engine_rates(counts: Callable[[], EngineCounts], seconds: float, load: Future) -> tuple[float, float]:
    """Look at an engine under a load of so many seconds; returns tokens a second, and the share of time it computes."""
    while not (counts().running or load.done()):
        time.sleep(LOOK_S)
    time.sleep(STARTING * seconds)
    start, before = time.time(), counts()
    time.sleep((1 - STARTING) * seconds)
    after, elapsed_s = counts(), time.time() - start
    return (after.tokens - before.tokens) / elapsed_s, (after.busy_s - before.busy_s) / elapsed_s


def _offline(graft: str, clients: int, seconds: float) -> tuple[float, tuple[float, float]]:
    """Have the same engine transcribe the same clips without a service; returns tokens for a clip, and its rates."""
    transcriber = open_transcriber(graft, device="cpu", chunker=windows, threads=1)
    clips, end = itertools.cycle([clip for clip, _ in spoken_clips(CLIPS, seconds=CLIP_S)]), time.time() + seconds

    def transcribe() -> int:
        done = 0
        while time.time() < end:
            transcriber.transcribe(next(clips))
            done += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        done = [pool.submit(transcribe) for _ in range(clients)]
        rates = _engine_rates(transcriber.counts, seconds, done[0])
    return transcriber.counts().tokens / sum(one.result() for one in done), rates


def bench_servers(graft: str, model: str | None, speech: Sequence[str] | None) -> Numbers:
    """Measure the service and, where it is installed, faster-whisper: throughput, latency and word errors."""
    labelled = labelled_speech(speech)
    uploads = [encode_flac(clip) for clip, _ in labelled]

    def measure(name: str, url: str, *, trained: bool) -> Iterator[Row]:
        ask(url, uploads[:2])  # warm up
        for clients in CLIENTS:
            answers, load = ask(url, uploads, clients)
            good = [answer for answer in answers if answer.status == 200]
            clips, references = zip(*(labelled[answer.upload] for answer in good), strict=True)
            wer = 100 * score(references, [answer.text for answer in good]).wer if trained else None
            speed = sum(clip.duration_s for clip in clips) / load["seconds"]
            yield f"{name} {clients}", {"audio s/s": speed, "WER %": wer} | load

    def rows() -> Iterator[Row]:
        with service(graft) as (url, _):
            yield from measure("graft", url, trained=model is not None)
        with tempfile.TemporaryDirectory() as folder:
            if not peers.convert_whisper(folder):
                return
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", peers.__name__, folder, str(port)]
            with running(command, f"{url}/v1/models", Path(folder, "peer.log")):
                yield from measure("faster-whisper", url, trained=True)

    if not model:
        print(peers.NO_GRAFT)
    return report_table(ABOUT_SERVERS, rows())


def bench_replicas(graft: str, seconds: float) -> Numbers:
    """Measure how long a second engine takes to come and to go as load rises and falls, and that no request fails."""
    uploads = [encode_flac(clip) for clip, _ in spoken_clips(CLIPS, seconds=CLIP_S)]
    numbers: Numbers = {"answers": 0, "failed": 0}
    with service(graft, **SCALING) as (url, serve), ThreadPoolExecutor(1) as thread:
        for name, clients, engines in (("start_s", FEW, 1), ("up_s", MANY, 2), ("down_s", FEW, 1)):
            start, numbers[name] = time.time(), math.nan
            while math.isnan(numbers[name]) and time.time() < start + PATIENCE_S:
                load = thread.submit(ask, url, uploads, clients, seconds)
                while not load.done():
                    states = serve.status().applications[APP].deployments["Engine"].replica_states
                    if math.isnan(numbers[name]) and states.get("RUNNING") == engines:
                        numbers[name] = time.time() - start
                    time.sleep(LOOK_S)
                numbers |= {key: numbers[key] + load.result()[1][key] for key in ("answers", "failed")}
    return report(ABOUT_REPLICAS, numbers)
