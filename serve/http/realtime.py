"""Put live sessions behind a WebSocket, in the form of OpenAI's Realtime API: GET /v1/realtime?intent=transcription.

    messages -> inbox -> LiveSession -> outbox -> messages

A session ends when its client leaves, is silent or slow for too long, or has been there for an hour. Whoever is refused
gets an `error` event, as a browser shows neither the status nor the body of a refused handshake.
"""

import asyncio
import base64
import binascii
import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pydantic_core
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ..live.capacity import LiveCapacity
from ..live.events import Event, describe_session, error_event, make_event, new_id
from ..live.session import EmptyBuffer, LiveSession
from ..live.settings import SessionSettings
from ..live.turns import open_scorer
from ..logs import LOG, Observer
from ..service import Client, ModelInfo, ServiceBusy, ServiceStopping, TranscriptionOptions
from .errors import EXPECTED, ApiError, describe_exception, error_detail
from .request import MAX_JSON_VALUES, TranscriptionBody, check_model, read_options

PATH = "/v1/realtime"
PROTOCOL = "realtime"
KEY_PROTOCOL = "openai-insecure-api-key."
"""Subprotocol by which web pages send a key, because they cannot set headers."""
MAX_MESSAGE_BYTES = 15 * 2**20
MAX_WAITING_BYTES = 16 * 2**20
"""Bytes of messages that may wait, because audio comes faster than it is transcribed."""
MAX_WAITING_EVENTS = 1_000
MAX_SEND_S = 15.0
"""Seconds in which a client must take an event."""
MAX_SILENCE_S = 600.0
"""Seconds in which a client must send a message."""
MAX_SESSION_S = 3_600.0
MAX_FINISH_S = 10.0
"""Seconds in which the last texts of a session come when the service ends."""

NORMAL, TOO_BIG, RESTART, TRY_AGAIN, POLICY, UNAUTHORIZED = 1000, 1009, 1012, 1013, 1008, 3000
"""Codes with which a connection is closed; 3000 is OpenAI's for a wrong key."""


@dataclass(frozen=True)
class LiveLimits:
    """Limits of a live session, in seconds."""

    max_silence_s: float = MAX_SILENCE_S
    max_session_s: float = MAX_SESSION_S
    max_send_s: float = MAX_SEND_S


class SessionEnd(Exception):
    """A session is to end: with this code of a closed connection and, where something is wrong, this error."""

    def __init__(self, code: int, error: dict[str, Any] | None = None) -> None:
        super().__init__(code)
        self.code, self.error = code, error


def add_realtime(
    api: FastAPI,
    capacity: LiveCapacity,
    *,
    aliases: Collection[str],
    origins: Collection[str],
    observer: Observer,
    limits: LiveLimits,
) -> None:
    """Add the WebSocket of live sessions to the application."""

    @api.websocket(PATH)
    async def realtime(websocket: WebSocket) -> None:
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
        try:
            connection = _Connection(websocket, capacity, aliases, observer, limits)
            _check_handshake(websocket, origins)
            await connection.run()
        except SessionEnd as end:
            await _close(websocket, end)
        except WebSocketDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, EXPECTED):
                LOG.error("a live session failed: %s", describe_exception(error))
            await _close(websocket, _end_of(error))


def websocket_key(scope: Any) -> str:
    """Return the value of an Authorization header: the handshake's own or, from a web page, that of a subprotocol."""
    headers = dict(scope["headers"])
    given = headers.get(b"authorization", b"").decode("latin-1")
    keys = [name.removeprefix(KEY_PROTOCOL) for name in scope.get("subprotocols", []) if name.startswith(KEY_PROTOCOL)]
    return given or (f"Bearer {keys[0]}" if keys else "")


def _check_handshake(websocket: WebSocket, origins: Collection[str]) -> None:
    """Raise ApiError for an unknown key, a page of another origin, and a kind of session that there is not."""
    if (refusal := getattr(websocket.state, "refusal", None)) is not None:
        raise refusal
    origin = websocket.headers.get("origin")
    is_own = origin is None or urlsplit(origin).netloc == websocket.headers.get("host")
    if not (is_own or origin in origins or "*" in origins):
        raise ApiError(403, f"pages of {origin!r:.100} may not call the service: name them in cors_origins")
    intent = websocket.query_params.get("intent", "transcription")
    if intent != "transcription":
        message = f"intent is {intent!r:.100}: the service has live sessions of transcription alone"
        raise ApiError(400, message, param="intent", code="unsupported_value")


