"""Put OpenAI's HTTP API before a Service. It does not depend on Ray; any ASGI server can run it.

POST /v1/audio/transcriptions    multipart upload -> JSON, text, subtitles, or server-sent events
GET /v1/models                   the served model
GET /healthz, /readyz            whether the process runs; whether it can answer
GET /docs                        the description of the API
"""

import asyncio
import hashlib
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Header, Response, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from graft.inference.subtitles import format_transcript
from graft.inference.transcript import Transcript
from graft.text.prompts import check_context_words

from ..logs import LOG, Observer
from ..service import ModelInfo, Service, TranscriptionOptions
from .errors import ERROR_RESPONSES, EXPECTED, SERVER_ERROR, ApiError, describe_exception, error_response
from .idempotency import ResponseCache
from .middleware import AccessMiddleware, ApiKeys, RequestMiddleware
from .schema import (
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

MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
MAX_UPLOAD_S = 300.0
"""Seconds within which an upload must arrive."""
_TRANSCRIPTION = {
    "model": TranscriptionResponse | VerboseTranscriptionResponse,
    "content": {kind: {"schema": {"type": "string"}} for kind in [*MEDIA_TYPES.values(), "text/event-stream"]},
}
# AccessMiddleware checks the key; this puts it into the description and into `transcribe`.
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
    """Create the application. Errors have OpenAI's shape. For `sends_id` see RequestMiddleware."""
    api = FastAPI(title="graft", description="Speech to text behind OpenAI's transcription endpoint.")
    # The middleware that is added last is the outermost.
    api.add_middleware(
        AccessMiddleware,
        keys=keys,
        check_capacity=service.check_capacity,
        max_bytes=max_upload_bytes,
        max_s=max_upload_s,
    )
    api.add_middleware(RequestMiddleware, observer=observer or Observer(), sends_id=sends_id)
    for kind in EXPECTED:
        api.add_exception_handler(kind, lambda _, error: error_response(error))
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
            path = await files.enter_async_context(_save_upload(form.file))

            async def respond(upload: AsyncExitStack) -> Response:
                async with upload:  # the file is deleted here, because this may outlive the request
                    return _format_response(form, await service.transcribe(path, options, model=info.name), info)

            if form.stream:
                return await _stream_events(service, path, options)  # returns once the file has been decoded
            if not idempotency_key:
                return await respond(files.pop_all())
            request = f"{await asyncio.to_thread(_file_digest, path)} {form.model_dump(exclude={'file'})}"
            # Clients with different API keys may use the same idempotency key.
            client_key = hashlib.sha256(f"{key and key.credentials} {idempotency_key}".encode()).hexdigest()
            return await cache.get_or_create(client_key, request, lambda: respond(files.pop_all()))


@asynccontextmanager
async def _save_upload(upload: UploadFile) -> AsyncIterator[str]:
    """Copy an upload to a temporary file, where the decoding processes can read it, until the block ends."""
    with tempfile.NamedTemporaryFile(prefix="graft-upload-") as file:
        await asyncio.to_thread(shutil.copyfileobj, upload.file, file, 2**20)
        file.flush()
        yield file.name


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_options(form: TranscriptionForm, info: ModelInfo) -> TranscriptionOptions:
    """Convert the form to options. Raises ApiError for what the model does not support."""
    _check_model(form.model, info)
    times_words, timing = "word" in form.timestamp_granularities, "timestamp_granularities[]"
    value, parameter = "unsupported_value", "unsupported_parameter"
    no_words = "the model was not trained for lists of words"
    # field, whether what it holds is supported, the error's code and message
    checks = [
        ("language", form.language in (None, info.language), value, f"the model transcribes {info.language!r} only"),
        ("temperature", not form.temperature, value, "temperature must be 0: decoding is greedy"),
        ("prompt", info.supports_context or not form.prompt, parameter, no_words),
        ("keywords[]", info.supports_context or not form.keywords, parameter, no_words),
        (
            timing,
            info.supports_word_timestamps or not times_words,
            value,
            "word timestamps need an aligner, and no aligner is loaded",
        ),
        (
            timing,
            not times_words or form.response_format in ("verbose_json", "srt", "vtt"),
            value,
            "word timestamps need response_format verbose_json, srt or vtt",
        ),
        ("stream", not form.stream or form.response_format == "json", value, "stream needs response_format json"),
    ]
    for param, is_supported, code, message in checks:
        if not is_supported:
            raise ApiError(400, message, param=param, code=code)
    given = [*re.split(r"[,;\n]+", form.prompt or ""), *form.keywords]
    context = tuple(check_context_words([word for word in given if word.strip(" ,.\t\r\n")]))
    return TranscriptionOptions(context=context or None, word_timestamps=times_words)


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
            wanted = form.timestamp_granularities
            return JSONResponse(verbose_response(transcript, language=info.language, granularities=wanted).model_dump())
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
                    yield format_event({"type": "transcript.text.delta", "delta": first})
                async for part in parts:
                    text += part
                    yield format_event({"type": "transcript.text.delta", "delta": part})
                yield format_event({"type": "transcript.text.done", "text": text})  # all deltas joined
            except Exception as error:
                LOG.error("a stream failed: %s", describe_exception(error))
                yield format_event(ErrorResponse(error=SERVER_ERROR).model_dump())

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
