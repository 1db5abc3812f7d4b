"""What the service tells of itself: a record for each request, with its id, as Ray Serve writes records (JSON, a line each)."""

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .observer import Observer

LOG = logging.getLogger("graft.serve")
GONE = 499
"""The status of a request whose client left before its answer began."""


class RequestLog:
    """ASGI middleware: each request has an id, its own (X-Request-Id) or a new one, and is told of when it is answered.

    The answer has the id too, unless `tells_id` is false: Ray Serve's proxies add it by themselves.
    """

    def __init__(self, app: ASGIApp, observer: Observer, *, tells_id: bool = True) -> None:
        self._app = app
        self._observer = observer
        self._tells_id = tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("ascii", "replace")
        request_id = given if re.fullmatch(r"[\w.-]{1,100}", given) else uuid.uuid4().hex
        start, status, has_left = time.monotonic(), GONE, False

        async def received() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or message["type"] == "http.disconnect"
            return message

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = GONE if has_left else message["status"]
                if self._tells_id:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, received, answered)
        except Exception:  # answered further out
            status = 500
            raise
        finally:
            seconds = time.monotonic() - start
            self._observer.answered(_endpoint(scope), status, seconds)
            told = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            LOG.info("%(method)s %(path)s %(status)s", told, extra=told | {"seconds": round(seconds, 3)})


def _endpoint(scope: Scope) -> str:
    """The address as the API declares it: there are few of these, whatever is asked for."""
    return getattr(scope.get("route"), "path", "other")


class ToServe(logging.Handler):
    """Hands records to Ray Serve, which adds the request's id, the replica and the application, and writes them to its files."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("ray.serve").handle(record)


def log_through_serve() -> None:
    """Have what graft logs in this replica written by Ray Serve."""
    logger = logging.getLogger("graft")
    logger.handlers = [ToServe()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
