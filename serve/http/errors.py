"""What goes wrong, in OpenAI's shape: an answer for each exception that may reach the API, without paths, tracebacks or keys."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.errors import AudioError, AudioTooLong, ModelError

from ..logs import LOG
from ..service import Busy, NotReady
from .schema import Fault, FaultAnswer, FaultKind

FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": FaultAnswer, "description": "Something in the request is wrong, or not what the model can do"},
    401: {"model": FaultAnswer, "description": "The API key is missing or unknown"},
    404: {"model": FaultAnswer, "description": "The model, or the address, does not exist"},
    408: {"model": FaultAnswer, "description": "The upload took too long to come"},
    409: {"model": FaultAnswer, "description": "The idempotency key belongs to another request"},
    413: {"model": FaultAnswer, "description": "The upload has too many bytes or seconds"},
    429: {"model": FaultAnswer, "description": "Too many requests are waiting; Retry-After says when to ask again"},
    500: {"model": FaultAnswer, "description": "The server failed"},
    503: {"model": FaultAnswer, "description": "No model is loaded just now"},
}
SERVER_FAULT = Fault(message="the server failed on this request: try again", type="server_error", code="internal_error")


class Refusal(HTTPException):
    """A fault that is the client's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: FaultKind = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.fault = Fault(message=message, type=kind, param=param, code=code)


def answer_to(error: Exception) -> JSONResponse:
    """The answer that tells of an exception."""
    match error:
        case Refusal():
            return _answer(error.status_code, error.fault, error.headers)
        case HTTPException():
            return _answer(error.status_code, Fault(message=str(error.detail)), error.headers)
        case RequestValidationError():
            return _answer(400, _form_fault(error))
        case AudioTooLong():
            return _answer(413, Fault(message=str(error), param="file", code="audio_too_long"))
        case AudioError():
            return _answer(400, Fault(message=str(error), param="file", code="invalid_audio"))
        case ModelError():
            return _answer(400, Fault(message=str(error), param="prompt", code="unsupported_value"))
        case Busy():
            fault = Fault(
                message=f"{error}: try again in {error.retry_after_s} s",
                type="rate_limit_error",
                code="rate_limit_exceeded",
            )
            return _answer(429, fault, {"Retry-After": str(error.retry_after_s)})
        case NotReady():
            fault = Fault(message="no model is loaded just now: try again", type="server_error", code="not_ready")
            return _answer(503, fault, {"Retry-After": "5"})
    return _answer(500, SERVER_FAULT)


def handlers() -> dict[type[Exception], Callable[[Any, Any], JSONResponse]]:
    """For what is raised within the API; the rest is ErrorMiddleware's."""
    return dict.fromkeys(
        [HTTPException, RequestValidationError, AudioError, ModelError, Busy, NotReady],
        lambda _, error: answer_to(error),
    )


class ErrorMiddleware:
    """ASGI middleware: what nobody foresaw is answered with 500, and put in the log by its kind and place."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def sent(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            LOG.error("a request failed: %s", described(error))
            if has_begun or scope["type"] != "http":
                raise
            await answer_to(error)(scope, receive, send)


def described(error: BaseException) -> str:
    """An exception's kind and where it comes from, innermost first; not its message, in which paths and what users said may stand."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    places = [f"{frame.f_globals.get('__name__')}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' < '.join(places[:-6:-1])}"


def _form_fault(error: RequestValidationError) -> Fault:
    first = error.errors()[0]
    names = [str(part) for part in first["loc"][1:] if isinstance(part, str)]
    param = names[0] if names else None
    match first["type"]:
        case "missing":
            return Fault(message=f"the parameter {param!r} is missing", param=param, code="missing_required_parameter")
        case "extra_forbidden":
            return Fault(message=f"the parameter {param!r} is not supported", param=param, code="unsupported_parameter")
        case "value_error" if param == "file":
            return Fault(message="file: send it as a part with a filename", param=param, code="unsupported_value")
    return Fault(message=f"{param}: {first['msg']}", param=param, code="unsupported_value")


def _answer(status: int, fault: Fault, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(FaultAnswer(error=fault).model_dump(), status_code=status, headers=headers)
