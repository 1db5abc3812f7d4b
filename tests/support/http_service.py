"""Run the HTTP API over a Transcriber in this process, without Ray, behind a real server on loopback."""

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
from serve.http.middleware import ApiKeys
from serve.service import Service, TranscriptionBackend

LIMITS: dict[str, Any] = {"max_requests": 64, "max_queued_s": 7_200}


@contextlib.contextmanager
def open_decoder(**args: Any) -> Iterator[Decoder]:
    """Run processes that decode until the block ends; `args` are those of DecodeArgs."""
    with contextlib.closing(Decoder(DecodeArgs(**args))) as decoder:
        yield decoder


@contextlib.contextmanager
def open_backend(folder: Path, **options: Any) -> Iterator[LocalBackend]:
    """Load a graft as a backend until the block ends; `options` are those of open_transcriber."""
    backend = LocalBackend(open_transcriber(folder, **options))
    try:
        yield backend
    finally:
        asyncio.run(backend.close())


@contextlib.contextmanager
def serve_api(decoder: Decoder, backend: TranscriptionBackend, **settings: Any) -> Iterator[str]:
    """Serve the API until the block ends; yields its URL. `settings` are those of make_api."""
    with run_server(make_api(decoder, backend, **settings)) as url:
        yield url


def make_api(
    decoder: Decoder, backend: TranscriptionBackend, *, keys: tuple[str, ...] = (), limits: Any = None, **settings: Any
) -> FastAPI:
    """Create the API with generous limits, except for those in `limits` (of Service) and `settings` (of the API)."""
    service = Service(decoder, backend, **LIMITS | (limits or {}))
    return transcription_api(service, keys=ApiKeys(keys), **{"max_upload_bytes": 25_000_000} | settings)


@contextlib.contextmanager
def run_server(app: ASGIApp) -> Iterator[str]:
    """Serve an application until the block ends; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
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
