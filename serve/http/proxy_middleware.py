"""Complete the responses of failed ingress replicas, and translate Ray Serve's own errors, in Ray Serve's HTTP servers.

These are the server of each ingress replica, where HAProxy is the proxy, and Ray Serve's own proxies, of which there is
one beside HAProxy, for the time without ingress replicas.
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.http.proxy_middleware:middlewares loads it, if it is set before Ray
starts. Without it, what Ray Serve refuses itself (an unknown address, a request that times out) is plain text, clients'
headers reach Ray Serve unchecked, and behind Ray Serve's own proxies, a client whose ingress replica dies gets a bare
500 or a stream that breaks off.
"""

from collections.abc import Iterable, Iterator

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..logs import REQUEST_ID
from .schema import TIMED_OUT, ErrorDetail, ErrorResponse, format_event

CUT_OFF = ErrorDetail(message="the server failed on this request: try again", type="server_error", code="cut_off")
ERRORS_BY_STATUS = {
    404: ErrorDetail(message="nothing is served at this address"),
    408: TIMED_OUT,
    429: ErrorDetail(
        message="too many requests are waiting: try again in 1 s", type="rate_limit_error", code="rate_limit_exceeded"
    ),
}
STEERING_HEADERS = frozenset(
    {
        b"serve_multiplexed_model_id",
        b"x_session_id",
        b"x_request_timeout_seconds",
        b"x_request_disconnect_disabled",
    }
)
"""Headers, with underscores for hyphens, by which a client could route requests or lift their time limit."""


def middlewares() -> list[Middleware]:
    """Return the middlewares that Ray Serve adds to its proxies."""
    return [Middleware(ProxyErrorMiddleware)]


class ProxyErrorMiddleware:
    """ASGI middleware that sends a 503 where no response began, and an error event where an event stream breaks off.

    Errors in plain text are Ray Serve's (the API's are JSON). They keep their status and get OpenAI's shape. Headers
    that Ray Serve would act on, write into its logs or fail to decode are removed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": list(_harmless(scope["headers"]))}
        has_begun = is_complete = is_stream = False
        status = 503

        async def watched_send(message: Message) -> None:
            nonlocal has_begun, is_complete, is_stream, status
            if message["type"] == "http.response.start":
                content_type = dict(message.get("headers", [])).get(b"content-type", b"")
                if message["status"] >= 400 and content_type.startswith(b"text/plain"):
                    status = message["status"]  # an error of Ray Serve, which is replaced
                    return
                has_begun, is_stream = True, content_type.startswith(b"text/event-stream")
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)
            if has_begun:
                await send(message)

        await self._app(scope, receive, watched_send)
        error = ErrorResponse(error=ERRORS_BY_STATUS.get(status, CUT_OFF)).model_dump()
        if not has_begun:
            headers = {"Retry-After": "1"} if status in (429, 503) else {}
            # The client or Ray Serve has put the request's id into its headers.
            if (request_id := dict(scope["headers"]).get(b"x-request-id")) is not None:
                headers["X-Request-Id"] = request_id.decode("latin-1")
            await JSONResponse(error, status, headers)(scope, receive, send)
        elif is_stream and not is_complete:
            await send({"type": "http.response.body", "body": format_event(error)})


def _harmless(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield headers without those that steer Ray Serve, and with one request id at most, which may be logged."""
    has_id = False
    for name, value in headers:
        if name == b"x-request-id":
            if has_id or not REQUEST_ID.fullmatch(value.decode("latin-1")):
                continue
            has_id = True
        if name.replace(b"-", b"_") in STEERING_HEADERS or (name == b"traceparent" and not value.isascii()):
            continue
        yield name, value
