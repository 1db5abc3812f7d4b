"""A service to ask: the API and a Transcriber in this process, without Ray, behind a real server on loopback."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from graft.inference.transcriber import open_transcriber
from serve.backends.local import LocalBackend
from serve.decode.decoder import DecodeArgs, Decoder
from serve.http.api import transcription_api
from serve.http.auth import Keys
from serve.service import Service, TranscriptionBackend

LIMITS: dict[str, Any] = {"max_requests": 64, "max_queued_s": 7_200}


@contextlib.contextmanager
def decoder(**args: Any) -> Iterator[Decoder]:
    """Processes that decode."""
    running = Decoder(DecodeArgs(**args))
    try:
        yield running
    finally:
        running.close()


@contextlib.contextmanager
def listener(folder: Path, **options: Any) -> Iterator[LocalBackend]:
    """Whoever hears with a graft."""
    local = LocalBackend(open_transcriber(folder, **options))
    try:
        yield local
    finally:
        asyncio.run(local.close())


@contextlib.contextmanager
def served(
    decoding: Decoder, hearing: TranscriptionBackend, *, keys: tuple[str, ...] = (), limits: Any = None, **settings: Any
) -> Iterator[str]:
    """The address of a service of these; what `limits` and `settings` leave out is generous."""
    with running(api_of(decoding, hearing, keys=keys, limits=limits, **settings)) as url:
        yield url


def api_of(
    decoding: Decoder, hearing: TranscriptionBackend, *, keys: tuple[str, ...] = (), limits: Any = None, **settings: Any
) -> FastAPI:
    service = Service(decoding, hearing, **LIMITS | (limits or {}))
    return transcription_api(service, keys=Keys(list(keys)), **{"max_upload_bytes": 25_000_000} | settings)


@contextlib.contextmanager
def running(api: ASGIApp) -> Iterator[str]:
    """The address of an application."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
