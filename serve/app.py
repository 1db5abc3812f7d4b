"""graft on Ray Serve: `serve run serve.app:build model=FOLDER`, or `serve deploy serve/serve.yaml`.

client -> Ingress (HTTP, decode, cut; replicas by requests) -> Engine (a Transcriber; replicas by chunks) -> segments -> client
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from graft.chunking import Chunk
from graft.transcript import Segment
from serve.api import transcription_api
from serve.arguments import ServeArgs
from serve.decoding import Decoder
from serve.keys import Keys
from serve.local import LocalListener
from serve.service import About, Asked, NotReady, Service

TRIES = 2
"""Of a chunk whose engine died: what kills two is not sent to a third."""


class Engine:
    """A replica that hears: one model, whose batches hold the chunks of any number of requests."""

    def __init__(self, args: ServeArgs) -> None:
        import torch

        torch.set_num_threads(args.threads)
        self._args = args
        self._model = args.model
        self._listener = self._open(args.model)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve calls this with `user_config`: another `model` takes over; requests that are under way end on the old one."""
        model = config.get("model", self._args.model)
        if model == self._model:
            return
        old, self._listener = self._listener, await asyncio.to_thread(self._open, model)
        self._model = model
        await old.close()

    def _open(self, model: str) -> LocalListener:
        from graft.chunking import windows
        from graft.transcriber import load

        transcriber = load(model, device="cuda" if self._args.gpus_per_replica else "cpu", dtype=self._args.dtype, cut=windows)
        return LocalListener(transcriber, self._args.name)

    async def about(self) -> About:
        """What is served now."""
        return await self._listener.about()

    async def hear(self, chunk: Chunk, asked: Asked, *, stream: bool) -> AsyncGenerator[str | Segment, None]:
        """See Listener."""
        async with aclosing(self._listener.hear(chunk, asked, stream=stream)) as parts:
            async for part in parts:
                yield part


class RemoteListener:
    """Engines behind Ray Serve as one Listener: a chunk whose engine dies is heard by another, from where its text had come to."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine
        self._streams = engine.options(stream=True)

    async def about(self) -> About:
        """See Listener. Raises NotReady."""
        try:
            return await self._engine.about.remote()
        except (RayActorError, RayServeException) as error:
            raise NotReady from error

    async def hear(self, chunk: Chunk, asked: Asked, *, stream: bool) -> AsyncGenerator[str | Segment, None]:
        """See Listener."""
        sent = 0
        for left in reversed(range(TRIES)):
            try:
                async with aclosing(self._parts(chunk, asked, stream)) as parts:
                    place = 0
                    async for part in parts:
                        if isinstance(part, Segment):
                            yield part
                            return
                        place += len(part)
                        if place > sent:
                            yield part[sent - place :]
                            sent = place
            except RayActorError:
                if not left:
                    raise

    async def _parts(self, chunk: Chunk, asked: Asked, stream: bool) -> AsyncGenerator[Any, None]:
        response: Any = self._streams.hear.remote(chunk, asked, stream=stream)
        try:
            async for part in response:
                yield part
        finally:
            response.cancel()


class Ingress:
    """A replica that answers HTTP: decodes and cuts uploads, and has their chunks heard."""

    def __init__(self, args: ServeArgs, engine: DeploymentHandle) -> None:
        self._args = args
        self._service = Service(
            Decoder(args.decode), RemoteListener(engine), max_requests=args.max_ongoing_requests, max_queued_s=args.max_queued_s
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        keys = Keys.from_environment(self._args.key_file)
        return transcription_api(self._service, keys=keys, max_upload_bytes=self._args.max_upload_bytes)


def build(args: ServeArgs) -> Application:
    """Make the application. Raises ModelError for what is no graft before a replica starts, RecipeError for keys that can't be read."""
    from graft.model.build import check_kind
    from graft.model.opening import base_graft

    check_kind(base_graft(args.model), "graft")
    Keys.from_environment(args.key_file)
    if os.path.exists(args.model):  # replicas have another working directory
        args = args.model_copy(update={"model": os.path.abspath(args.model)})
    engine = serve.deployment(
        max_ongoing_requests=args.max_ongoing_chunks,
        autoscaling_config=_autoscaling(args, args.min_replicas, args.max_replicas, args.max_ongoing_chunks),
        ray_actor_options={"num_cpus": args.threads, "num_gpus": args.gpus_per_replica},
        graceful_shutdown_timeout_s=60,
        health_check_period_s=2,
    )(Engine).bind(args)
    ingress = serve.deployment(
        max_ongoing_requests=4 * args.max_ongoing_requests,  # the ingress itself refuses, and says when to come back
        autoscaling_config=_autoscaling(args, args.min_ingress_replicas, args.max_ingress_replicas, args.max_ongoing_requests),
        graceful_shutdown_timeout_s=60,
        health_check_period_s=2,
    )(serve.ingress()(Ingress))
    return ingress.bind(args, engine)


def _autoscaling(args: ServeArgs, least: int, most: int, ongoing: int) -> dict[str, Any]:
    return {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": max(1, ongoing // 2),
        "upscale_delay_s": args.upscale_delay_s,
        "downscale_delay_s": args.downscale_delay_s,
    }
