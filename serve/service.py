"""Transcribe uploads within limits on requests and queued audio, independently of HTTP.

upload -> Decoder -> chunks, a few of each request at a time -> TranscriptionBackend -> segments -> stitch -> Transcript
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from graft.audio.chunking import Chunk, find_telling
from graft.inference.engines.protocol import EngineCounts
from graft.inference.segments import ScoredToken, Segment
from graft.inference.transcript import Transcript, stitch

from .decode.decoder import DecodedUpload, Decoder
from .fairness import FairSlots
from .logs import Observer

CHUNKS_PER_REQUEST = 4
"""Chunks that one request has in the engine at a time, so that an upload of hours does not delay one of seconds."""
NO_SEGMENT = "the backend returned no segment for a chunk"
NO_COUNTS = EngineCounts(running=0, waiting=0, prefills=0, steps=0, tokens=0, busy_s=0.0)
ANONYMOUS = "anonymous"
"""Name of clients that have no API key."""


class ServiceBusy(Exception):
    """The service has no capacity for a request; `retry_after_s` is the number of seconds after which to try again."""

    def __init__(self, retry_after_s: int, reason: str = "too many requests are waiting") -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class ServiceStopping(Exception):
    """The service answers the requests that it has accepted, accepts no other ones, and ends."""


class ModelNotReady(Exception):
    """No model is loaded at the moment."""


@dataclass(frozen=True)
class Client:
    """The sender of requests, among which the service shares its capacity.

    `id` tells clients apart: by API key or, where there are no keys, by address. `name` is what logs and metrics call
    the key.
    """

    id: str = ""
    name: str = ANONYMOUS


NOBODY = Client()
"""The client of a service that has a single one."""


@dataclass(frozen=True)
class FailedChange:
    """A model that was to replace a replica's and could not be opened, and the class of the error, which is logged."""

    model: str
    error: str


@dataclass(frozen=True)
class ReplicaModel:
    """What one engine replica serves."""

    replica: str
    model: str
    """The checkpoint's own name, which changes with the model that is loaded."""
    digest: str
    """SHA-256 of its weights and configurations (graft.checkpoints.loading.model_digest)."""
    is_open: bool = True
    """False while the next model is opened because two do not fit into memory: chunks wait for it."""
    failure: FailedChange | None = None
    """The last change of the model, if it failed."""


@dataclass(frozen=True)
class ModelInfo:
    """The served model's name, its languages (ISO 639-1), the optional features that it supports, and its replicas."""

    name: str
    language: str | None
    """The language of the speech where a request names none; None where the model finds it out, or nobody knows."""
    supports_context: bool
    supports_word_timestamps: bool
    replicas: tuple[ReplicaModel, ...] = ()
    languages: tuple[str, ...] = ()
    """Languages that a prompt may name; a model without any transcribes `language` alone."""
    finds_language: bool = False
    """Whether the model finds out which language is spoken."""


@dataclass(frozen=True)
class TranscriptionOptions:
    """Options of a request: words that may occur in the audio, and whether words get timestamps and tokens are sent.

    `language` (ISO 639-1) is that of the speech; where it is None, `finds_language` says whether the model finds it
    out. `prefix` is text with which that of a chunk begins, and which a pass over live speech has found before.
    """

    context: tuple[str, ...] | None = None
    word_timestamps: bool = False
    logprobs: bool = False
    language: str | None = None
    finds_language: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class FoundLanguage:
    """The language (ISO 639-1) that a model has found out."""

    code: str


Part: TypeAlias = str | ScoredToken | FoundLanguage | Segment
"""What a backend yields of a chunk."""


class TranscriptionBackend(Protocol):
    """Transcribes chunks: with a Transcriber in this process, or with engine replicas behind Ray Serve."""

    async def model_info(self) -> ModelInfo:
        """Return what is served now. Raises ModelNotReady."""
        ...

    def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[Part, None]:
        """Yield a chunk's segment; with `stream`, first its text in parts. Closing the generator aborts the chunk.

        With `options.logprobs` the segment is a ScoredSegment, and each part of a stream comes after its tokens. A
        FoundLanguage comes before all of it where the language is to be found.
        """
        ...


