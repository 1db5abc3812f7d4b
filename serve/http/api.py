"""The HTTP API over a Service, as OpenAI's clients expect it. Knows nothing of Ray: any ASGI server can run it.

POST /v1/audio/transcriptions    multipart upload -> JSON, text, subtitles, or events as the text comes
GET /v1/models                   the one model
GET /healthz, /readyz            whether the process lives; whether it can answer
GET /docs                        all of it, described
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

from ..logs import LOG, RequestLog
from ..observer import Observer
from ..service import ModelInfo, Service, TranscriptionOptions
from .auth import Keys
from .errors import FAULTS, SERVER_FAULT, ErrorMiddleware, Refusal, described, handlers
from .idempotency import Answers, KeyReused
from .middleware import AuthMiddleware, UploadLimitMiddleware
from .schema import (
    DeltaEvent,
    DoneEvent,
    FaultAnswer,
    ModelCard,
    ModelList,
    TranscriptionAnswer,
    TranscriptionForm,
    VerboseAnswer,
    event,
    usage,
    verbose,
)
from .uploads import digest, saved

TEXTS = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
UPLOAD_S = 300.0
"""Seconds in which an upload has to come."""
_CONTENT: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in [*TEXTS.values(), "text/event-stream"]}


def transcription_api(
    service: Service,
    *,
    keys: Keys,
    max_upload_bytes: int,
    max_upload_s: float = UPLOAD_S,
    observer: Observer | None = None,
    tells_id: bool = True,
) -> FastAPI:
    """Put HTTP before a service. Faults come in OpenAI's shape, without tracebacks or paths. `tells_id`: see RequestLog."""
    api = FastAPI(title="graft", description="Speech to text behind OpenAI's transcription endpoint.")
    api.add_middleware(UploadLimitMiddleware, max_bytes=max_upload_bytes, max_s=max_upload_s)
    api.add_middleware(AuthMiddleware, keys=keys, check_room=service.check_room)
    api.add_middleware(ErrorMiddleware)
    api.add_middleware(RequestLog, observer=observer or Observer(), tells_id=tells_id)
    for kind, answer_to in handlers().items():
        api.exception_handler(kind)(answer_to)
    answers: Answers[Response] = Answers()
    bearer = HTTPBearer(
        auto_error=False, description="One of the service's API keys, where it has any."
    )  # AuthMiddleware checks it
    protected: dict[str, Any] = {"dependencies": [Depends(bearer)], "responses": FAULTS}

    @api.post(
        "/v1/audio/transcriptions",
        response_model=None,
        **protected
        | {"responses": FAULTS | {200: {"model": TranscriptionAnswer | VerboseAnswer, "content": _CONTENT}}},
    )
    async def transcribe(
        form: Annotated[TranscriptionForm, Form(media_type="multipart/form-data")],
        key: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        about = await service.listener.about()
        asked = _asked(form, about)
        async with AsyncExitStack() as files:
            path = await files.enter_async_context(saved(form.file))

            async def answer(own: AsyncExitStack) -> Response:
                async with own:
                    return _answered(form, await service.transcribe(path, asked, model=about.name), about)

            if form.stream:
                return await _streamed(service, path, asked)  # the first text: the file has been decoded
            if idempotency_key is None:
                return await answer(files.pop_all())
            request = f"{await digest(path)} {form.model_dump(exclude={'file'})}"
            try:
                return await answers.once(_own(idempotency_key, key), request, lambda: answer(files.pop_all()))
            except KeyReused as error:
                raise Refusal(
                    409, "the idempotency key belongs to another request", code="idempotency_key_reused"
                ) from error

    @api.get("/v1/models", **protected)
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=(await service.listener.about()).name)])

    @api.get("/v1/models/{model:path}", **protected)
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


def _own(idempotency_key: str, key: HTTPAuthorizationCredentials | None) -> str:
    """An idempotency key apart from the same one of other clients."""
    return hashlib.sha256(f"{key and key.credentials} {idempotency_key}".encode()).hexdigest()


def _asked(form: TranscriptionForm, about: ModelInfo) -> TranscriptionOptions:
    """What the form asks of the model. Raises Refusal for what it can't do."""
    _check_model(form.model, about)
    if form.language not in (None, about.language):
        raise Refusal(400, f"the model writes {about.language!r} only", param="language", code="unsupported_value")
    if form.temperature:
        raise Refusal(
            400, "decoding is greedy: temperature can only be 0", param="temperature", code="unsupported_value"
        )
    for param, given in {"prompt": form.prompt, "keywords[]": form.keywords}.items():
        if given and not about.takes_context:
            raise Refusal(
                400, "the model was not trained for lists of words", param=param, code="unsupported_parameter"
            )
    words = "word" in form.timestamp_granularities
    if words and not about.times_words:
        message = "no aligner is loaded, so words have no times"
        raise Refusal(400, message, param="timestamp_granularities[]", code="unsupported_value")
    if words and form.response_format not in ("verbose_json", "srt", "vtt"):
        message = "times of words come with response_format verbose_json, srt or vtt"
        raise Refusal(400, message, param="timestamp_granularities[]", code="unsupported_value")
    if form.stream and form.response_format != "json":
        raise Refusal(400, "a stream is of response_format json", param="stream", code="unsupported_value")
    return TranscriptionOptions(context=_context(form) or None, words=words)


def _context(form: TranscriptionForm) -> tuple[str, ...]:
    """The words that may occur. Raises ModelError for too many of them, or too long ones."""
    given = [*re.split(r"[,;\n]+", form.prompt or ""), *form.keywords]
    return tuple(check_context_words([word for word in given if word.strip(" ,.\t\r\n")]))


def _check_model(name: str, about: ModelInfo) -> None:
    if name != about.name:
        raise Refusal(
            404, f"the model {name!r} does not exist, {about.name!r} does", param="model", code="model_not_found"
        )


def _answered(form: TranscriptionForm, transcript: Transcript, about: ModelInfo) -> Response:
    match form.response_format:
        case "json":
            return JSONResponse(TranscriptionAnswer(text=transcript.text, usage=usage(transcript)).model_dump())
        case "verbose_json":
            told = verbose(transcript, language=about.language, granularities=form.timestamp_granularities)
            return JSONResponse(told.model_dump())
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case kind:
            return PlainTextResponse(format_transcript(transcript, kind), media_type=TEXTS[kind])


async def _streamed(service: Service, path: str, asked: TranscriptionOptions) -> Response:
    """Events; what goes wrong before the first is an answer of its own."""
    parts = service.parts(path, asked)
    first = await anext(parts, "")

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
                LOG.error("a stream failed: %s", described(error))
                yield event(FaultAnswer(error=SERVER_FAULT))

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
