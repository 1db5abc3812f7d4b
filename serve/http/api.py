"""Put OpenAI's HTTP API before a Service. It does not depend on Ray; any ASGI server can run it.

POST /v1/audio/transcriptions    form or JSON with audio -> JSON, text, subtitles, or server-sent events
GET /v1/models                   the served model, and the other names that it has
GET /v1/realtime                 WebSocket: text of speech while it is spoken
GET /healthz, /readyz            whether the process runs; whether it can answer
GET /docs                        the description of the API
"""

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from graft.inference.transcript import Transcript

from ..fairness import FairSlots
from ..live.capacity import LiveCapacity
from ..logs import Observer
from ..service import ANONYMOUS, Client, ModelInfo, ModelNotReady, ReplicaModel, Service
from .errors import ERROR_RESPONSES, EXPECTED, ApiError, error_response
from .event_stream import KEEP_ALIVE_S, stream_events
from .idempotency import ResponseCache
from .middleware import AccessMiddleware, ApiKeys, RequestMiddleware
from .realtime import LiveLimits, add_realtime
from .request import IGNORED_HEADER, check_model, ignored_header, read_options, receive_body
from .schema import (
    FailedChange,
    ModelCard,
    ModelList,
    ReplicaCard,
    TranscriptionRequest,
    TranscriptionResponse,
    Usage,
    VerboseTranscriptionResponse,
    convert_tokens,
    request_body_schema,
    tokens_of,
    verbose_response,
)
from .timeout import TimeoutMiddleware

MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
MAX_UPLOAD_S = 300.0
"""Seconds within which an upload must arrive."""
_EVENT_DATA = {"type": "string", "contentMediaType": "application/json"}
_EVENTS = {"itemSchema": {"type": "object", "required": ["data"], "properties": {"data": _EVENT_DATA}}}
_TRANSCRIPTION = {
    "model": TranscriptionResponse | VerboseTranscriptionResponse,
    "content": {kind: {"schema": {"type": "string"}} for kind in MEDIA_TYPES.values()} | {"text/event-stream": _EVENTS},
    "headers": {IGNORED_HEADER: {"schema": {"type": "string"}, "description": "Fields that were ignored."}},
}
# AccessMiddleware checks the key; this puts it into the description.
_BEARER = HTTPBearer(auto_error=False, description="One of the service's API keys, where it has any.")


def transcription_api(
    service: Service,
    *,
    keys: ApiKeys,
    max_upload_bytes: int,
    max_upload_s: float = MAX_UPLOAD_S,
    min_upload_bytes_per_s: float = 0,
    request_timeout_s: float | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
    observer: Observer | None = None,
    sends_id: bool = True,
    aliases: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    strict: bool = False,
    max_sessions: int = 8,
    max_early_passes: int = 1,
    live_limits: LiveLimits | None = None,
) -> FastAPI:
    """Create the application. Errors have OpenAI's shape.

    `aliases` are other names of the model. Pages of `cors_origins` may call the API from a browser. With `strict`,
    requests get a 400 for fields that would be ignored, unless they say otherwise. `sends_id`: see RequestMiddleware.
    A request that takes longer than `request_timeout_s`, from its header to the end of its response, gets a 408.
    """
    # The package holds the files of the page /docs, which FastAPI alone lets the browser fetch from a CDN.
    api = FastAPIOffline(
        title="graft", description="Speech to text behind OpenAI's transcription endpoint.", redoc_url=None
    )
    # The middleware that is added last is the outermost.
    api.add_middleware(
        AccessMiddleware,
        keys=keys,
        check_capacity=service.check_capacity,
        max_arriving=2 * service.max_requests,
        max_bytes=max_upload_bytes,
        max_s=max_upload_s,
        min_bytes_per_s=min_upload_bytes_per_s,
    )
    api.add_middleware(TimeoutMiddleware, timeout_s=request_timeout_s)
    api.add_middleware(RequestMiddleware, observer=observer or Observer(), sends_id=sends_id)
    if cors_origins:  # outside of the others: a browser asks without a key whether it may send one
        api.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[IGNORED_HEADER, "Retry-After", "X-Request-Id"],
        )
    for kind in EXPECTED:
        api.add_exception_handler(kind, lambda _, error: error_response(error))
    protected: dict[str, Any] = {"dependencies": [Depends(_BEARER)], "responses": ERROR_RESPONSES}
    settings = protected | {"responses": ERROR_RESPONSES | {200: _TRANSCRIPTION}}
    _add_transcriptions(api, service, settings, aliases, strict=strict, keep_alive_s=keep_alive_s)

    capacity = LiveCapacity(service, max_sessions=max_sessions, max_early_passes=max_early_passes)
    add_realtime(
        api,
        capacity,
        aliases=aliases,
        origins=cors_origins,
        observer=observer or Observer(),
        limits=live_limits or LiveLimits(),
    )

    @api.get("/v1/models", **protected)
    async def models() -> ModelList:
        info = await service.backend.model_info()
        return ModelList(data=[_describe_model(name, info) for name in dict.fromkeys([info.name, *aliases])])

    @api.get("/v1/models/{model:path}", **protected)
    async def model(model: str) -> ModelCard:
        check_model(model, info := await service.backend.model_info(), aliases)
        return _describe_model(model, info)

    @api.head("/healthz", include_in_schema=False)
    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.head("/readyz", include_in_schema=False)
    @api.get("/readyz", responses={503: ERROR_RESPONSES[503]})
    async def readyz() -> dict[str, str]:
        replicas = (await service.backend.model_info()).replicas
        if replicas and not any(replica.is_open for replica in replicas):
            raise ModelNotReady  # requests wait for the next model
        return {"status": "ready"}

    return api