class Service:
    """Transcribes uploads, at most `max_requests` at once and `max_queued_s` seconds of speech in total.

    The backend has at most `max_chunks` chunks at once. A client gets at most `max_requests_per_client` of the
    requests, by default all, and the same share of the speech and of the chunks, of these at most
    `max_chunks_per_client`.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: TranscriptionBackend,
        *,
        max_requests: int,
        max_queued_s: float,
        max_requests_per_client: int | None = None,
        max_chunks: int = 64,
        max_chunks_per_client: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.backend = backend
        self._observer = observer or Observer()
        self._decoder = decoder
        self.max_requests = max_requests
        self._max_requests_per_client = min(max_requests_per_client or max_requests, max_requests)
        self._max_queued_s = max_queued_s
        self._request_counts: Counter[str] = Counter()  # by client
        self._speech_s: list[tuple[str, float]] = []  # client and seconds of each decoded upload
        share = self._max_requests_per_client / max_requests
        own_chunks = max(1, round(share * max_chunks))
        self._chunk_slots = FairSlots(max_chunks, min(own_chunks, max_chunks_per_client or own_chunks))
        self.stopping = asyncio.Event()
        self._is_idle = asyncio.Event()  # set where no request is being transcribed
        self._is_idle.set()

    @property
    def request_count(self) -> int:
        """Uploads that are being transcribed."""
        return self._request_counts.total()

    @property
    def queued_s(self) -> float:
        """Seconds of speech in all uploads that are being transcribed."""
        return sum(seconds for _, seconds in self._speech_s)  # a running total would not return to exactly 0

    async def transcribe(
        self, path: str, options: TranscriptionOptions, *, model: str, client: Client = NOBODY
    ) -> Transcript:
        """Transcribe a file; `model` is the name that the transcript states.

        Raises AudioError, ServiceBusy, ModelNotReady, ModelError.
        """
        start = time.monotonic()
        async with (
            self._admit(path, client) as upload,
            aclosing(self._transcribe_in_order(upload.chunks, options, client, stream=False)) as parts,
        ):
            segments, language = [], options.language
            async for part in parts:
                if isinstance(part, Segment):
                    segments.append(part)
                elif isinstance(part, FoundLanguage):
                    language = part.code
            self._observer.on_transcript(upload.duration_s, time.monotonic() - start, key=client.name)
            return stitch(
                segments, duration_s=upload.duration_s, model=model, defects=upload.defects, language=language
            )

    async def stream(
        self, path: str, options: TranscriptionOptions, *, model: str, client: Client = NOBODY
    ) -> AsyncGenerator[str | ScoredToken | Transcript, None]:
        """Yield the text of a file in parts, in order, as they are decoded, and at last the transcript.

        The parts joined are the transcript's text. With `options.logprobs`, tokens come before the text that they
        complete. Raises what `transcribe` raises.
        """
        start, has_begun, space = time.monotonic(), False, ""
        segments: list[Segment] = []
        async with (
            self._admit(path, client) as upload,
            aclosing(self._transcribe_in_order(upload.chunks, options, client, stream=True)) as parts,
        ):
            async for part in parts:
                if isinstance(part, Segment):
                    segments.append(part)
                    space = " " if part.text else space  # between this chunk and the next
                    continue
                if isinstance(part, FoundLanguage):
                    continue
                if isinstance(part, ScoredToken):
                    yield part
                    continue
                if not has_begun:
                    self._observer.on_first_text(time.monotonic() - start)
                    has_begun = True
                yield space + part
                space = ""
            self._observer.on_transcript(upload.duration_s, time.monotonic() - start, key=client.name)
            yield stitch(segments, duration_s=upload.duration_s, model=model)

    def check_capacity(self, client: Client, unanswered: int = 0) -> None:
        """Raise ServiceBusy where one more request exceeds a limit, ServiceStopping after `stop`.

        `unanswered` is the number of the client's uploads that have no complete answer yet, those that are arriving
        included. They count against its own limit; a place that others could use is taken only by an upload that has
        arrived.
        """
        if self.stopping.is_set():
            raise ServiceStopping
        own = self._max_requests_per_client
        # Requests with an idempotency key may go on without a client that waits for the answer.
        if own < self.max_requests and max(self._request_counts[client.id], unanswered) >= own:
            reason = f"this API key has {own} requests under way, which is its limit"
            raise ServiceBusy(self._retry_after_s(client), reason)
        if self.request_count >= self.max_requests:
            raise ServiceBusy(self._retry_after_s())

    async def stop(self) -> None:
        """Accept no more requests, and wait until those that were accepted have been transcribed."""
        self.stopping.set()
        await self._is_idle.wait()

    @asynccontextmanager
    async def _admit(self, path: str, client: Client) -> AsyncIterator[DecodedUpload]:
        """Decode a file and count it until the block ends. Raises ServiceBusy."""
        with self.hold_place(client):
            upload = await self._decoder(path, client.id)
            with self.queue_speech(client, sum(chunk.clip.duration_s for chunk in upload.chunks)):
                yield upload

    @contextmanager
    def hold_place(self, client: Client) -> Iterator[None]:
        """Count a request until the block ends. Raises ServiceBusy, ServiceStopping."""
        self.check_capacity(client)
        self._request_counts[client.id] += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._request_counts[client.id] -= 1
            if not self._request_counts[client.id]:
                del self._request_counts[client.id]
            if not self.request_count:
                self._is_idle.set()

    @contextmanager
    def queue_speech(self, client: Client, speech_s: float) -> Iterator[None]:
        """Count seconds of speech until the block ends. Raises ServiceBusy."""
        self._check_queue(client, speech_s)
        self._speech_s.append((client.id, speech_s))
        try:
            yield
        finally:
            self._speech_s.remove((client.id, speech_s))

    def chunk_slot(self, client: Client) -> AbstractAsyncContextManager[None]:
        """Wait for one of the chunks that the backend has at once, and hold it until the block ends."""
        return self._chunk_slots.slot(client.id)

    def _check_queue(self, client: Client, speech_s: float) -> None:
        """Raise ServiceBusy where one more upload exceeds the limit, unless there is no other one."""
        own_s, limit_s = self._own_speech_s(client), self._max_queued_s
        own_limit_s = limit_s * self._max_requests_per_client / self.max_requests
        if own_limit_s < limit_s and own_s and own_s + speech_s > own_limit_s:
            reason = f"this API key has {own_s:.0f} s of speech under way, and its limit is {own_limit_s:g} s"
            raise ServiceBusy(self._retry_after_s(client), reason)
        if self.queued_s and self.queued_s + speech_s > limit_s:
            raise ServiceBusy(self._retry_after_s())

    def _own_speech_s(self, client: Client) -> float:
        return sum(seconds for id, seconds in self._speech_s if id == client.id)

    def _retry_after_s(self, client: Client | None = None) -> int:
        """Guess when there is capacity again, for one client or for all."""
        waiting_s = self._own_speech_s(client) if client else self.queued_s
        return max(1, round(waiting_s / 10))  # ten times real time is a cautious guess

    async def _transcribe_in_order(
        self, chunks: Sequence[Chunk], options: TranscriptionOptions, client: Client, *, stream: bool
    ) -> AsyncGenerator[Part, None]:
        """Yield what the backend yields for one chunk after the other, while several are decoded together.

        Where the language is to be found, one chunk tells it to all.
        """
        telling = find_telling(chunks) if chunks and options.finds_language and not options.language else None
        language, is_told = options.language, asyncio.Event()
        slots = asyncio.Semaphore(CHUNKS_PER_REQUEST)
        queues: list[asyncio.Queue[Part | Exception]] = [asyncio.Queue() for _ in chunks]

        async def fill(place: int) -> None:
            nonlocal language
            queue = queues[place]
            try:
                if telling not in (None, place):
                    await is_told.wait()
                asked = replace(options, language=language)
                async with (
                    slots,
                    self.chunk_slot(client),
                    aclosing(self.backend.transcribe_chunk(chunks[place], asked, stream=stream)) as parts,
                ):
                    async for part in parts:
                        queue.put_nowait(part)
                        if isinstance(part, FoundLanguage) and place == telling:
                            language = part.code
                            is_told.set()
            except Exception as error:
                queue.put_nowait(error)
            finally:  # nobody reads this after a segment or an error
                queue.put_nowait(RuntimeError(NO_SEGMENT))
                if place == telling:
                    is_told.set()

        tasks = [asyncio.create_task(fill(place)) for place in range(len(chunks))]
        try:
            for queue in queues:
                part: Part | Exception = ""
                while not isinstance(part, Segment):
                    part = await queue.get()
                    if isinstance(part, Exception):
                        raise part
                    yield part
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
