"""Turn exceptions into error responses in OpenAI's shape, without paths, tracebacks or keys."""

import traceback
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from graft.errors import AudioError, AudioTooLong, ModelError

from ..service import ModelNotReady, ServiceBusy, ServiceStopping
from .schema import ErrorDetail, ErrorResponse, ErrorType

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The request is invalid, or asks for something that the model cannot do",
        401: "The API key is missing or unknown",
        404: "The model or the address does not exist",
        408: "The upload took too long to arrive",
        409: "The idempotency key belongs to another request",
        413: "The upload has too many bytes or seconds",
        429: "Too many requests are waiting; Retry-After says when to try again",
        500: "The server failed",
        503: "No model is loaded at the moment",
    }.items()
}
SERVER_ERROR = ErrorDetail(
    message="the server failed on this request: try again", type="server_error", code="internal_error"
)


EXPECTED = (HTTPException, RequestValidationError, AudioError, ModelError, ServiceBusy, ServiceStopping, ModelNotReady)
"""Exceptions that FastAPI's handlers answer by `error_response`; RequestMiddleware answers the rest."""


class ApiError(HTTPException):
    """An error that the client can correct."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: ErrorType = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.error = ErrorDetail(message=message, type=kind, param=param, code=code)


def error_response(error: Exception) -> JSONResponse:
    """Return the response to an exception; the status is 500 for one that is not expected."""
    status, detail, headers = _explain(error)
    return JSONResponse(ErrorResponse(error=detail).model_dump(), status_code=status, headers=headers)


def error_detail(error: Exception) -> dict[str, Any]:
    """Return what the response to an exception says, for an event."""
    return _explain(error)[1].model_dump()


def _explain(error: Exception) -> tuple[int, ErrorDetail, Mapping[str, str] | None]:
    """Return the status, the error and the headers that stand for an exception."""
    match error:
        case ApiError():
            return error.status_code, error.error, error.headers
        case HTTPException():
            return error.status_code, ErrorDetail(message=str(error.detail)), error.headers
        case RequestValidationError():
            return 400, _explain_validation(error), None
        case AudioTooLong():
            return 413, ErrorDetail(message=str(error), param="file", code="audio_too_long"), None
        case AudioError():
            return 400, ErrorDetail(message=str(error), param="file", code="invalid_audio"), None
        case ModelError():
            return 400, ErrorDetail(message=str(error), param="prompt", code="unsupported_value"), None
        case ServiceBusy():
            detail = ErrorDetail(
                message=f"{error}: try again in {error.retry_after_s} s",
                type="rate_limit_error",
                code="rate_limit_exceeded",
            )
            return 429, detail, {"Retry-After": str(error.retry_after_s)}
        case ServiceStopping():
            message = "the service is about to end: try again"
            return 503, ErrorDetail(message=message, type="server_error", code="stopping"), {"Retry-After": "10"}
        case ModelNotReady():
            message = "no model is loaded at the moment: try again"
            return 503, ErrorDetail(message=message, type="server_error", code="not_ready"), {"Retry-After": "5"}
    return 500, SERVER_ERROR, None


def describe_exception(error: BaseException) -> str:
    """Return an exception's class and origin, innermost first. Its message may hold paths or user data."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    places = [f"{frame.f_globals.get('__name__')}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' < '.join(places[:-6:-1])}"


def _explain_validation(error: RequestValidationError) -> ErrorDetail:
    first = error.errors()[0]
    names = [
        str(part) for part in first["loc"][1:] if isinstance(part, str)
    ]  # ("body", "timestamp_granularities[]", 0)
    param = names[0] if names else None
    message, code = f"{param}: {first['msg']}", "unsupported_value"
    match first["type"]:
        case "missing":
            message, code = f"the parameter {param!r} is missing", "missing_required_parameter"
        case "extra_forbidden":
            message, code = f"the parameter {param!r} is not supported", "unsupported_parameter"
        case "value_error" if param == "file":
            message = "file: send it as a part with a filename"
    return ErrorDetail(message=message, param=param, code=code)
