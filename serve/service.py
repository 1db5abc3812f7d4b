"""The service without HTTP: uploads -> chunks -> whoever hears them -> transcripts or their parts, within limits.

upload -> Decoder -> chunks, a few of a request at a time -> TranscriptionBackend -> segments -> stitch -> Transcript
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from graft.audio.chunking import Chunk
from graft.inference.transcript import Segment, Transcript, stitch

from .decode.decoder import Decoded, Decoder
from .observer import Observer

CHUNKS_PER_REQUEST = 4
"""Of one request in the engine at a time: the hours of one client do not stand before the seconds of another."""
UNHEARD = "a chunk was heard without a segment"


class Busy(Exception):
    """There is no room for a request; `retry_after_s` says when to ask again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after_s = retry_after_s


class NotReady(Exception):
    """No model is loaded just now."""


@dataclass(frozen=True)
class ModelInfo:
    """What is served, and what it can be asked for."""

    name: str
    language: str
    takes_context: bool
    times_words: bool


@dataclass(frozen=True)
class TranscriptionOptions:
    """What a request wants of its text."""

    context: tuple[str, ...] | None = None
    words: bool = False


class TranscriptionBackend(Protocol):
    """Hears chunks: a Transcriber in this process, or engines behind Ray Serve."""

    async def about(self) -> ModelInfo:
        """What is served now."""
        ...

    def hear(self, chunk: Chunk, asked: TranscriptionOptions, *, stream: bool) -> AsyncGenerator[str | Segment, None]:
        """Yield a chunk's segment; with `stream` before it its text in parts, as it comes. Closing it frees the chunk's place."""
        ...


class Service:
    """Transcribes uploads; of `max_requests` at once, and not more than `max_queued_s` seconds of audio."""

    def __init__(
        self,
        decoder: Decoder,
        listener: TranscriptionBackend,
        *,
        max_requests: int,
        max_queued_s: float,
        observer: Observer | None = None,
    ) -> None:
        self.listener = listener
        self._observer = observer or Observer()
        self._decoder = decoder
        self._max_requests = max_requests
        self._max_queued_s = max_queued_s
        self.requests = 0
        self._spoken_s: list[float] = []

    @property
    def queued_s(self) -> float:
        """Seconds of speech in hand."""
        return sum(self._spoken_s)  # one that is added to and taken from need not come back to 0

    async def transcribe(self, path: str, asked: TranscriptionOptions, *, model: str) -> Transcript:
        """Transcribe a file; `model` is what the transcript says who heard it. Raises AudioError, Busy, NotReady, ModelError."""
        start = time.monotonic()
        async with self._admitted(path) as decoded:
            slots = asyncio.Semaphore(CHUNKS_PER_REQUEST)

            async def heard(chunk: Chunk) -> Segment:
                async with slots:
                    return await _segment_of(self.listener.hear(chunk, asked, stream=False))

            try:
                async with asyncio.TaskGroup() as tasks:  # if one fails, the others free their places
                    parts = [tasks.create_task(heard(chunk)) for chunk in decoded.chunks]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            if any(
                part.cancelled() for part in parts
            ):  # by whoever hears; if this request were, it would not come here
                raise RuntimeError(UNHEARD)
            self._observer.transcribed(decoded.duration_s, time.monotonic() - start)
            return stitch([part.result() for part in parts], duration_s=decoded.duration_s, model=model)

    async def parts(self, path: str, asked: TranscriptionOptions) -> AsyncGenerator[str, None]:
        """Yield the text of a file in parts, in order, as they come; joined they are its transcript's text. Raises as `transcribe`."""
        start, has_begun = time.monotonic(), False
        async with self._admitted(path) as decoded, aclosing(_in_order(decoded.chunks, self.listener, asked)) as parts:
            async for part in parts:
                if not has_begun:
                    self._observer.began(time.monotonic() - start)
                    has_begun = True
                yield part
            self._observer.transcribed(decoded.duration_s, time.monotonic() - start)

    def check_room(self, coming: int = 0) -> None:
        """Raise Busy where there is no room for one more request, besides those in hand and so many that are still received."""
        if self.requests + coming >= self._max_requests:
            raise Busy(self._retry_after_s())

    @asynccontextmanager
    async def _admitted(self, path: str) -> AsyncIterator[Decoded]:
        """A decoded file, once there is room for it."""
        self.check_room()
        self.requests += 1
        try:
            decoded = await self._decoder(path)
            spoken_s = sum(chunk.clip.duration_s for chunk in decoded.chunks)
            if self.queued_s and self.queued_s + spoken_s > self._max_queued_s:
                raise Busy(self._retry_after_s())
            self._spoken_s.append(spoken_s)
            try:
                yield decoded
            finally:
                self._spoken_s.remove(spoken_s)
        finally:
            self.requests -= 1

    def _retry_after_s(self) -> int:
        return max(1, round(self.queued_s / 10))


async def _segment_of(hearing: AsyncGenerator[str | Segment, None]) -> Segment:
    async with aclosing(hearing) as parts:
        async for part in parts:
            if isinstance(part, Segment):
                return part
    raise RuntimeError(UNHEARD)


async def _in_order(
    chunks: Sequence[Chunk], listener: TranscriptionBackend, asked: TranscriptionOptions
) -> AsyncGenerator[str, None]:
    """The text of chunks that are heard side by side, one after the other, with a space between two."""
    slots = asyncio.Semaphore(CHUNKS_PER_REQUEST)
    outboxes: list[asyncio.Queue[str | Segment | Exception]] = [asyncio.Queue() for _ in chunks]

    async def hear(chunk: Chunk, outbox: asyncio.Queue[str | Segment | Exception]) -> None:
        try:
            async with slots, aclosing(listener.hear(chunk, asked, stream=True)) as parts:
                async for part in parts:
                    outbox.put_nowait(part)
        except Exception as error:
            outbox.put_nowait(error)
        finally:  # whoever has the segment, or an error, reads no further
            outbox.put_nowait(RuntimeError(UNHEARD))

    tasks = [asyncio.create_task(hear(chunk, outbox)) for chunk, outbox in zip(chunks, outboxes, strict=True)]
    space = ""
    try:
        for outbox in outboxes:
            while not isinstance(part := await outbox.get(), Segment):
                if isinstance(part, Exception):
                    raise part
                yield space + part
                space = ""
            space = " " if part.text else space
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
