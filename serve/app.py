"""Serve graft on Ray Serve: `graft serve`, `serve run serve.app:build model=FOLDER` or `serve deploy serve/serve.yaml`.

client -> Ingress (HTTP, decode, cut; scaled by requests) -> Engine (Transcriber; scaled by chunks) -> text -> client
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from graft.audio.chunking import Chunk
from graft.checkpoints.names import absolute_checkpoint
from graft.inference.engines.protocol import EngineCounts
from graft.inference.segments import Segment

from .backends.last_model import LastModel
from .backends.local import LocalBackend, fits_beside
from .backends.ray_handle import RayBackend
from .backends.replaceable import ReplaceableModel
from .config import ServeArgs
from .decode.decoder import Decoder
from .http.api import transcription_api
from .http.middleware import ApiKeys
from .logs import LOG, log_through_ray_serve
from .metrics import EngineMetrics, RequestMetrics, call_every_second
from .service import CHUNKS_PER_REQUEST, ModelInfo, ModelNotReady, Part, Service, TranscriptionOptions

COMMON_SETTINGS: dict[str, Any] = {
    "graceful_shutdown_timeout_s": 60,
    "health_check_period_s": 2,
    "logging_config": {"encoding": "JSON", "enable_access_log": False},  # RequestMiddleware writes the access log
}
"""Settings of both deployments."""


class Engine:
    """A replica that holds one model and decodes the chunks of any number of requests in shared batches."""

    def __init__(self, args: ServeArgs) -> None:
        log_through_ray_serve()
        replica = serve.get_replica_context()
        self._args = args
        self._metrics = EngineMetrics()
        self._last = LastModel(replica.app_name, args.model)
        self._model = ReplaceableModel(
            replica.replica_tag, partial(LocalBackend.open, args), partial(fits_beside, args)
        )
        self._wanted: str | None = None
        # Tasks are kept, because the event loop holds them weakly.
        self._sampling: asyncio.Task[None] | None = None
        self._changes: set[asyncio.Task[None]] = set()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Open the model that `user_config` names; Ray Serve calls this at the start and when `user_config` changes.

        At the start, the model that engines opened last, or else that of the arguments, takes the place of one that
        cannot be opened. Later, the new model replaces the open one, which stays where the new one cannot be opened.
        Ray Serve sends no chunks to a replica that is in here. It is left at once where both models fit into memory.
        """
        wanted = config.get("model", self._args.model)
        if wanted == self._wanted:
            return
        is_first, self._wanted = self._wanted is None, wanted
        if is_first:
            last = await asyncio.to_thread(self._last.read)
            await self._model.open([wanted, *([last] if last else []), self._args.model])
            self._sampling = asyncio.create_task(call_every_second(self._sample))
            await self._remember()
            return
        fits = await self._model.fits(wanted)
        change = asyncio.create_task(self._replace(wanted))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        if not fits:  # meanwhile other replicas answer, if there are any: Ray Serve changes one after the other
            await change

    async def _replace(self, model: str) -> None:
        await self._model.replace(model)
        await self._remember()

    async def _remember(self) -> None:
        if self._model.path == self._wanted:
            await asyncio.to_thread(self._last.write, self._model.path)

    def _sample(self) -> None:
        self._metrics.sample(self._model.counts())
        self._metrics.sample_model(self._model.model_info().replicas[0])

    def check_health(self) -> None:
        """Raise ModelNotReady where only another process can open a model: Ray Serve then replaces this one."""
        if self._model.is_lost:
            raise ModelNotReady

    async def replica(self) -> tuple[str, ActorHandle]:
        """Return the replica's id and its actor, which can be asked for `model_info` while it takes no more calls."""
        return serve.get_replica_context().replica_tag, ray.get_runtime_context().current_actor

    def model_info(self) -> ModelInfo:
        """Return what is served now. Raises ModelNotReady."""
        return self._model.model_info()

    async def counts(self) -> EngineCounts:
        """Return what the engine holds now and what it has done."""
        return self._model.counts()

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[Part, None]:
        """See TranscriptionBackend."""
        start = time.monotonic()
        async with aclosing(self._model.transcribe_chunk(chunk, options, stream=stream)) as parts:
            async for part in parts:
                if isinstance(part, Segment):
                    audio_s, seconds = chunk.clip.duration_s, time.monotonic() - start
                    self._metrics.on_chunk(audio_s)
                    fields = {"audio_s": round(audio_s, 3), "seconds": round(seconds, 3)}
                    LOG.info("a chunk was transcribed", extra=fields)
                yield part


