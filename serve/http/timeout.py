"""Bound the time of a request, wherever it is spent."""

import asyncio
import contextlib

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..logs import LOG
from .schema import TIMED_OUT, ErrorResponse, format_event

LAST_EVENT_S = 5.0
"""Seconds in which a client must take the event that ends its stream."""


class TimeoutMiddleware:
    """ASGI middleware that cancels a request after `timeout_s` seconds; None is no limit.

    The client gets a 408, or an error event where its event stream has begun. Another response that has begun ends
    where it is.
    """

    def __init__(self, app: ASGIApp, timeout_s: float | None) -> None:
        self._app, self._timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = is_stream = False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun, is_stream
            if message["type"] == "http.response.start":
                content_type = dict(message.get("headers", [])).get(b"content-type", b"")
                has_begun, is_stream = True, content_type.startswith(b"text/event-stream")
            await send(message)

        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                await self._app(scope, receive, watched_send)
        except TimeoutError:
            if not limit.expired():
                raise
            LOG.warning("a request took longer than %g s", self._timeout_s)
            error = ErrorResponse(error=TIMED_OUT).model_dump()
            if not has_begun:
                await JSONResponse(error, 408)(scope, receive, send)
            elif is_stream:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_EVENT_S):
                        await send({"type": "http.response.body", "body": format_event(error)})
