"""The middlewares without a server: a cancelled request ends whenever that is, and so does one that takes too long."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.http.middleware import AccessMiddleware, ApiKeys, RequestMiddleware
from serve.http.timeout import TimeoutMiddleware
from serve.logs import Observer

SCOPE = {"type": "http", "method": "POST", "path": "/v1/audio/transcriptions", "headers": []}
BODY = {"type": "http.request", "body": b"", "more_body": False}


def test_a_request_ends_whenever_it_is_cancelled() -> None:
    """`asyncio.wait_for` of Python 3.11 drops a cancellation one turn after the message: the request would go on."""

    async def transcribe(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.Event().wait()

    async def run(turns: int) -> None:
        message: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def receive() -> Message:
            return await message

        async def send(_: Message) -> None: ...

        limits = {"max_arriving": 1, "max_bytes": 1, "max_s": 60, "min_bytes_per_s": 1}
        access = AccessMiddleware(transcribe, ApiKeys(), lambda client, arriving: None, **limits)
        request = asyncio.create_task(RequestMiddleware(access, Observer())(SCOPE, receive, send))
        await asyncio.sleep(0.01)
        message.set_result(BODY)
        for _ in range(turns):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request], timeout=1)
        assert request.cancelled(), turns

    for turns in range(5):
        asyncio.run(run(turns))


START = {"type": "http.response.start", "status": 200}


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        ([], [408, '{"error":{"message":"the request timed out']),
        ([START | {"headers": [(b"content-type", b"text/event-stream")]}], [200, 'data: {"error": {"message": "the']),
        ([START | {"headers": [(b"content-type", b"text/plain")]}], [200, ""]),
    ],
    ids=["not begun", "stream", "text"],
)
def test_a_request_that_takes_too_long_ends(sent: list[Message], answer: list[Any]) -> None:
    has_ended = False

    async def transcribe(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal has_ended
        for message in sent:
            await send(message)
        try:
            await asyncio.sleep(10)
        finally:
            has_ended = True

    async def run() -> list[Message]:
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        await TimeoutMiddleware(transcribe, 0.05)(SCOPE, asyncio.Event().wait, send)
        return messages

    start, *bodies = asyncio.run(run())
    body = b"".join(message["body"] for message in bodies).decode()
    assert has_ended
    assert start["status"] == answer[0]
    assert body.startswith(answer[1]), body
    assert ('"code":"timeout"' in body.replace(" ", "")) == bool(answer[1])


def test_a_timeout_inside_a_request_is_not_the_requests() -> None:
    async def transcribe(scope: Scope, receive: Receive, send: Send) -> None:
        raise TimeoutError("of something else")

    async def run() -> None:
        with pytest.raises(TimeoutError, match="something else"):
            await TimeoutMiddleware(transcribe, 60)(SCOPE, asyncio.Event().wait, asyncio.Event().wait)

    asyncio.run(run())
