"""Engines behind Ray Serve as one Listener: a chunk whose engine dies is heard once more, by another."""

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from graft.audio.chunking import Chunk
from graft.inference.transcript import Segment

from ..logs import LOG
from ..service import UNHEARD, ModelInfo, NotReady, TranscriptionOptions

TRIES = 2
"""Of a chunk whose engine died: what kills two is not sent to a third."""
DIED = (RayActorError, ObjectLostError)
FRESH_S = 2.0
"""For so long what an engine told of itself is not asked again."""
PATIENCE_S = 5.0
"""For so long it is waited for."""


class ModelChanged(Exception):
    """Another engine heard another text in a chunk (bf16) of which a part is told already: what was told can't be finished."""


class RayBackend:
    """See Listener. Requests wait here while no engine is up."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine
        self._streams = engine.options(stream=True)
        self._about: ModelInfo | None = None
        self._asked_at = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def about(self) -> ModelInfo:
        """See Listener. What an engine told last holds while it is asked again, also where all are busy or dead. Raises NotReady."""
        if self._about is None or time.monotonic() - self._asked_at > FRESH_S:
            if (
                self._asking is None or self._asking.done()
            ):  # one asks for all, and is not cancelled with the request that made it ask
                self._asking = asyncio.create_task(self._refresh(), context=contextvars.Context())
            if self._about is None:
                await asyncio.wait([self._asking])
        if self._about is None:
            raise NotReady
        return self._about

    async def _refresh(self) -> None:
        with contextlib.suppress(TimeoutError, NotReady):
            async with asyncio.timeout(PATIENCE_S):
                self._about = await self._ask()
        self._asked_at = time.monotonic()

    async def _ask(self) -> ModelInfo:
        try:
            try:
                return await self._engine.about.remote()
            except RayActorError:  # it has just died: the next one tells
                return await self._engine.about.remote()
        except (RayActorError, RayServeException, RayTaskError) as error:
            raise NotReady from error

    async def hear(
        self, chunk: Chunk, asked: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[str | Segment, None]:
        """See Listener. Of a chunk that is heard once more, only what is not told yet is. Raises NotReady, ModelChanged."""
        told = ""
        for left in reversed(range(TRIES)):
            heard = ""
            try:
                async with aclosing(self._parts(chunk, asked, stream)) as parts:
                    async for part in parts:
                        if isinstance(part, Segment):
                            if heard != told:
                                raise ModelChanged
                            yield part
                            return
                        heard += part
                        if not (heard.startswith(told) or told.startswith(heard)):
                            raise ModelChanged
                        if rest := heard[len(told) :]:
                            yield rest
                            told = heard
                raise RuntimeError(UNHEARD)
            except DIED as error:
                LOG.warning("an engine died", extra={"chunk_start_s": chunk.start_s, "tries_left": left})
                if not left:
                    raise NotReady from error
            except RayServeException as error:
                raise NotReady from error

    async def _parts(self, chunk: Chunk, asked: TranscriptionOptions, stream: bool) -> AsyncGenerator[Any, None]:
        """What an engine says. Raises what went wrong there as it was: Ray's own message has the engine's traceback, with its paths."""
        response: Any = self._streams.hear.remote(chunk, asked, stream=stream)
        try:
            async for part in response:
                yield part
        except RayTaskError as error:
            raise error.cause from None
        finally:
            response.cancel()
