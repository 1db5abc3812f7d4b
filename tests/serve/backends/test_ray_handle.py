"""RayBackend over engine replicas that die, are busy or raise; tests/serve/test_faults.py kills real ones."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RayServeException

from graft.audio.chunking import Chunk
from graft.audio.clip import AudioClip
from graft.errors import AudioError, ModelError
from graft.inference.transcript import Segment
from serve.backends.ray_handle import ModelChanged, RayBackend
from serve.service import NO_SEGMENT, ModelInfo, ModelNotReady, TranscriptionOptions

CHUNK = Chunk(0.0, AudioClip(np.zeros(16_000, np.float32)))
SEGMENT = Segment(0.0, 1.0, "one two three")
DEATH = ActorDiedError()
INFO, NEWER_INFO = (
    ModelInfo(name, "en", supports_context=False, supports_word_timestamps=False) for name in ("m", "newer")
)


def remote_error(cause: Exception) -> Exception:
    """Wrap an exception of a replica as Ray does, with the replica's traceback in the message."""
    message = f"Traceback: File /home/engine.py\n{cause}"
    return RayTaskError("transcribe_chunk", message, cause).as_instanceof_cause()


class FakeHandle:
    """Stands in for a DeploymentHandle: each call gets the next of the given results, a list of parts or one value.

    An exception among the results is raised, and an event is waited for.
    """

    def __init__(self, *results: Any) -> None:
        self._results = list(results)
        self.transcribe_chunk = self.model_info = self

    def options(self, *, stream: bool) -> "FakeHandle":
        return self

    def remote(self, *arguments: Any, **options: Any) -> Any:
        result = self._results.pop(0)
        return FakeStream(result) if isinstance(result, list) else self._resolve(result)

    async def _resolve(self, result: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return await result.wait() if isinstance(result, asyncio.Event) else result


class FakeStream:
    """Stands in for the streaming response of a handle."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[Any]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def cancel(self) -> None:
        pass


def transcribe(*attempts: list[Any]) -> list[Any]:
    """Return what RayBackend yields where the replicas' attempts at a chunk have these parts."""

    async def run() -> list[Any]:
        backend = RayBackend(FakeHandle(*attempts))
        return [part async for part in backend.transcribe_chunk(CHUNK, TranscriptionOptions(), stream=True)]

    return asyncio.run(run())


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


def test_model_info_is_requested_again_where_a_replica_has_just_died():
    backend = RayBackend(FakeHandle(DEATH, INFO))

    async def run() -> list[ModelInfo]:
        return await asyncio.gather(*(backend.model_info() for _ in range(5)))

    assert asyncio.run(run()) == [INFO] * 5
    with pytest.raises(ModelNotReady):
        asyncio.run(RayBackend(FakeHandle(DEATH, DEATH)).model_info())


@pytest.mark.parametrize(
    "then",
    [asyncio.Event(), DEATH, RayServeException(), remote_error(ModelNotReady())],
    ids=["busy", "dead", "none", "new"],
)
def test_a_known_model_info_is_returned_at_once_while_no_replica_answers(monkeypatch, then):
    monkeypatch.setattr("serve.backends.ray_handle.INFO_MAX_AGE_S", 0.0)

    async def run() -> None:
        backend = RayBackend(FakeHandle(INFO, then, *[DEATH] * 20))
        for _ in range(5):
            async with asyncio.timeout(1):
                assert await backend.model_info() == INFO
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_model_info_is_refreshed_by_one_request_for_all_callers(monkeypatch):
    monkeypatch.setattr("serve.backends.ray_handle.INFO_MAX_AGE_S", 0.0)

    async def run() -> None:
        backend = RayBackend(FakeHandle(INFO, NEWER_INFO))
        first = asyncio.create_task(backend.model_info())
        others = [asyncio.create_task(backend.model_info()) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()  # it has started the request, on which the others do not depend
        assert await asyncio.gather(*others) == [INFO] * 5
        await backend.model_info()
        await asyncio.sleep(0.01)
        assert backend._info == NEWER_INFO

    asyncio.run(run())


def test_without_any_model_info_the_model_is_not_ready(monkeypatch):
    monkeypatch.setattr("serve.backends.ray_handle.INFO_TIMEOUT_S", 0.2)

    async def run() -> list[BaseException]:
        backend = RayBackend(FakeHandle(asyncio.Event()))
        async with asyncio.timeout(1):  # the callers wait together, not in turn
            return await asyncio.gather(*(backend.model_info() for _ in range(10)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(run())] == [ModelNotReady] * 10
    for error in (RayServeException(), remote_error(ModelNotReady())):
        with pytest.raises(ModelNotReady):
            asyncio.run(RayBackend(FakeHandle(error)).model_info())


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
