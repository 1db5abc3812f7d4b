"""Report requests to an Observer and, with their ids, to the log, which Ray Serve writes (one JSON object a line)."""

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("graft.serve")
CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics of a request whose client left before the response began."""


class Observer:
    """Receives events of requests and ignores them; serve/metrics.py turns them into metrics."""

    def on_response(self, endpoint: str, status: int, seconds: float) -> None:
        """A request to an endpoint ended, with a complete response or because its client left (status 499)."""

    def on_first_text(self, seconds: float) -> None:
        """A streamed transcription produced its first text, so many seconds after its request."""

    def on_transcript(self, audio_s: float, seconds: float) -> None:
        """An upload of `audio_s` seconds was transcribed completely within `seconds`."""


class RequestLogMiddleware:
    """ASGI middleware that gives each request an id, the client's X-Request-Id or a new one, and logs its end.

    The response carries the id too, unless `sends_id` is false: Ray Serve's proxies add the header themselves.
    """

    def __init__(self, app: ASGIApp, observer: Observer, *, sends_id: bool = True) -> None:
        self._app = app
        self._observer = observer
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("ascii", "replace")
        request_id = given if re.fullmatch(r"[\w.-]{1,100}", given) else uuid.uuid4().hex
        start, status, has_left = time.monotonic(), CLIENT_CLOSED_REQUEST, False

        async def watched_receive() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or message["type"] == "http.disconnect"
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = CLIENT_CLOSED_REQUEST if has_left else message["status"]
                if self._sends_id:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        except Exception:  # the server that runs this application answers it with 500
            status = 500
            raise
        finally:
            seconds = time.monotonic() - start
            # The route's template, not the requested path, so that metrics have few distinct labels.
            self._observer.on_response(getattr(scope.get("route"), "path", "other"), status, seconds)
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            LOG.info("%(method)s %(path)s %(status)s", fields, extra=fields | {"seconds": round(seconds, 3)})


class RayServeHandler(logging.Handler):
    """Passes records to Ray Serve's logger, which adds request id, replica and application and writes them to files."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("ray.serve").handle(record)


def log_through_ray_serve() -> None:
    """Send what graft logs in this process to Ray Serve's log files."""
    logger = logging.getLogger("graft")
    logger.handlers = [RayServeHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