def _end_of(error: Exception) -> SessionEnd:
    """Return how a session ends with an exception."""
    match error:
        case ServiceBusy():
            code = TRY_AGAIN
        case ServiceStopping():
            code = RESTART
        case ApiError(status_code=401 | 403):
            code = UNAUTHORIZED
        case _ if isinstance(error, EXPECTED):
            code = POLICY
        case _:
            code = 1011
    return SessionEnd(code, error_detail(error))


async def _close(websocket: WebSocket, end: SessionEnd) -> None:
    """Say why a session ends, and end it; a client that does not listen is left."""
    websocket.state.status = end.code
    if websocket.client_state is not WebSocketState.CONNECTED:
        return
    with contextlib.suppress(TimeoutError, RuntimeError, OSError, WebSocketDisconnect):
        async with asyncio.timeout(MAX_SEND_S / 3):
            if end.error:
                await websocket.send_text(_to_json(error_event(end.error)))
            reason = f"{end.error['type']}.{end.error['code']}" if end.error and end.error["code"] else ""
            await websocket.close(end.code, reason)


def _to_json(event: Event) -> str:
    return pydantic_core.to_json(event).decode()


class _Connection:
    """One client's WebSocket and session, from the handshake on."""

    def __init__(
        self,
        websocket: WebSocket,
        capacity: LiveCapacity,
        aliases: Collection[str],
        observer: Observer,
        limits: LiveLimits,
    ) -> None:
        self._websocket, self._capacity, self._aliases = websocket, capacity, aliases
        self._observer, self._limits = observer, limits
        self._id = new_id("sess")
        self._expires_at = int(time.time() + limits.max_session_s)
        self._inbox: asyncio.Queue[str] = asyncio.Queue()
        self._waiting_bytes = 0
        self._outbox: asyncio.Queue[Event] = asyncio.Queue(MAX_WAITING_EVENTS)

    async def run(self) -> None:
        """Serve the client until one of both ends it. Raises SessionEnd, ServiceBusy and the other expected errors."""
        client: Client = self._websocket.state.client
        with self._capacity.hold_session(client):
            session = await self._open(client)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for work in (self._receive(), self._send_all(), self._obey(session), self._watch(session)):
                        tasks.create_task(work)
                    tasks.create_task(session.run())
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _open(self, client: Client) -> LiveSession:
        info = await self._capacity.service.backend.model_info()
        if (model := self._websocket.query_params.get("model")) is not None:
            check_model(model, info, self._aliases)
        settings = SessionSettings()

        async def transcribe(chunk: Any, options: TranscriptionOptions, *, is_last: bool) -> Any:
            return await self._capacity.transcribe(chunk, options, client, is_last=is_last)

        session = LiveSession(
            transcribe,
            self._put,
            await asyncio.to_thread(open_scorer),
            options=await self._read_options(settings, info),
            describe_error=error_detail,
            observer=self._observer,
            key=client.name,
        )
        self._put(make_event("session.created", session=self._describe(session.settings)))
        return session

    def _describe(self, settings: SessionSettings) -> Event:
        return describe_session(self._id, settings, expires_at=self._expires_at)

    async def _read_options(self, settings: SessionSettings, info: ModelInfo) -> TranscriptionOptions:
        """Return what passes ask for. Raises ApiError."""
        asked = settings.input.transcription
        if asked.model is not None:
            check_model(asked.model, info, self._aliases)
        fields = {"model": info.name, "language": asked.language, "prompt": asked.prompt, "keywords": asked.keywords}
        body = TranscriptionBody.collect(
            (name, list(value) if isinstance(value, tuple) else value) for name, value in fields.items()
        )
        return await asyncio.to_thread(read_options, body, body.validate(), info)

    def _put(self, event: Event) -> None:
        try:
            self._outbox.put_nowait(event)
        except asyncio.QueueFull:
            raise SessionEnd(POLICY, _detail("the client takes its events too slowly", "slow_client")) from None

    async def _send_all(self) -> None:
        while True:
            text = _to_json(await self._outbox.get())
            try:
                async with asyncio.timeout(self._limits.max_send_s):
                    await self._websocket.send_text(text)
            except TimeoutError:
                raise SessionEnd(POLICY, _detail("the client takes its events too slowly", "slow_client")) from None

    async def _receive(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._limits.max_silence_s):
                    message = await self._websocket.receive()
            except TimeoutError:
                silent = f"the client has sent nothing for {self._limits.max_silence_s:g} s"
                raise SessionEnd(NORMAL, _detail(silent, "session_idle")) from None
            if message["type"] == "websocket.disconnect":
                raise SessionEnd(NORMAL)
            text = message.get("text")
            if text is None:
                self._put(error_event(_detail("the message is binary: send JSON as text", "invalid_message")))
                continue
            if len(text) > MAX_MESSAGE_BYTES:
                limit = f"the message is over the limit of {MAX_MESSAGE_BYTES} bytes: send less audio at a time"
                raise SessionEnd(TOO_BIG, _detail(limit, "message_too_large"))
            self._waiting_bytes += len(text)
            if self._waiting_bytes > MAX_WAITING_BYTES:
                reason = "audio comes faster than it is transcribed: send it as fast as it is spoken"
                raise SessionEnd(POLICY, _detail(reason, "rate_limit_exceeded", kind="rate_limit_error"))
            self._inbox.put_nowait(text)

    async def _watch(self, session: LiveSession) -> None:
        """End the session where its time is over, or the service ends."""
        stopping = self._capacity.service.stopping
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.max_session_s):
                await stopping.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_FINISH_S):
                await session.finish()
                while not self._outbox.empty():
                    await asyncio.sleep(0.01)
        if stopping.is_set():
            raise ServiceStopping
        message = f"the session has reached its limit of {self._limits.max_session_s:g} s: open another one"
        raise SessionEnd(NORMAL, _detail(message, "session_expired"))

    async def _obey(self, session: LiveSession) -> None:
        while True:
            text = await self._inbox.get()
            event_id: str | None = None
            try:
                event = _parse(text)
                event_id = event.get("event_id") if isinstance(event.get("event_id"), str) else None
                await self._handle(session, event)
            except ValidationError as error:
                first = error.errors()[0]
                param = "session." + ".".join(str(part) for part in first["loc"])
                self._put(error_event(_detail(f"{param}: {first['msg']}", "unsupported_value", param), event_id))
            except EXPECTED as error:
                self._put(error_event(error_detail(error), event_id))
            finally:
                self._waiting_bytes -= len(text)

    async def _handle(self, session: LiveSession, event: Event) -> None:
        match event.get("type"):
            case "input_audio_buffer.append":
                await session.append(_decode_audio(event.get("audio")))
            case "input_audio_buffer.commit":
                try:
                    await session.commit()
                except EmptyBuffer:
                    message = "there is no audio to commit: append some before"
                    raise ApiError(400, message, code="input_audio_buffer_commit_empty") from None
            case "input_audio_buffer.clear":
                session.clear()
            case "session.update" | "transcription_session.update":
                changes = event.get("session")
                if not isinstance(changes, dict):
                    raise ApiError(400, "session is missing", param="session", code="missing_required_parameter")
                settings = session.settings.changed(changes)
                info = await self._capacity.service.backend.model_info()
                session.update(settings, await self._read_options(settings, info))
                self._put(make_event("session.updated", session=self._describe(settings)))
            case kind:
                message = f"events of type {kind!r:.100} are not supported"
                raise ApiError(400, message, param="type", code="unsupported_value")


def _parse(text: str) -> Event:
    """Read a message. Raises ApiError."""
    # Small values would need 30 times their size in memory; base64 has none of the signs that separate them.
    if sum(map(text.count, (",", "[", "{"))) > MAX_JSON_VALUES:
        raise ApiError(400, f"the message has more than {MAX_JSON_VALUES} values", code="invalid_message")
    try:
        event = pydantic_core.from_json(text)
    except ValueError as error:
        raise ApiError(400, f"the message is not JSON: {error}", code="invalid_message") from error
    if not isinstance(event, dict):
        raise ApiError(400, "the message is not a JSON object", code="invalid_message")
    return event


def _decode_audio(audio: Any) -> bytes:
    """Decode base64. Raises ApiError."""
    if not isinstance(audio, str):
        raise ApiError(400, "audio is missing: send it in base64", param="audio", code="missing_required_parameter")
    try:
        return base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"audio is not base64: {error}", param="audio", code="invalid_audio") from error


def _detail(message: str, code: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}
