"""graft on Ray Serve: `serve run serve.app:build model=FOLDER`, or `serve deploy serve/serve.yaml`.

client -> Ingress (HTTP, decode, cut; replicas by requests) -> Engine (a Transcriber; replicas by chunks) -> segments -> client
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from graft.audio.chunking import Chunk
from graft.checkpoints.names import from_anywhere
from graft.errors import GraftError
from graft.inference.engines.protocol import EngineCounts
from graft.inference.transcript import Segment

from .backends.local import LocalBackend
from .backends.ray_handle import RayBackend
from .config import ServeArgs
from .decode.decoder import Decoder
from .http.api import transcription_api
from .http.auth import Keys
from .logs import LOG, log_through_serve
from .metrics import EngineMetrics, RequestMetrics, every_second
from .service import ModelInfo, NotReady, Service, TranscriptionOptions

LOGS = {"encoding": "JSON", "enable_access_log": False}  # the ingress tells of each request itself


class Engine:
    """A replica that hears: one model, whose batches hold the chunks of any number of requests."""

    def __init__(self, args: ServeArgs) -> None:
        log_through_serve()
        self._args = args
        self._metrics = EngineMetrics()
        self._model = ""
        self._listener: LocalBackend | None = None
        self._standing: asyncio.Task[None] | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve calls this with `user_config` at the start and when it changes: its model takes over.

        Requests that are under way end on the old one. A model that can't be opened leaves the old one in place, and an error in the log.
        """
        model = config.get("model", self._args.model)
        if model == self._model:
            return
        try:
            new = await asyncio.to_thread(LocalBackend.open, self._args, model)
        except GraftError as error:
            if self._listener is None:
                raise
            LOG.error("the model stays as it was: %s", error)
            return
        LOG.info("a model is open")
        old, self._listener, self._model = self._listener, new, model
        if old is None:
            self._standing = asyncio.create_task(every_second(lambda: self._metrics.stand(self._loaded().counts())))
        else:
            await old.close()

    def _loaded(self) -> LocalBackend:
        if self._listener is None:
            raise NotReady
        return self._listener

    async def about(self) -> ModelInfo:
        """What is served now."""
        return await self._loaded().about()

    async def counts(self) -> EngineCounts:
        """What this replica holds and has done."""
        return self._loaded().counts()

    async def hear(
        self, chunk: Chunk, asked: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[str | Segment, None]:
        """See Listener."""
        start = time.monotonic()
        async with aclosing(self._loaded().hear(chunk, asked, stream=stream)) as parts:
            async for part in parts:
                if isinstance(part, Segment):
                    self._tell(chunk, time.monotonic() - start)
                yield part

    def _tell(self, chunk: Chunk, seconds: float) -> None:
        audio_s = chunk.clip.duration_s
        self._metrics.heard(audio_s)
        LOG.info("a chunk was heard", extra={"audio_s": round(audio_s, 3), "seconds": round(seconds, 3)})


class Ingress:
    """A replica that answers HTTP: decodes and cuts uploads, and has their chunks heard.

    `keys` are those of the process that built the application; others stand in the replica's own environment and in the file.
    """

    def __init__(self, args: ServeArgs, engine: DeploymentHandle, keys: Keys) -> None:
        log_through_serve()
        self._args, self._keys = args, keys
        self._metrics = RequestMetrics()
        self._service = Service(
            Decoder(args.decode),
            RayBackend(engine),
            max_requests=args.max_ongoing_requests,
            max_queued_s=args.max_queued_s,
            observer=self._metrics,
        )
        self._standing = asyncio.create_task(every_second(lambda: self._metrics.stand(self._service)))

    def __serve_build_asgi_app__(self) -> FastAPI:
        keys = self._keys | Keys.from_environment(self._args.key_file)
        if not keys:
            LOG.warning("no API keys were given: everyone may ask")
        return transcription_api(
            self._service,
            keys=keys,
            max_upload_bytes=self._args.max_upload_bytes,
            observer=self._metrics,
            tells_id=False,
        )


def build(args: ServeArgs) -> Application:
    """Make the application.

    Raises ModelError for what is no graft or no aligner before a replica starts, RecipeError for keys that can't be read.
    """
    from graft.checkpoints.loading import check_graft
    from graft.inference.aligners.loading import find_aligner

    check_graft(args.model)
    Keys.from_environment(args.key_file)
    args = args.model_copy(update={"model": from_anywhere(args.model)})  # replicas have another working directory
    if args.key_file:
        args = args.model_copy(update={"key_file": os.path.abspath(args.key_file)})
    if args.aligner:
        args = args.model_copy(update={"aligner": find_aligner(args.aligner)[0]})
    engine = serve.deployment(
        user_config={"model": args.model},
        max_ongoing_requests=args.max_ongoing_chunks,
        autoscaling_config=_autoscaling(args, args.min_replicas, args.max_replicas, args.max_ongoing_chunks),
        ray_actor_options={"num_cpus": args.threads, "num_gpus": args.gpus_per_replica},
        graceful_shutdown_timeout_s=60,
        health_check_period_s=2,
        logging_config=LOGS,
    )(Engine).bind(args)
    ingress = serve.deployment(
        max_ongoing_requests=4 * args.max_ongoing_requests,  # the ingress itself refuses, and says when to come back
        autoscaling_config=_autoscaling(
            args, args.min_ingress_replicas, args.max_ingress_replicas, args.max_ongoing_requests
        ),
        graceful_shutdown_timeout_s=60,
        health_check_period_s=2,
        logging_config=LOGS,
    )(serve.ingress()(Ingress))
    return ingress.bind(args, engine, Keys.from_environment())


def _autoscaling(args: ServeArgs, least: int, most: int, ongoing: int) -> dict[str, Any]:
    return {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": max(1, ongoing // 2),
        "upscale_delay_s": args.upscale_delay_s,
        "downscale_delay_s": args.downscale_delay_s,
    }
