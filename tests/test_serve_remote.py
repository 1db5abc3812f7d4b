"""What an ingress makes of engines that die, and a proxy of an ingress that does; the real kills are in test_serve_faults.py."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from graft.audio import AudioClip
from graft.chunking import Chunk
from graft.transcript import Segment
from serve.edge import LastWord
from serve.remote import HeardOtherwise, RemoteListener
from serve.service import About, Asked, NotReady

CHUNK = Chunk(0.0, AudioClip(np.zeros(16_000, np.float32)))
SEGMENT = Segment(0.0, 1.0, "one two three")
DEATH = ActorDiedError()


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
        return [part async for part in RemoteListener(Engines(*engines)).hear(CHUNK, Asked(), stream=True)]

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


@pytest.mark.parametrize("again", [["once", SEGMENT], ["one", Segment(0.0, 1.0, "one")]], ids=["other words", "fewer words"])
def test_a_text_that_is_told_is_not_told_otherwise(again):
    with pytest.raises(HeardOtherwise):
        heard(["one", " two", DEATH], again)


def test_who_has_just_died_is_not_asked_about_the_model():
    about = About("m", "en", takes_context=False, times_words=False)
    listener = RemoteListener(Engines(DEATH, about))

    async def run() -> list[About]:
        return await asyncio.gather(*(listener.about() for _ in range(5)))

    assert asyncio.run(run()) == [about] * 5
    with pytest.raises(NotReady):
        asyncio.run(RemoteListener(Engines(DEATH, DEATH)).about())


def test_while_engines_are_busy_the_model_is_what_it_was(monkeypatch):
    monkeypatch.setattr("serve.remote.FRESH_S", 0.0)
    monkeypatch.setattr("serve.remote.PATIENCE_S", 0.01)
    about = About("m", "en", takes_context=False, times_words=False)

    async def run() -> About:
        listener = RemoteListener(Engines(about, asyncio.Event()))
        await listener.about()
        return await listener.about()

    assert asyncio.run(run()) == about
    with pytest.raises(NotReady):
        asyncio.run(RemoteListener(Engines(asyncio.Event())).about())


def asked(*messages: dict[str, Any]) -> httpx.Response:
    """The answer of an application that sends messages and breaks off."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(LastWord(application)), base_url="http://test") as client:
            return await client.get("/")

    return asyncio.run(run())


def start(kind: str) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def test_an_answer_that_never_began_is_to_be_asked_for_again():
    answer = asked()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"]["type"] == "server_error"


def test_a_stream_that_broke_off_ends_with_an_error():
    events = [start("text/event-stream; charset=utf-8"), {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}]
    first, last = asked(*events).text.strip().split("\n\n")
    assert first == "data: {}"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    whole = {"type": "http.response.body", "body": b"", "more_body": False}
    assert asked(*events, whole).text == "data: {}\n\n"
    assert asked(start("application/json"), whole | {"body": b"{}"}).text == "{}"
