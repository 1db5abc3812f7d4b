"""Clients of a transcription service, in a process of their own whose CPU time is told: so many at a time, or so many a second."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np

from .processes import alone

ENDPOINT = "/v1/audio/transcriptions"


@dataclass(frozen=True)
class Answer:
    """What came of an upload, by its number: how long after the start it was sent, how long the answer took, its status (0: none)."""

    upload: int
    sent_s: float
    seconds: float
    status: int
    text: str

    @property
    def is_good(self) -> bool:
        return self.status == 200


@dataclass(frozen=True)
class Load:
    """All answers, when the first was asked for (Unix time), and what the clients took of the clock and of a core."""

    answers: list[Answer]
    began_s: float
    wall_s: float
    cpu_s: float

    @property
    def failed(self) -> int:
        return sum(not answer.is_good for answer in self.answers)

    @property
    def cpu_share(self) -> float:
        """The clients' own share of a core."""
        return self.cpu_s / self.wall_s

    def latency_s(self, percentile: float) -> float:
        """Of good answers; nan where there is none."""
        return float(
            np.percentile([answer.seconds for answer in self.answers if answer.is_good] or [np.nan], percentile)
        )


def ask_once(url: str, uploads: Sequence[bytes], *, clients: int) -> Load:
    """Have each upload transcribed once, by so many clients that ask again as soon as they are answered."""
    return alone(_run, url, list(uploads), clients, None, None)


def ask_for(url: str, uploads: Sequence[bytes], *, clients: int, seconds: float) -> Load:
    """Have uploads transcribed over and over, by so many clients that ask again as soon as they are answered, for so long."""
    return alone(_run, url, list(uploads), clients, seconds, None)


def ask_at(url: str, uploads: Sequence[bytes], *, per_s: float, seconds: float) -> Load:
    """Have so many uploads a second transcribed for so long, at random times (a Poisson process), whoever is answered or not."""
    return alone(_run, url, list(uploads), 0, seconds, per_s)


def _run(url: str, uploads: list[bytes], clients: int, seconds: float | None, per_s: float | None) -> Load:
    return asyncio.run(_load(url, uploads, clients, seconds, per_s))


async def _load(url: str, uploads: list[bytes], clients: int, seconds: float | None, per_s: float | None) -> Load:
    answers: list[Answer] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600)
    ) as session:
        model = await _model(session, url)
        began, start, cpu = time.time(), time.perf_counter(), time.process_time()

        async def ask(number: int) -> None:
            sent = time.perf_counter()
            status, text = await _asked(session, url, uploads[number % len(uploads)], model)
            answers.append(Answer(number % len(uploads), sent - start, time.perf_counter() - sent, status, text))

        if per_s is not None and seconds is not None:
            await _at_random(ask, per_s, seconds)
        else:
            await _in_turn(ask, clients, len(uploads), start + seconds if seconds else None)
        return Load(answers, began, time.perf_counter() - start, time.process_time() - cpu)


async def _in_turn(ask: Callable[[int], Awaitable[None]], clients: int, count: int, end: float | None) -> None:
    number = 0

    async def client() -> None:
        nonlocal number
        while time.perf_counter() < end if end else number < count:
            number += 1
            await ask(number - 1)

    await asyncio.gather(*(client() for _ in range(clients)))


async def _at_random(ask: Callable[[int], Awaitable[None]], per_s: float, seconds: float) -> None:
    rng, asked = random.Random(0), list[asyncio.Task[None]]()
    start = at = time.perf_counter()
    while (at := at + rng.expovariate(per_s)) < start + seconds:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        asked.append(asyncio.ensure_future(ask(len(asked))))
    await asyncio.gather(*asked)


async def _model(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/v1/models") as response:
        return str((await response.json())["data"][0]["id"])


async def _asked(session: aiohttp.ClientSession, url: str, upload: bytes, model: str) -> tuple[int, str]:
    form = aiohttp.FormData({"model": model})
    form.add_field("file", upload, filename="clip.flac", content_type="audio/flac")
    try:
        async with session.post(url + ENDPOINT, data=form) as response:
            return response.status, (await response.json())["text"] if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError):
        return 0, ""
