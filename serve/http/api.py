"""Put OpenAI's HTTP API before a Service. It does not depend on Ray; any ASGI server can run it.

POST /v1/audio/transcriptions    multipart upload -> JSON, text, subtitles, or server-sent events
GET /v1/models                   the served model
GET /healthz, /readyz            whether the process runs; whether it can answer
GET /docs                        the description of the API
"""

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Header, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from graft.inference.subtitles import format_transcript
from graft.inference.transcript import Transcript
from graft.text.context_words import check_context_words

from ..logs import LOG, RequestLogMiddleware
from ..observer import Observer
from ..service import ModelInfo, Service, TranscriptionOptions
from .auth import ApiKeys
from .errors import ERROR_RESPONSES, SERVER_ERROR, ApiError, ErrorMiddleware, describe_exception, exception_handlers
from .idempotency import IdempotencyKeyReused, ResponseCache
from .middleware import AuthMiddleware, UploadLimitMiddleware
from .schema import (
    DeltaEvent,
    DoneEvent,
    ErrorResponse,
    ModelCard,
    ModelList,
    TranscriptionForm,
    TranscriptionResponse,
    Usage,
    VerboseTranscriptionResponse,
    format_event,
    verbose_response,
)
from .uploads import file_digest, save_upload

MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
MAX_UPLOAD_S = 300.0
"""Seconds within which an upload must arrive."""
_STRING: dict[str, Any] = {"schema": {"type": "string"}}
_TRANSCRIPTION = {
    "model": TranscriptionResponse | VerboseTranscriptionResponse,
    "content": dict.fromkeys([*MEDIA_TYPES.values(), "text/event-stream"], _STRING),
}
# AuthMiddleware checks the key; this puts it into the description and into `transcribe`.
_BEARER = HTTPBearer(auto_error=False, description="One of the service's API keys, where it has any.")


def transcription_api(
    service: Service,
    *,
    keys: ApiKeys,
    max_upload_bytes: int,
    max_upload_s: float = MAX_UPLOAD_S,
    observer: Observer | None = None,
    sends_id: bool = True,
) -> FastAPI:
    """Create the application. Errors have OpenAI's shape. For `sends_id` see RequestLogMiddleware."""
    api = FastAPI(title="graft", description="Speech to text behind OpenAI's transcription endpoint.")
    # The middleware that is added last is the outermost.
    api.add_middleware(UploadLimitMiddleware, max_bytes=max_upload_bytes, max_s=max_upload_s)
    api.add_middleware(AuthMiddleware, keys=keys, check_capacity=service.check_capacity)
    api.add_middleware(ErrorMiddleware)
    api.add_middleware(RequestLogMiddleware, observer=observer or Observer(), sends_id=sends_id)
    for kind, handler in exception_handlers().items():
        api.exception_handler(kind)(handler)
    protected: dict[str, Any] = {"dependencies": [Depends(_BEARER)], "responses": ERROR_RESPONSES}
    _add_transcriptions(api, service, protected | {"responses": ERROR_RESPONSES | {200: _TRANSCRIPTION}})

    @api.get("/v1/models", **protected)
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=(await service.backend.model_info()).name)])

    @api.get("/v1/models/{model:path}", **protected)
    async def model(model: str) -> ModelCard:
        _check_model(model, await service.backend.model_info())
        return ModelCard(id=model)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", responses={503: ERROR_RESPONSES[503]})
    async def readyz() -> dict[str, str]:
        await service.backend.model_info()
        return {"status": "ready"}

    return api