class Ingress:
    """A replica that answers HTTP: it decodes and cuts uploads and sends their chunks to engine replicas.

    `keys` are those of the process that built the application; the replica adds those in its own environment and in the
    key file.
    """

    def __init__(self, args: ServeArgs, engine: DeploymentHandle, keys: ApiKeys) -> None:
        log_through_ray_serve()
        self._args = args
        self._keys = keys | ApiKeys.from_environment(args.key_file)
        self._metrics = RequestMetrics()
        self._service = Service(
            Decoder(args.decode),
            RayBackend(engine),
            max_requests=args.max_ongoing_requests,
            max_queued_s=args.max_queued_s,
            max_requests_per_client=_requests_per_key(args, len(self._keys)),
            max_chunks=args.max_ongoing_chunks * args.max_replicas,
            max_chunks_per_client=_chunks_per_key(args, len(self._keys)),
            observer=self._metrics,
        )
        self._sampling = asyncio.create_task(call_every_second(lambda: self._metrics.sample(self._service)))

    def __serve_build_asgi_app__(self) -> FastAPI:
        if not self._keys:
            LOG.warning("there are no API keys: requests are not authenticated")
        return transcription_api(
            self._service,
            keys=self._keys,
            max_upload_bytes=self._args.max_upload_bytes,
            min_upload_bytes_per_s=self._args.min_upload_bytes_per_s,
            request_timeout_s=self._args.request_timeout_s,
            observer=self._metrics,
            sends_id=False,
            aliases=self._args.aliases,
            cors_origins=self._args.cors_origins,
            strict=self._args.strict,
            max_sessions=self._args.max_live_sessions,
            max_early_passes=self._args.max_replicas,
        )

    async def stop(self) -> None:
        """Accept no more requests, and return when those that were accepted have been transcribed."""
        await self._service.stop()


def _requests_per_key(args: ServeArgs, key_count: int) -> int:
    """Return the requests that a client may have; all, where there are no keys by which clients can be told apart."""
    total = args.max_ongoing_requests
    if not key_count:
        return total
    return args.max_ongoing_requests_per_key or (total if key_count == 1 else max(1, total // 2))


def _chunks_per_key(args: ServeArgs, key_count: int) -> int | None:
    """Return the chunks that a client may have in the engines; None is its share.

    A CPU takes seconds for a chunk and gains little from large batches: what one key has there, others wait for.
    """
    return None if args.gpus_per_replica or key_count < 2 else CHUNKS_PER_REQUEST * args.max_replicas


def build(args: ServeArgs) -> Application:
    """Build the Ray Serve application.

    Raises ModelError for an unusable model, aligner or language, and RecipeError for unreadable keys, before a replica
    starts.
    """
    from graft.checkpoints.loading import check_model
    from graft.inference.aligners.loading import find_aligner

    check_model(args.model, engine=args.engine)
    ApiKeys.from_environment(args.key_file)
    # Paths become absolute, because replicas have another working directory.
    absolute = {
        "model": absolute_checkpoint(args.model),
        "key_file": args.key_file and os.path.abspath(args.key_file),
        "aligner": args.aligner and find_aligner(args.aligner)[0],
        "language": args.language and _check_language(args),
    }
    args = args.model_copy(update=absolute)
    engine = serve.deployment(
        user_config={"model": args.model},
        max_ongoing_requests=args.max_ongoing_chunks,
        autoscaling_config=_autoscaling_config(args, args.min_replicas, args.max_replicas, args.max_ongoing_chunks),
        ray_actor_options={"num_cpus": args.threads, "num_gpus": args.gpus_per_replica},
        **COMMON_SETTINGS,
    )(Engine).bind(args)
    ingress = serve.deployment(
        # The ingress refuses requests itself, with a Retry-After: it never has as many, those that arrive included.
        max_ongoing_requests=8 * args.max_ongoing_requests,
        autoscaling_config=_autoscaling_config(
            args, args.min_ingress_replicas, args.max_ingress_replicas, args.max_ongoing_requests
        ),
        **COMMON_SETTINGS,
    )(serve.ingress()(Ingress))
    return ingress.bind(args, engine, ApiKeys.from_environment())


def _check_language(args: ServeArgs) -> str:
    """Return the code of the service's language. Raises ModelError where the model's prompt cannot name it."""
    from graft.checkpoints.loading import open_speech_processor
    from graft.text.languages import language_code
    from graft.text.prompts import check_language

    known, language = open_speech_processor(args.model).languages, args.language or ""
    return check_language(language, known) if known else language_code(language)


def _autoscaling_config(args: ServeArgs, min_replicas: int, max_replicas: int, max_ongoing: int) -> dict[str, Any]:
    return {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "target_ongoing_requests": max(1, max_ongoing // 2),
        "upscale_delay_s": args.upscale_delay_s,
        "downscale_delay_s": args.downscale_delay_s,
    }
