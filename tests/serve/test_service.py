"""The service without HTTP: what becomes of a request when whoever hears falls silent, and of the room that it took."""

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
import pytest

from graft.audio.chunking import Chunk
from graft.audio.clip import AudioClip
from graft.inference.transcript import Segment
from serve.decode.decoder import Decoded
from serve.service import UNHEARD, Busy, ModelInfo, Service, TranscriptionOptions


def chunk(seconds: float) -> Chunk:
    return Chunk(0.0, AudioClip(np.zeros(round(seconds * 16_000), np.float32)))


async def decode(path: str) -> Decoded:
    """In place of a Decoder: the path says how long each chunk is."""
    chunks = [chunk(float(seconds)) for seconds in path.split()]
    return Decoded(sum(one.clip.duration_s for one in chunks), chunks)


class Hearing:
    """Says a word of each chunk and ends so or so, once it may."""

    def __init__(self, end: BaseException | None = None, *, tells: bool = True) -> None:
        self._end, self._tells, self.may = end, tells, asyncio.Event()

    async def about(self) -> ModelInfo:
        return ModelInfo("m", "en", takes_context=False, times_words=False)

    async def hear(
        self, chunk: Chunk, asked: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[str | Segment, None]:
        await self.may.wait()
        if stream:
            yield "word"
        if self._end:
            raise self._end
        if self._tells:
            yield Segment(0.0, 1.0, "word")


def service(hearing: Hearing, *, max_queued_s: float = 1_000) -> Service:
    return Service(decode, hearing, max_requests=10, max_queued_s=max_queued_s)


async def streamed(service: Service, path: str) -> str:
    return "".join([part async for part in service.parts(path, TranscriptionOptions())])


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("hearing", [{"tells": False}, {"end": asyncio.CancelledError()}], ids=["silent", "cancelled"])
def test_a_chunk_that_is_not_heard_to_its_end_is_an_error(hearing, is_stream):
    async def run() -> None:
        listener = Hearing(**hearing)
        listener.may.set()
        one = service(listener)
        async with asyncio.timeout(10):
            with pytest.raises(RuntimeError, match=UNHEARD):
                await (streamed(one, "1 1") if is_stream else one.transcribe("1 1", TranscriptionOptions(), model="m"))
        assert (one.requests, one.queued_s) == (0, 0)

    asyncio.run(run())


def test_who_is_cancelled_is_not_told_of_an_error():
    async def run() -> None:
        one = service(Hearing())
        for asked in (one.transcribe("1 1", TranscriptionOptions(), model="m"), streamed(one, "1 1")):
            task = asyncio.create_task(asked)
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (one.requests, one.queued_s) == (0, 0)

    asyncio.run(run())


def test_an_idle_service_takes_an_upload_longer_than_may_wait():
    async def run() -> None:
        listener = Hearing()
        one = service(listener, max_queued_s=1)
        short = [
            asyncio.create_task(one.transcribe(path, TranscriptionOptions(), model="m"))
            for path in ("0.1", "0.2", "0.3", "0.1")
        ]
        await asyncio.sleep(0.01)
        assert one.queued_s == pytest.approx(0.7)
        with pytest.raises(Busy):
            await one.transcribe("2", TranscriptionOptions(), model="m")
        listener.may.set()
        await asyncio.gather(*short)
        assert (await one.transcribe("2", TranscriptionOptions(), model="m")).duration_s == 2

    asyncio.run(run())
