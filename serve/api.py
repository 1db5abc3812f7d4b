"""The HTTP API over a Service, as OpenAI's clients expect it. Knows nothing of Ray: any ASGI server can run it.

POST /v1/audio/transcriptions    multipart upload -> JSON, text, subtitles, or events as the text comes
GET /v1/models                   the one model
GET /healthz, /readyz            whether the process lives; whether it can answer
GET /docs                        all of it, described
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, BinaryIO

from fastapi import Depends, FastAPI, Form, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.errors import AudioError, AudioTooLong, ModelError
from graft.subtitles import format_transcript
from graft.transcript import Transcript
from serve.answers import Answers, KeyReused
from serve.keys import Keys
from serve.schema import (
    DeltaEvent,
    DoneEvent,
    Fault,
    FaultAnswer,
    FaultKind,
    ModelCard,
    ModelList,
    TranscriptionAnswer,
    TranscriptionForm,
    VerboseAnswer,
    event,
    verbose,
)
from serve.service import About, Asked, Busy, NotReady, Service

FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": FaultAnswer, "description": "Something in the request is wrong, or not what the model can do"},
    401: {"model": FaultAnswer, "description": "The API key is missing or unknown"},
    404: {"model": FaultAnswer, "description": "The model, or the address, does not exist"},
    409: {"model": FaultAnswer, "description": "The idempotency key belongs to another request"},
    413: {"model": FaultAnswer, "description": "The upload has too many bytes or seconds"},
    429: {"model": FaultAnswer, "description": "Too many requests are waiting; Retry-After says when to ask again"},
    500: {"model": FaultAnswer, "description": "The server failed"},
    503: {"model": FaultAnswer, "description": "No model is loaded just now"},
}
TEXTS = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
_CONTENT: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in [*TEXTS.values(), "text/event-stream"]}
LOG = logging.getLogger("graft.serve")


class Refusal(StarletteHTTPException):
    """A fault that is the client's."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.fault = Fault(message=message, param=param, code=code)


def transcription_api(service: Service, *, keys: Keys, max_upload_bytes: int) -> FastAPI:
    """Put HTTP before a service. Faults come in OpenAI's shape, without tracebacks or paths."""
    api = FastAPI(title="graft", description="Speech to text behind OpenAI's transcription endpoint.")
    api.add_middleware(UploadLimit, max_bytes=max_upload_bytes)
    api.add_middleware(RequestLog)
    for kind, answer in _HANDLERS.items():
        api.exception_handler(kind)(answer)
    answers: Answers[Response] = Answers()
    bearer = HTTPBearer(auto_error=False, description="One of the service's API keys, where it has any.")

    def authorized(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if keys and not (given and keys.know(given.credentials)):
            raise StarletteHTTPException(401, "the API key is missing or unknown", {"WWW-Authenticate": "Bearer"})

    protected: dict[str, Any] = {"dependencies": [Depends(authorized)], "responses": FAULTS}

    @api.post(
        "/v1/audio/transcriptions",
        response_model=None,
        **protected | {"responses": FAULTS | {200: {"model": TranscriptionAnswer | VerboseAnswer, "content": _CONTENT}}},
    )
    async def transcribe(
        form: Annotated[TranscriptionForm, Form(media_type="multipart/form-data")],
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        about = await service.listener.about()
        asked = _asked(form, about)
        path, digest = await asyncio.to_thread(_saved, form.file.file)
        if form.stream:
            return await _streamed(service, path, asked)

        async def answer() -> Response:
            try:
                return _answered(form, await service.transcribe(path, asked), about)
            finally:
                os.unlink(path)

        if idempotency_key is None:
            return await answer()
        try:
            return await answers.once(idempotency_key, f"{digest} {form.model_dump(exclude={'file'})}", answer)
        except KeyReused as error:
            raise Refusal(409, "the idempotency key belongs to another request", code="idempotency_key_reused") from error

    @api.get("/v1/models", **protected)
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=(await service.listener.about()).name)])

    @api.get("/v1/models/{model}", **protected)
    async def model(model: str) -> ModelCard:
        _check_model(model, await service.listener.about())
        return ModelCard(id=model)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", responses={503: FAULTS[503]})
    async def readyz() -> dict[str, str]:
        await service.listener.about()
        return {"status": "ready"}

    return api


def _asked(form: TranscriptionForm, about: About) -> Asked:
    """What the form asks of the model. Raises Refusal for what it can't do."""
    _check_model(form.model, about)
    if form.language not in (None, about.language):
        raise Refusal(400, f"the model writes {about.language!r} only", param="language", code="unsupported_value")
    if form.temperature:
        raise Refusal(400, "decoding is greedy: temperature can only be 0", param="temperature", code="unsupported_value")
    if form.prompt and not about.takes_context:
        raise Refusal(400, "the model was not trained for lists of words", param="prompt", code="unsupported_parameter")
    words = "word" in form.timestamp_granularities
    if words and not about.times_words:
        message = "no aligner is loaded, so words have no times"
        raise Refusal(400, message, param="timestamp_granularities[]", code="unsupported_value")
    if words and form.response_format not in ("verbose_json", "srt", "vtt"):
        message = "times of words come with response_format verbose_json, srt or vtt"
        raise Refusal(400, message, param="timestamp_granularities[]", code="unsupported_value")
    if form.stream and form.response_format != "json":
        raise Refusal(400, "a stream is of response_format json", param="stream", code="unsupported_value")
    context = re.split(r"[,;\n]+", form.prompt) if form.prompt else []
    return Asked(context=tuple(filter(None, map(str.strip, context))) or None, words=words)


