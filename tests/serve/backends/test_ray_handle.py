"""RayBackend over engine replicas that die, are busy or raise; tests/serve/test_faults.py kills real ones."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RayServeException

from graft.audio.chunking import Chunk
from graft.audio.clip import AudioClip
from graft.errors import AudioError, ModelError
from graft.inference.segments import ScoredToken, Segment
from serve.backends import ray_handle
from serve.backends.ray_handle import ModelChanged, RayBackend
from serve.service import NO_SEGMENT, ModelInfo, ModelNotReady, ReplicaModel, TranscriptionOptions

CHUNK = Chunk(0.0, AudioClip(np.zeros(16_000, np.float32)))
SEGMENT = Segment(0.0, 1.0, "one two three")
DEATH = ActorDiedError()


def remote_error(cause: Exception) -> Exception:
    """Wrap an exception of a replica as Ray does, with the replica's traceback in the message."""
    message = f"Traceback: File /home/engine.py\n{cause}"
    return RayTaskError("transcribe_chunk", message, cause).as_instanceof_cause()


class FakeActor:
    """Stands in for a replica's actor: each question gets the next of the given results, and the last one for ever.

    An exception among the results is raised, and an event is waited for.
    """

    def __init__(self, *results: Any) -> None:
        self._results = list(results)
        self.__ray_call__ = self

    def remote(self, function: Callable[[Any], Any]) -> Coroutine[None, None, Any]:
        return resolve(self._results.pop(0) if len(self._results) > 1 else self._results[0])


