"""The service without HTTP: errors of the backend, cancelled requests, and the limit on queued audio."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np
import pytest

from graft.audio.chunking import Chunk
from graft.audio.clip import AudioClip
from graft.inference.segments import Segment
from serve.decode.decoder import DecodedUpload
from serve.service import NO_SEGMENT, Client, FoundLanguage, ModelInfo, Service, ServiceBusy, TranscriptionOptions

OPTIONS = TranscriptionOptions()


def make_chunk(seconds: float) -> Chunk:
    return Chunk(0.0, AudioClip(np.zeros(round(seconds * 16_000), np.float32)))


async def decode(path: str, client: str) -> DecodedUpload:
    """Stand in for a Decoder: the path lists the duration of each chunk in seconds."""
    chunks = [make_chunk(float(seconds)) for seconds in path.split()]
    return DecodedUpload(sum(chunk.clip.duration_s for chunk in chunks), chunks)


class WaitingBackend:
    """Waits for `may_answer`, yields one word of each chunk, and then raises `error` or yields a segment or neither."""

    def __init__(self, error: BaseException | None = None, *, yields_segment: bool = True) -> None:
        self._error, self._yields_segment, self.may_answer = error, yields_segment, asyncio.Event()

    async def model_info(self) -> ModelInfo:
        return ModelInfo("m", "en", supports_context=False, supports_word_timestamps=False)

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[str | Segment, None]:
        await self.may_answer.wait()
        if stream:
            yield "word"
        if self._error:
            raise self._error
        if self._yields_segment:
            yield Segment(0.0, 1.0, "word")


def make_service(backend: WaitingBackend, *, max_queued_s: float = 1_000, **limits: int) -> Service:
    return Service(decode, backend, max_requests=10, max_queued_s=max_queued_s, **limits)


async def stream_text(service: Service, path: str) -> str:
    return "".join([part async for part in service.stream(path, OPTIONS, model="m") if isinstance(part, str)])


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "backend", [{"yields_segment": False}, {"error": asyncio.CancelledError()}], ids=["silent", "cancelled"]
)
def test_a_chunk_without_a_segment_is_an_error(backend, is_stream):
    async def run() -> None:
        answering = WaitingBackend(**backend)
        answering.may_answer.set()
        service = make_service(answering)
        async with asyncio.timeout(10):
            with pytest.raises(RuntimeError, match=NO_SEGMENT):
                await (stream_text(service, "1 1") if is_stream else service.transcribe("1 1", OPTIONS, model="m"))
        assert (service.request_count, service.queued_s) == (0, 0)

    asyncio.run(run())


def test_a_cancelled_request_raises_cancelled_error_and_is_no_longer_counted():
    async def run() -> None:
        service = make_service(WaitingBackend())
        for request in (service.transcribe("1 1", OPTIONS, model="m"), stream_text(service, "1 1")):
            task = asyncio.create_task(request)
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (service.request_count, service.queued_s) == (0, 0)

    asyncio.run(run())


def test_only_an_idle_service_takes_an_upload_that_is_longer_than_the_limit():
    async def run() -> None:
        backend = WaitingBackend()
        service = make_service(backend, max_queued_s=1)
        short = [
            asyncio.create_task(service.transcribe(path, OPTIONS, model="m")) for path in ("0.1", "0.2", "0.3", "0.1")
        ]
        await asyncio.sleep(0.01)
        assert service.queued_s == pytest.approx(0.7)
        with pytest.raises(ServiceBusy):
            await service.transcribe("2", OPTIONS, model="m")
        backend.may_answer.set()
        await asyncio.gather(*short)
        assert (await service.transcribe("2", OPTIONS, model="m")).duration_s == 2

    asyncio.run(run())


def test_a_client_gets_its_share_of_the_queue_and_no_more():
    async def run() -> None:
        backend = WaitingBackend()
        service = make_service(backend, max_queued_s=10, max_requests_per_client=5)

        def ask(path: str, client: str) -> asyncio.Task:
            return asyncio.create_task(service.transcribe(path, OPTIONS, model="m", client=Client(client)))

        accepted = [ask("3", "a"), ask("2", "a"), ask("5", "b")]
        await asyncio.sleep(0.01)
        with pytest.raises(ServiceBusy, match="this API key has 5 s of speech under way, and its limit is 5 s"):
            await ask("1", "a")
        with pytest.raises(ServiceBusy, match="too many requests are waiting"):
            await ask("1", "c")
        backend.may_answer.set()
        await asyncio.gather(*accepted)
        await ask("9", "a")  # nothing else of this client is queued

    asyncio.run(run())


class CountingBackend(WaitingBackend):
    """Counts the chunks that it has at once, by the tenths of a second that they last."""

    def __init__(self) -> None:
        super().__init__()
        self.running: Counter[int] = Counter()

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[str | Segment, None]:
        tenths = round(chunk.clip.duration_s * 10)
        self.running[tenths] += 1
        try:
            async for part in super().transcribe_chunk(chunk, options, stream=stream):
                yield part
        finally:
            self.running[tenths] -= 1


@pytest.mark.parametrize(("limits", "most"), [({}, 4), ({"max_chunks_per_client": 2}, 2)], ids=["share", "fewer"])
def test_the_chunks_of_one_client_leave_room_for_those_of_others(limits, most):
    async def run() -> None:
        backend = CountingBackend()
        service = make_service(backend, max_requests_per_client=5, max_chunks=8, **limits)

        def ask(path: str, client: str) -> asyncio.Task:
            return asyncio.create_task(service.transcribe(path, OPTIONS, model="m", client=Client(client)))

        greedy = [ask("0.1 " * 10, "a") for _ in range(5)]
        await asyncio.sleep(0.01)
        assert backend.running == {1: most}
        other = ask("0.2", "b")
        await asyncio.sleep(0.01)
        assert backend.running == {1: most, 2: 1}
        backend.may_answer.set()
        await asyncio.gather(*greedy, other)

    asyncio.run(run())


class HearingBackend:
    """Finds the language of chunks of which none is said, and notes the seconds of each chunk and what is asked."""

    def __init__(self, *, fails: bool = False) -> None:
        self._fails = fails
        self.asked: list[tuple[float, str | None]] = []

    async def model_info(self) -> ModelInfo:
        return ModelInfo("m", None, supports_context=False, supports_word_timestamps=False, finds_language=True)

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[FoundLanguage | Segment, None]:
        self.asked.append((chunk.clip.duration_s, options.language))
        if options.language is None:
            await asyncio.sleep(0.01)
            if self._fails:
                raise MemoryError
            yield FoundLanguage("de")
        yield Segment(0.0, 1.0, "word")


def test_the_longest_of_the_first_chunks_tells_the_language_to_all():
    found = TranscriptionOptions(finds_language=True)
    for options, asked in (
        (found, [(5.0, None), (1.0, "de"), (2.0, "de"), (9.0, "de")]),
        (replace(found, language="vi"), [(1.0, "vi"), (5.0, "vi"), (2.0, "vi"), (9.0, "vi")]),
    ):
        backend = HearingBackend()
        transcript = asyncio.run(make_service(backend).transcribe("1 5 2 2 9", options, model="m"))
        assert transcript.language == (options.language or "de")
        assert set(backend.asked) == set(asked)
        assert backend.asked[0] == asked[0]
        assert len(transcript.segments) == len(backend.asked) == 5
    with pytest.raises(MemoryError):
        asyncio.run(make_service(HearingBackend(fails=True)).transcribe("1 5 2", found, model="m"))
    assert asyncio.run(make_service(HearingBackend()).transcribe("", found, model="m")).language is None