def _add_transcriptions(api: FastAPI, service: Service, settings: dict[str, Any]) -> None:
    cache: ResponseCache[Response] = ResponseCache()

    @api.post("/v1/audio/transcriptions", response_model=None, **settings)
    async def transcribe(
        form: Annotated[TranscriptionForm, Form(media_type="multipart/form-data")],
        key: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        info = await service.backend.model_info()
        options = _read_options(form, info)
        async with AsyncExitStack() as files:
            path = await files.enter_async_context(save_upload(form.file))

            async def respond(upload: AsyncExitStack) -> Response:
                async with upload:  # the file is deleted here, because this may outlive the request
                    return _format_response(form, await service.transcribe(path, options, model=info.name), info)

            if form.stream:
                return await _stream_events(service, path, options)  # returns once the file has been decoded
            if idempotency_key is None:
                return await respond(files.pop_all())
            request = f"{await file_digest(path)} {form.model_dump(exclude={'file'})}"
            # Clients with different API keys may use the same idempotency key.
            client_key = hashlib.sha256(f"{key and key.credentials} {idempotency_key}".encode()).hexdigest()
            try:
                return await cache.get_or_create(client_key, request, lambda: respond(files.pop_all()))
            except IdempotencyKeyReused as error:
                message = "the idempotency key belongs to another request"
                raise ApiError(409, message, code="idempotency_key_reused") from error


def _read_options(form: TranscriptionForm, info: ModelInfo) -> TranscriptionOptions:
    """Convert the form to options. Raises ApiError for what the model does not support."""
    _check_model(form.model, info)
    if form.language not in (None, info.language):
        raise _unsupported("language", f"the model transcribes {info.language!r} only")
    if form.temperature:
        raise _unsupported("temperature", "temperature must be 0: decoding is greedy")
    for param, words in {"prompt": form.prompt, "keywords[]": form.keywords}.items():
        if words and not info.supports_context:
            raise ApiError(
                400, "the model was not trained for lists of words", param=param, code="unsupported_parameter"
            )
    word_timestamps = "word" in form.timestamp_granularities
    if word_timestamps and not info.supports_word_timestamps:
        raise _unsupported("timestamp_granularities[]", "word timestamps need an aligner, and no aligner is loaded")
    if word_timestamps and form.response_format not in ("verbose_json", "srt", "vtt"):
        raise _unsupported("timestamp_granularities[]", "word timestamps need response_format verbose_json, srt or vtt")
    if form.stream and form.response_format != "json":
        raise _unsupported("stream", "stream needs response_format json")
    given = [*re.split(r"[,;\n]+", form.prompt or ""), *form.keywords]
    context = tuple(check_context_words([word for word in given if word.strip(" ,.\t\r\n")]))
    return TranscriptionOptions(context=context or None, word_timestamps=word_timestamps)


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_value")


def _check_model(name: str, info: ModelInfo) -> None:
    if name != info.name:
        message = f"the model {name!r} does not exist: use {info.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _format_response(form: TranscriptionForm, transcript: Transcript, info: ModelInfo) -> Response:
    match form.response_format:
        case "json":
            usage = Usage(seconds=transcript.duration_s)
            return JSONResponse(TranscriptionResponse(text=transcript.text, usage=usage).model_dump())
        case "verbose_json":
            granularities = form.timestamp_granularities
            return JSONResponse(
                verbose_response(transcript, language=info.language, granularities=granularities).model_dump()
            )
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case subtitles:
            return PlainTextResponse(format_transcript(transcript, subtitles), media_type=MEDIA_TYPES[subtitles])


async def _stream_events(service: Service, path: str, options: TranscriptionOptions) -> Response:
    """Return a stream of events. An error before the first text is raised, so that the response gets its status."""
    parts = service.stream(path, options)
    first = await anext(parts, "")

    async def events() -> AsyncIterator[bytes]:
        text = first
        async with aclosing(parts):
            try:
                if first:
                    yield format_event(DeltaEvent(delta=first))
                async for part in parts:
                    text += part
                    yield format_event(DeltaEvent(delta=part))
                yield format_event(DoneEvent(text=text))
            except Exception as error:
                LOG.error("a stream failed: %s", describe_exception(error))
                yield format_event(ErrorResponse(error=SERVER_ERROR))

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
