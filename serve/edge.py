"""At Ray Serve's proxies, which outlive what stands behind them: the last word of an answer whose ingress died.

RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.edge:middlewares has it loaded, where it is set before Ray starts. Without it, such an
answer is a bare 500, and such a stream is cut off.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.schema import Fault, FaultAnswer, event

EVENTS = b"text/event-stream"
CUT_OFF = FaultAnswer(error=Fault(message="the server failed on this request: try again", type="server_error", code="cut_off"))


def middlewares() -> list[Middleware]:
    """What the proxies put before their own."""
    return [Middleware(LastWord)]


class LastWord:
    """ASGI middleware: an answer that never began is a 503 with Retry-After, a stream of events that broke off ends with an error event."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = is_whole = is_stream = False

        async def sent(message: Message) -> None:
            nonlocal has_begun, is_whole, is_stream
            if message["type"] == "http.response.start":
                has_begun, is_stream = True, dict(message.get("headers", [])).get(b"content-type", b"").startswith(EVENTS)
            elif message["type"] == "http.response.body":
                is_whole = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, sent)
        if not has_begun:
            await JSONResponse(CUT_OFF.model_dump(), 503, {"Retry-After": "1"})(scope, receive, send)
        elif is_stream and not is_whole:
            await send({"type": "http.response.body", "body": event(CUT_OFF)})
