"""The middlewares without a server: a cancelled request ends, even where the cancellation comes with a message."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from serve.http.middleware import AccessMiddleware, ApiKeys, RequestMiddleware
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
