"""At Ray Serve's proxies, which outlive what stands behind them: the last word of an answer whose ingress died, and of what Ray refuses.

RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.http.proxy_middleware:middlewares has it loaded, where it is set before Ray starts. Without it, such an
answer is a bare 500, such a stream is cut off, and what Ray refuses (an unknown address, a request that takes too long or finds no ingress)
is told as plain text.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .schema import Fault, FaultAnswer, event

EVENTS, PLAIN = b"text/event-stream", b"text/plain"
CUT_OFF = FaultAnswer(
    error=Fault(message="the server failed on this request: try again", type="server_error", code="cut_off")
)
NOTHING_THERE = FaultAnswer(error=Fault(message="nothing is served at this address"))
TOO_SLOW = FaultAnswer(
    error=Fault(message="the server took too long: cut the audio, or try again", type="server_error", code="timeout")
)

TOO_MANY = FaultAnswer(
    error=Fault(
        message="too many requests are waiting: try again in 1 s", type="rate_limit_error", code="rate_limit_exceeded"
    )
)
TOLD = {404: NOTHING_THERE, 408: TOO_SLOW, 429: TOO_MANY}


def middlewares() -> list[Middleware]:
    """What the proxies put before their own."""
    return [Middleware(ProxyErrorMiddleware)]


class ProxyErrorMiddleware:
    """ASGI middleware: an answer that never began is a 503 with Retry-After, a stream of events that broke off ends with an error event.

    Refusals in plain text are Ray's own (the API's are JSON): they keep their status, and are told in OpenAI's shape.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = is_whole = is_stream = False
        refused = 503

        async def sent(message: Message) -> None:
            nonlocal has_begun, is_whole, is_stream, refused
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", [])).get(b"content-type", b"")
                if message["status"] >= 400 and kind.startswith(PLAIN):
                    refused = message["status"]
                    return
                has_begun, is_stream = True, kind.startswith(EVENTS)
            elif message["type"] == "http.response.body":
                is_whole = not message.get("more_body", False)
            if has_begun:
                await send(message)

        await self._app(scope, receive, sent)
        if not has_begun:
            await _refusal(scope, refused)(scope, receive, send)
        elif is_stream and not is_whole:
            await send({"type": "http.response.body", "body": event(CUT_OFF)})


def _refusal(scope: Scope, status: int) -> JSONResponse:
    """An answer with the request's id, which is the client's own or one that Ray put there."""
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if (id := dict(scope["headers"]).get(b"x-request-id")) is not None:
        headers["X-Request-Id"] = id.decode("latin-1")
    return JSONResponse(TOLD.get(status, CUT_OFF).model_dump(), status, headers)
