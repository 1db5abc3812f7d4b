"""Use engine replicas behind Ray Serve as one TranscriptionBackend; a chunk whose replica dies is sent once more."""

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
from ..service import NO_SEGMENT, ModelInfo, ModelNotReady, TranscriptionOptions

MAX_ATTEMPTS = 2
"""Replicas that a chunk is sent to: one that kills two of them is not sent to a third."""
REPLICA_DIED = (RayActorError, ObjectLostError)
INFO_MAX_AGE_S = 2.0
"""Seconds for which a replica's ModelInfo is used before it is requested again."""
INFO_TIMEOUT_S = 5.0
"""Seconds that a request for ModelInfo may take."""


class ModelChanged(Exception):
    """A second replica transcribed a chunk differently (bf16), and the text that was already sent is not part of it."""


class RayBackend:
    """A TranscriptionBackend over a deployment handle. Chunks wait in the handle while no replica is up."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine
        self._streaming_engine = engine.options(stream=True)
        self._info: ModelInfo | None = None
        self._refreshed_at = 0.0
        self._refreshing: asyncio.Task[None] | None = None

    async def model_info(self) -> ModelInfo:
        """See TranscriptionBackend.

        A known ModelInfo is returned at once, even while all replicas are busy or dead; it is refreshed afterwards.
        """
        if self._info is None or time.monotonic() - self._refreshed_at > INFO_MAX_AGE_S:
            # One task refreshes for all callers. In a context of its own, Ray Serve does not cancel it with a request.
            if self._refreshing is None or self._refreshing.done():
                self._refreshing = asyncio.create_task(self._refresh(), context=contextvars.Context())
            if self._info is None:
                await asyncio.wait([self._refreshing])
        if self._info is None:
            raise ModelNotReady
        return self._info

    async def _refresh(self) -> None:
        with contextlib.suppress(TimeoutError, RayActorError, RayServeException, RayTaskError):
            async with asyncio.timeout(INFO_TIMEOUT_S):
                try:
                    self._info = await self._engine.model_info.remote()
                except RayActorError:  # that replica has just died: ask another
                    self._info = await self._engine.model_info.remote()
        self._refreshed_at = time.monotonic()

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[str | Segment, None]:
        """See TranscriptionBackend. A second attempt yields only the text that the first did not.

        Raises ModelNotReady, ModelChanged.
        """
        sent = ""
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            received = ""  # in this attempt
            try:
                async with aclosing(self._stream_from_replica(chunk, options, stream)) as parts:
                    async for part in parts:
                        if isinstance(part, Segment):
                            if received != sent:
                                raise ModelChanged
                            yield part
                            return
                        received += part
                        if not (received.startswith(sent) or sent.startswith(received)):
                            raise ModelChanged
                        if rest := received[len(sent) :]:
                            yield rest
                            sent = received
                raise RuntimeError(NO_SEGMENT)
            except REPLICA_DIED as error:
                LOG.warning(
                    "an engine replica died", extra={"chunk_start_s": chunk.start_s, "tries_left": attempts_left}
                )
                if not attempts_left:
                    raise ModelNotReady from error
            except RayServeException as error:
                raise ModelNotReady from error

    async def _stream_from_replica(
        self, chunk: Chunk, options: TranscriptionOptions, stream: bool
    ) -> AsyncGenerator[Any, None]:
        """Yield what one replica yields. Its exceptions are unwrapped, because Ray's contain tracebacks with paths."""
        response: Any = self._streaming_engine.transcribe_chunk.remote(chunk, options, stream=stream)
        try:
            async for part in response:
                yield part
        except RayTaskError as error:
            raise error.cause from None
        finally:
            response.cancel()
