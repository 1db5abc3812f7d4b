"""The HTTP API over a Transcriber, as OpenAI's clients expect it. Knows nothing of Ray: any ASGI server can run it.

POST /v1/audio/transcriptions    multipart upload -> {"text": ...} or plain text
GET /v1/models                   the one model
GET /healthz                     {"status": "ok"}
"""

import asyncio
import io
from typing import Annotated, Any

import soundfile
from fastapi import FastAPI, Form, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graft.audio import AudioClip, read_audio
from graft.errors import AudioError
from graft.transcriber import Transcriber
from serve.schema import Fault, FaultAnswer, ModelCard, ModelList, TranscriptionAnswer, TranscriptionForm


def transcription_api(transcriber: Transcriber, *, name: str, max_upload_bytes: int, max_duration_s: float) -> FastAPI:
    """Serve a transcriber under the model id `name`. Faults come in OpenAI's shape, without tracebacks or paths."""
    faults: dict[int | str, dict[str, Any]] = {status: {"model": FaultAnswer} for status in (400, 404, 413, 500)}
    api = FastAPI(title="graft", responses=faults)
    api.add_middleware(UploadLimit, max_bytes=max_upload_bytes)
    api.exception_handler(RequestValidationError)(_refuse_form)
    api.exception_handler(AudioError)(_refuse_audio)
    api.exception_handler(StarletteHTTPException)(_refuse)
    api.exception_handler(Exception)(_fail)

    @api.post("/v1/audio/transcriptions", response_model=TranscriptionAnswer)
    async def transcribe(form: Annotated[TranscriptionForm, Form(media_type="multipart/form-data")]) -> Response:
        if form.model != name:
            message = f"the model {form.model!r} does not exist, {name!r} does"
            raise _Refusal(404, Fault(message=message, param="model", code="model_not_found"))
        clip = await asyncio.to_thread(_read, await form.file.read(), max_duration_s)
        transcript = await transcriber.transcribe_async(clip)
        if form.response_format == "text":
            return PlainTextResponse(transcript.text + "\n")
        return JSONResponse(TranscriptionAnswer(text=transcript.text).model_dump())

    @api.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name)])

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return api


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


class _Refusal(StarletteHTTPException):
    """A fault that is the client's."""

    def __init__(self, status: int, fault: Fault) -> None:
        super().__init__(status, fault.message)
        self.fault = fault


def _read(data: bytes, max_duration_s: float) -> AudioClip:
    """Decode an upload, but not hours of it. Raises AudioError."""
    try:
        duration_s = soundfile.info(io.BytesIO(data)).duration
    except soundfile.LibsndfileError:
        duration_s = 0.0  # read_audio says what is wrong
    if duration_s > max_duration_s:
        raise AudioError(f"file: {duration_s:.0f} s of audio are over the limit of {max_duration_s:g} s: cut it")
    return read_audio(data, name="file")


def _refuse_form(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    param = ".".join(map(str, first["loc"][1:])) or None
    if first["type"] == "missing":
        return _answer(400, Fault(message=f"the parameter {param!r} is missing", param=param, code="missing_required_parameter"))
    if first["type"] == "extra_forbidden":
        return _answer(400, Fault(message=f"the parameter {param!r} is not supported", param=param, code="unsupported_parameter"))
    return _answer(400, Fault(message=f"{param}: {first['msg']}", param=param, code="unsupported_value"))


def _refuse_audio(_: Request, error: AudioError) -> Response:
    return _answer(400, Fault(message=str(error), param="file", code="invalid_audio"))


def _refuse(_: Request, error: StarletteHTTPException) -> Response:
    fault = error.fault if isinstance(error, _Refusal) else Fault(message=str(error.detail))
    return _answer(error.status_code, fault)


def _fail(_: Request, error: Exception) -> Response:
    """Starlette raises the error again once this is sent, so that the server's log has it."""
    return _answer(500, Fault(message="the server failed on this request", type="server_error", code="internal_error"))


def _answer(status: int, fault: Fault) -> Response:
    return JSONResponse(FaultAnswer(error=fault).model_dump(), status_code=status)