def _check_model(name: str, about: About) -> None:
    if name != about.name:
        raise Refusal(404, f"the model {name!r} does not exist, {about.name!r} does", param="model", code="model_not_found")


def _saved(upload: BinaryIO) -> tuple[str, str]:
    """Put an upload where decoders find it; returns its path and digest."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(prefix="graft-upload-", delete=False) as file:
        while data := upload.read(2**20):
            digest.update(data)
            file.write(data)
    return file.name, digest.hexdigest()


def _answered(form: TranscriptionForm, transcript: Transcript, about: About) -> Response:
    match form.response_format:
        case "json":
            return JSONResponse(TranscriptionAnswer(text=transcript.text).model_dump())
        case "verbose_json":
            told = verbose(transcript, language=about.language, granularities=form.timestamp_granularities)
            return JSONResponse(told.model_dump())
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case kind:
            return PlainTextResponse(format_transcript(transcript, kind), media_type=TEXTS[kind])


async def _streamed(service: Service, path: str, asked: Asked) -> Response:
    """Events; what goes wrong before the first is an answer of its own."""
    parts = service.parts(path, asked)
    try:
        first = await anext(parts, "")
    finally:
        os.unlink(path)  # it is decoded

    async def events() -> AsyncIterator[bytes]:
        text = first
        async with aclosing(parts):
            try:
                if first:
                    yield event(DeltaEvent(delta=first))
                async for part in parts:
                    text += part
                    yield event(DeltaEvent(delta=part))
                yield event(DoneEvent(text=text))
            except Exception as error:
                LOG.exception("a stream failed", exc_info=error)
                yield event(FaultAnswer(error=SERVER_FAULT))

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _refuse_form(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    param = next((str(part) for part in first["loc"][1:] if isinstance(part, str)), None)
    kinds = {"missing": "missing_required_parameter", "extra_forbidden": "unsupported_parameter"}
    texts = {"missing": f"the parameter {param!r} is missing", "extra_forbidden": f"the parameter {param!r} is not supported"}
    kind = first["type"]
    return _fault(400, Fault(message=texts.get(kind, f"{param}: {first['msg']}"), param=param, code=kinds.get(kind, "unsupported_value")))


def _refuse_audio(_: Request, error: AudioError) -> Response:
    is_long = isinstance(error, AudioTooLong)
    return _fault(413 if is_long else 400, Fault(message=str(error), param="file", code="audio_too_long" if is_long else "invalid_audio"))


def _refuse_words(_: Request, error: ModelError) -> Response:
    return _fault(400, Fault(message=str(error), param="prompt", code="unsupported_value"))


def _refuse(_: Request, error: StarletteHTTPException) -> Response:
    kinds: dict[int, FaultKind] = {401: "authentication_error", 429: "rate_limit_error"}
    kind: FaultKind = kinds.get(error.status_code, "invalid_request_error")
    fault = error.fault if isinstance(error, Refusal) else Fault(message=str(error.detail), type=kind)
    return _fault(error.status_code, fault, error.headers)


def _put_off(_: Request, error: Busy) -> Response:
    fault = Fault(message=f"{error}: try again in {error.retry_after_s} s", type="rate_limit_error", code="too_many_requests")
    return _fault(429, fault, {"Retry-After": str(error.retry_after_s)})


def _not_ready(_: Request, error: Exception) -> Response:
    return _fault(503, Fault(message="no model is loaded just now: try again", type="server_error", code="not_ready"), {"Retry-After": "5"})


def _fail(_: Request, error: Exception) -> Response:
    """Starlette raises the error again once this is sent, so that the server's log has it."""
    return _fault(500, SERVER_FAULT)


SERVER_FAULT = Fault(message="the server failed on this request: try again", type="server_error", code="internal_error")


def _fault(status: int, fault: Fault, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(FaultAnswer(error=fault).model_dump(), status_code=status, headers=headers)


_HANDLERS: dict[type[Exception], Any] = {
    RequestValidationError: _refuse_form,
    AudioError: _refuse_audio,
    ModelError: _refuse_words,
    StarletteHTTPException: _refuse,
    Busy: _put_off,
    NotReady: _not_ready,
    Exception: _fail,
}


class UploadLimit:
    """ASGI middleware: a request body over `max_bytes`, announced or not, is refused with 413 before it is all received."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = int(dict(scope.get("headers", [])).get(b"content-length", b"0"))
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if max(announced, received) > self._max_bytes:
                raise HTTPException(413, f"the upload is over {self._max_bytes} bytes: compress or cut the audio")
            return message

        await self._app(scope, limited, send)


class RequestLog:
    """ASGI middleware: each request has an id, its own (X-Request-Id) or a new one, and a line of JSON in the log when it is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("ascii", "replace")
        request_id = given if re.fullmatch(r"[\w.-]{1,100}", given) else uuid.uuid4().hex
        start, status = time.monotonic(), 0

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, answered)
        finally:
            line = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            LOG.info(json.dumps(line | {"seconds": round(time.monotonic() - start, 3)}))