async def resolve(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return await result.wait() if isinstance(result, asyncio.Event) else result


class FakeHandle:
    """Stands in for a DeploymentHandle: a broadcast finds the replicas that are given now, an exception, or waits.

    Each chunk gets the next of the given lists of parts.
    """

    def __init__(self, *chunks: list[Any], replicas: Any = ()) -> None:
        self._chunks, self.replicas = list(chunks), replicas
        self.transcribe_chunk = self

    def options(self, *, stream: bool) -> "FakeHandle":
        return self

    def remote(self, *arguments: Any, **options: Any) -> "FakeStream":
        return FakeStream(self._chunks.pop(0))

    def broadcast(self, method: str) -> "FakeHandle":
        assert method == "replica"
        return self

    async def results_async(self, *, return_exceptions: bool) -> list[Any]:
        found = await resolve(self.replicas)
        return list(found.items()) if isinstance(found, dict) else found


class FakeStream:
    """Stands in for the streaming response of a handle."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[Any]:
        for part in self._parts:
            yield await resolve(part)

    def cancel(self) -> None:
        pass


def transcribe(*attempts: list[Any]) -> list[Any]:
    """Return what RayBackend yields where the replicas' attempts at a chunk have these parts."""

    async def run() -> list[Any]:
        backend = RayBackend(FakeHandle(*attempts))
        return [part async for part in backend.transcribe_chunk(CHUNK, TranscriptionOptions(), stream=True)]

    return asyncio.run(run())


def test_a_second_attempt_sends_only_the_tokens_that_the_first_did_not():
    tokens = [ScoredToken(data, -0.1) for data in (b"one", b" two", b" three")]
    parts = [tokens[0], "one", tokens[1], " two", tokens[2], " three", SEGMENT]
    assert transcribe(parts) == parts
    for length in range(len(parts)):
        assert transcribe([*parts[:length], DEATH], parts) == parts


@pytest.mark.parametrize(
    "attempts",
    [
        [["one", " two", " three", SEGMENT]],
        [[DEATH], ["one", " two", " three", SEGMENT]],
        [["one", " two", DEATH], ["one", " two", " three", SEGMENT]],
        [["one", " two", DEATH], ["one two three", SEGMENT]],
        [["one", " two", " three", DEATH], ["one", " two", " three", SEGMENT]],
    ],
    ids=["lives", "died before", "died within", "other parts", "died after"],
)
def test_each_text_is_sent_once(attempts):
    *parts, segment = transcribe(*attempts)
    assert ("".join(parts), segment) == ("one two three", SEGMENT)


def test_a_chunk_is_not_sent_to_a_third_replica():
    with pytest.raises(ModelNotReady):
        transcribe(["one", DEATH], [DEATH], ["one", " two", " three", SEGMENT])


@pytest.mark.parametrize(
    "second", [["once", SEGMENT], ["one", Segment(0.0, 1.0, "one")]], ids=["other words", "fewer words"]
)
def test_a_second_attempt_with_another_text_is_an_error(second):
    with pytest.raises(ModelChanged):
        transcribe(["one", " two", DEATH], second)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all waiting fifty times as short, and that of chunks two hundred times."""
    for name in ("ASK_PERIOD_S", "ANSWER_TIMEOUT_S", "FIRST_ANSWER_TIMEOUT_S", "MAX_SILENCE_S", "MAX_WAIT_S"):
        monkeypatch.setattr(ray_handle, name, getattr(ray_handle, name) / (200 if name == "MAX_WAIT_S" else 50))


def info_of(name: str, *, replica: str = "a", context: bool = True) -> ModelInfo:
    return ModelInfo(name, "en", context, True, (ReplicaModel(replica, name, "digest"),))


def test_what_all_replicas_tell_is_joined(quick: None) -> None:
    async def run() -> None:
        replicas = {"a": FakeActor(info_of("m")), "b": FakeActor(info_of("m", replica="b", context=False))}
        backend = RayBackend(FakeHandle(replicas=replicas))
        first, *others = await asyncio.gather(*(backend.model_info() for _ in range(5)))
        assert {info.name for info in (first, *others)} == {"m"}
        await asyncio.sleep(0.1)
        info = await backend.model_info()
        assert [one.replica for one in info.replicas] == ["a", "b"]
        assert (info.supports_context, info.supports_word_timestamps) == (False, True)

    asyncio.run(run())


def test_a_change_is_seen_at_the_next_question(quick: None) -> None:
    async def run() -> None:
        backend = RayBackend(FakeHandle(replicas={"a": FakeActor(info_of("m"), info_of("newer"))}))
        assert await backend.model_info() == info_of("m")
        await asyncio.sleep(0.1)
        assert await backend.model_info() == info_of("newer")

    asyncio.run(run())


@pytest.mark.parametrize("then", [DEATH, asyncio.Event(), RayServeException()], ids=["dead", "hanging", "no answer"])
def test_without_an_answer_for_ten_seconds_requests_are_refused(quick: None, then: Any) -> None:
    async def run() -> None:
        handle = FakeHandle(replicas={"a": FakeActor(info_of("m"), then)})
        backend = RayBackend(handle)
        assert await backend.model_info() == info_of("m")
        handle.replicas = RayServeException("none")
        await asyncio.sleep(ray_handle.MAX_SILENCE_S / 2)
        assert await backend.model_info() == info_of("m")  # a short outage is not told
        await asyncio.sleep(ray_handle.MAX_SILENCE_S)
        for _ in range(3):
            async with asyncio.timeout(0.05):
                with pytest.raises(ModelNotReady):
                    await backend.model_info()
        handle.replicas = {"b": FakeActor(info_of("m", replica="b"))}
        await asyncio.sleep(0.2)
        assert await backend.model_info() == info_of("m", replica="b")

    asyncio.run(run())


@pytest.mark.seconds
def test_a_replica_that_takes_no_more_calls_stays_ready(quick: None) -> None:
    """A broadcast waits while a replica has as many chunks as it takes, and finds none while it changes its model."""

    async def run() -> None:
        handle = FakeHandle(replicas={"a": FakeActor(info_of("m"))})
        backend = RayBackend(handle)
        for replicas in ({"a": FakeActor(info_of("m"))}, asyncio.Event(), RayServeException("none")):
            handle.replicas = replicas
            await asyncio.sleep(2 * ray_handle.MAX_SILENCE_S)
            assert await backend.model_info() == info_of("m")

    asyncio.run(run())


def test_a_dead_replica_is_not_listed_beside_one_that_lives(quick: None) -> None:
    async def run() -> None:
        replicas = {"a": FakeActor(info_of("m"), DEATH), "b": FakeActor(info_of("m", replica="b"))}
        handle = FakeHandle(replicas=replicas)
        backend = RayBackend(handle)
        await backend.model_info()
        handle.replicas = {"b": replicas["b"]}
        await asyncio.sleep(0.1)
        assert await backend.model_info() == info_of("m", replica="b")

    asyncio.run(run())


def test_a_part_of_a_chunk_is_an_answer_too(quick: None) -> None:
    """A replica that starts may transcribe a chunk that waits before it is found and asked."""

    async def run() -> None:
        handle = FakeHandle([SEGMENT], replicas={"a": FakeActor(info_of("m"), DEATH)})
        backend = RayBackend(handle)
        await backend.model_info()
        handle.replicas = RayServeException("none")
        await asyncio.sleep(2 * ray_handle.MAX_SILENCE_S)
        with pytest.raises(ModelNotReady):
            await backend.model_info()
        assert [part async for part in backend.transcribe_chunk(CHUNK, TranscriptionOptions(), stream=False)]
        assert await backend.model_info() == info_of("m")

    asyncio.run(run())


def test_a_chunk_that_waits_is_given_up_where_no_replica_answers(quick: None) -> None:
    async def run() -> None:
        handle = FakeHandle(["one", asyncio.Event()], [asyncio.Event()], replicas={"a": FakeActor(info_of("m"), DEATH)})
        backend = RayBackend(handle)
        await backend.model_info()
        handle.replicas = RayServeException("none")
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(ModelNotReady):
                [part async for part in backend.transcribe_chunk(CHUNK, TranscriptionOptions(), stream=True)]
        assert time.monotonic() - start < 2 * ray_handle.MAX_WAIT_S

    asyncio.run(run())


def test_a_chunk_that_waits_for_long_is_not_given_up_while_a_replica_answers(quick: None) -> None:
    async def run() -> None:
        backend = RayBackend(FakeHandle([asyncio.Event()], replicas={"a": FakeActor(info_of("m"))}))
        await backend.model_info()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * ray_handle.MAX_WAIT_S):
                [part async for part in backend.transcribe_chunk(CHUNK, TranscriptionOptions(), stream=False)]

    asyncio.run(run())


def test_without_any_answer_the_model_is_not_ready(quick: None) -> None:
    async def run(replicas: Any) -> list[BaseException]:
        backend = RayBackend(FakeHandle(replicas=replicas))
        async with asyncio.timeout(1):  # the callers wait together, not in turn
            return await asyncio.gather(*(backend.model_info() for _ in range(10)), return_exceptions=True)

    for replicas in (asyncio.Event(), RayServeException(), {"a": FakeActor(remote_error(ModelNotReady()))}, [DEATH]):
        assert [type(error) for error in asyncio.run(run(replicas))] == [ModelNotReady] * 10


@pytest.mark.parametrize(
    "cause", [AudioError("file: too loud"), ModelError("too many words"), ValueError("of the engine")], ids=repr
)
def test_an_exception_of_a_replica_is_raised_without_its_traceback(cause):
    error = remote_error(cause)
    assert "/home/engine.py" in str(error)
    with pytest.raises(type(cause)) as raised:
        transcribe(["one", error])
    assert raised.value is cause
    assert raised.value.__cause__ is None


def test_without_any_replica_the_model_is_not_ready():
    with pytest.raises(ModelNotReady):
        transcribe([RayServeException("no replica")])


def test_a_chunk_without_a_segment_is_an_error():
    with pytest.raises(RuntimeError, match=NO_SEGMENT):
        transcribe(["one"])
