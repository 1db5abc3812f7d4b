"""What an ingress makes of engines that die, and a proxy of an ingress that does; the real kills are in test_serve_faults.py."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RayServeException

from graft.audio.chunking import Chunk
from graft.audio.clip import AudioClip
from graft.errors import AudioError, ModelError
from graft.inference.transcript import Segment
from serve.backends.ray_handle import ModelChanged, RayBackend
from serve.http.proxy_middleware import ProxyErrorMiddleware
from serve.service import UNHEARD, ModelInfo, NotReady, TranscriptionOptions

CHUNK = Chunk(0.0, AudioClip(np.zeros(16_000, np.float32)))
SEGMENT = Segment(0.0, 1.0, "one two three")
DEATH = ActorDiedError()
ABOUT, NEWER = (ModelInfo(name, "en", takes_context=False, times_words=False) for name in ("m", "newer"))


def remote_error(cause: Exception) -> Exception:
    """As Ray raises what a replica has raised: with the traceback there in its message."""
    return RayTaskError("hear", f"Traceback: File /home/engine.py\n{cause}", cause).as_instanceof_cause()


class Engines:
    """In place of a DeploymentHandle: each call is answered by the next engine of a list, by what it says or how it dies."""

    def __init__(self, *calls: Any) -> None:
        self._calls = list(calls)
        self.hear = self.about = self

    def options(self, *, stream: bool) -> "Engines":
        return self

    def remote(self, *arguments: Any, **options: Any) -> Any:
        said = self._calls.pop(0)
        return Saying(said) if isinstance(said, list) else self._told(said)

    async def _told(self, said: Any) -> Any:
        if isinstance(said, Exception):
            raise said
        return await said.wait() if isinstance(said, asyncio.Event) else said


class Saying:
    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[Any]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def cancel(self) -> None:
        pass


def heard(*engines: list[Any]) -> list[Any]:
    async def run() -> list[Any]:
        return [part async for part in RayBackend(Engines(*engines)).hear(CHUNK, TranscriptionOptions(), stream=True)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "engines",
    [
        [["one", " two", " three", SEGMENT]],
        [[DEATH], ["one", " two", " three", SEGMENT]],
        [["one", " two", DEATH], ["one", " two", " three", SEGMENT]],
        [["one", " two", DEATH], ["one two three", SEGMENT]],
        [["one", " two", " three", DEATH], ["one", " two", " three", SEGMENT]],
    ],
    ids=["lives", "died before", "died within", "other parts", "died after"],
)
def test_each_text_is_told_once(engines):
    *parts, segment = heard(*engines)
    assert ("".join(parts), segment) == ("one two three", SEGMENT)


def test_two_engines_are_enough():
    with pytest.raises(NotReady):
        heard(["one", DEATH], [DEATH], ["one", " two", " three", SEGMENT])


@pytest.mark.parametrize(
    "again", [["once", SEGMENT], ["one", Segment(0.0, 1.0, "one")]], ids=["other words", "fewer words"]
)
def test_a_text_that_is_told_is_not_told_otherwise(again):
    with pytest.raises(ModelChanged):
        heard(["one", " two", DEATH], again)


def test_who_has_just_died_is_not_asked_about_the_model():
    listener = RayBackend(Engines(DEATH, ABOUT))

    async def run() -> list[ModelInfo]:
        return await asyncio.gather(*(listener.about() for _ in range(5)))

    assert asyncio.run(run()) == [ABOUT] * 5
    with pytest.raises(NotReady):
        asyncio.run(RayBackend(Engines(DEATH, DEATH)).about())


@pytest.mark.parametrize(
    "then", [asyncio.Event(), DEATH, RayServeException(), remote_error(NotReady())], ids=["busy", "dead", "none", "new"]
)
def test_while_no_engine_tells_the_model_is_what_it_was(monkeypatch, then):
    monkeypatch.setattr("serve.backends.ray_handle.FRESH_S", 0.0)

    async def run() -> None:
        listener = RayBackend(Engines(ABOUT, then, *[DEATH] * 20))
        for _ in range(5):
            async with asyncio.timeout(1):  # nobody waits for what is known
                assert await listener.about() == ABOUT
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_the_model_is_asked_for_again_and_by_one_for_all(monkeypatch):
    monkeypatch.setattr("serve.backends.ray_handle.FRESH_S", 0.0)

    async def run() -> None:
        listener = RayBackend(Engines(ABOUT, NEWER))
        first = asyncio.create_task(listener.about())
        others = [asyncio.create_task(listener.about()) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()  # the others do not depend on whoever made it ask
        assert await asyncio.gather(*others) == [ABOUT] * 5
        await listener.about()
        await asyncio.sleep(0.01)
        assert listener._about == NEWER

    asyncio.run(run())


def test_where_no_engine_tells_what_it_is_there_is_none(monkeypatch):
    monkeypatch.setattr("serve.backends.ray_handle.PATIENCE_S", 0.2)

    async def run() -> list[BaseException]:
        listener = RayBackend(Engines(asyncio.Event()))
        async with asyncio.timeout(1):  # they wait side by side
            return await asyncio.gather(*(listener.about() for _ in range(10)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(run())] == [NotReady] * 10
    for error in (RayServeException(), remote_error(NotReady())):
        with pytest.raises(NotReady):
            asyncio.run(RayBackend(Engines(error)).about())


@pytest.mark.parametrize(
    "cause", [AudioError("file: too loud"), ModelError("too many words"), ValueError("of the engine")], ids=repr
)
def test_what_goes_wrong_in_an_engine_is_told_as_it_was(cause):
    error = remote_error(cause)
    assert "/home/engine.py" in str(error)
    with pytest.raises(type(cause)) as raised:
        heard(["one", error])
    assert raised.value is cause
    assert raised.value.__cause__ is None


def test_where_no_engine_takes_a_chunk_the_service_is_not_ready():
    with pytest.raises(NotReady):
        heard([RayServeException("no replica")])


def test_a_chunk_without_a_segment_is_an_error():
    with pytest.raises(RuntimeError, match=UNHEARD):
        heard(["one"])


def asked(*messages: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer of an application that sends messages and breaks off."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(ProxyErrorMiddleware(application)), base_url="http://test"
        ) as client:
            return await client.get("/", headers=headers)

    return asyncio.run(run())


def start(kind: str, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_an_answer_that_never_began_is_to_be_asked_for_again():
    answer = asked(headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["Retry-After"], answer.headers["X-Request-Id"]) == (503, "1", "mine")
    assert answer.json()["error"]["type"] == "server_error"
    assert "X-Request-Id" not in asked().headers


@pytest.mark.parametrize(
    ("status", "kind", "retry"),
    [
        (404, "invalid_request_error", None),
        (408, "server_error", None),
        (429, "rate_limit_error", "1"),
        (500, "server_error", None),
        (503, "server_error", "1"),
    ],
)
def test_what_ray_refuses_is_told_as_all_else(status, kind, retry):
    answer = asked(start("text/plain; charset=utf-8", status), body(b"Request 7 ", more=True), body(b"timed out"))
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["type"] == kind
    assert "Request 7" not in answer.text


def test_what_the_api_says_is_let_through():
    assert asked(start("text/plain"), body(b"a text\n")).text == "a text\n"
    refused = asked(start("application/json", 429), body(b'{"error": 1}'))
    assert (refused.status_code, refused.json()) == (429, {"error": 1})


def test_a_stream_that_broke_off_ends_with_an_error():
    events = [start("text/event-stream; charset=utf-8"), body(b"data: {}\n\n", more=True)]
    first, last = asked(*events).text.strip().split("\n\n")
    assert first == "data: {}"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert asked(*events, body(b"")).text == "data: {}\n\n"
    assert asked(start("application/json"), body(b"{}")).text == "{}"