def _describe_model(name: str, info: ModelInfo) -> ModelCard:
    return ModelCard(id=name, replicas=[_describe_replica(replica) for replica in info.replicas])


def _describe_replica(replica: ReplicaModel) -> ReplicaCard:
    failure = replica.failure
    return ReplicaCard(
        replica=replica.replica,
        model=replica.model,
        digest=replica.digest,
        state="ready" if replica.is_open else "changing",
        failed_change=FailedChange(model=failure.model, error=failure.error) if failure else None,
    )


def _add_transcriptions(
    api: FastAPI,
    service: Service,
    settings: dict[str, Any],
    aliases: Collection[str],
    *,
    strict: bool,
    keep_alive_s: float,
) -> None:
    cache: ResponseCache[Response] = ResponseCache()
    json_slots = FairSlots(1, 1)

    @api.post(
        "/v1/audio/transcriptions",
        response_model=None,
        openapi_extra={"requestBody": request_body_schema()},
        **settings,
    )
    async def transcribe(
        request: Request,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        client: Client = request.state.client
        async with AsyncExitStack() as files:
            body, path = await files.enter_async_context(receive_body(request, json_slots))
            asked = body.validate()
            info = await service.backend.model_info()
            check_model(asked.model, info, aliases)
            options = await asyncio.to_thread(read_options, body, asked, info)  # names of languages take an import
            if body.faults and (strict if asked.strict is None else asked.strict):
                raise next(iter(body.faults.values()))
            headers = ignored_header(body.faults)

            async def respond(upload: AsyncExitStack) -> Response:
                async with upload:  # the file is deleted here, because this may outlive the request
                    transcript = await service.transcribe(path, options, model=info.name, client=client)
                    response = _format_response(asked, transcript, logprobs=options.logprobs)
                    response.headers.update(headers)
                    return response

            if asked.stream:
                parts = service.stream(path, options, model=info.name, client=client)
                return await stream_events(parts, files.pop_all(), options, keep_alive_s, headers)
            if not idempotency_key:
                return await respond(files.pop_all())
            wanted = f"{await asyncio.to_thread(_file_digest, path)} {asked.model_dump()} {sorted(body.faults)}"
            # Clients with different API keys may use the same idempotency key. Those without keys may change addresses.
            owner = "" if client.name == ANONYMOUS else client.id
            return await cache.get_or_create(owner, idempotency_key, wanted, lambda: respond(files.pop_all()))

    @api.post("/v1/audio/translations", include_in_schema=False)
    async def translate() -> None:
        message = "the service does not translate: POST /v1/audio/transcriptions writes what is said"
        raise ApiError(404, message, code="unsupported_value")


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _format_response(asked: TranscriptionRequest, transcript: Transcript, *, logprobs: bool) -> Response:
    match asked.response_format:
        case "json":
            answer = TranscriptionResponse(text=transcript.text, usage=Usage(seconds=transcript.duration_s))
            answer.logprobs = convert_tokens(tokens_of(transcript)) if logprobs else None
            return JSONResponse(answer.model_dump(exclude_none=True))
        case "verbose_json":
            wanted = asked.timestamp_granularities
            return JSONResponse(verbose_response(transcript, granularities=wanted).model_dump())
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case subtitles:
            return PlainTextResponse(transcript.to_string(subtitles), media_type=MEDIA_TYPES[subtitles])
