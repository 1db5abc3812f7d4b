"""Use engine replicas behind Ray Serve as one TranscriptionBackend; a chunk whose replica dies is sent once more.

Replicas are found by a broadcast, which waits while they have as many chunks as they take, and are then asked every two
seconds, past Ray Serve's queues, what they serve: a replica that works answers, however much it has to do.
"""

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from graft.audio.chunking import Chunk
from graft.inference.segments import ScoredToken, Segment

from ..logs import LOG
from ..service import NO_SEGMENT, FoundLanguage, ModelInfo, ModelNotReady, Part, TranscriptionOptions

MAX_ATTEMPTS = 2
"""Replicas that a chunk is sent to: one that kills two of them is not sent to a third."""
REPLICA_DIED = (RayActorError, ObjectLostError)
ASK_PERIOD_S = 2.0
"""Seconds between two questions to a replica."""
ANSWER_TIMEOUT_S = 4.0
"""Seconds that a replica has for its answer."""
FIRST_ANSWER_TIMEOUT_S = 5.0
"""Seconds that requests wait for the first answer of all."""
MAX_SILENCE_S = 10.0
"""Seconds without an answer after which new requests are refused."""
MAX_WAIT_S = 60.0
"""Seconds without an answer after which chunks that wait for a replica are given up; a restart takes less."""


class ModelChanged(Exception):
    """A second replica transcribed a chunk differently (bf16), and the text that was already sent is not part of it."""


class RayBackend:
    """A TranscriptionBackend over a deployment handle. Chunks wait in the handle while no replica is up."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine
        self._streaming_engine = engine.options(stream=True)
        self._actors: dict[str, Any] = {}  # of the replicas that live, by their ids
        self._answers: dict[str, tuple[float, ModelInfo]] = {}  # the last of each replica, and when it came
        self._has_answer = asyncio.Event()
        self._part_at = float("-inf")  # when a replica sent the last part of a chunk, which is an answer too
        self._waits: set[asyncio.Timeout] = set()  # for parts of chunks
        self._watching: asyncio.Task[None] | None = None

    async def model_info(self) -> ModelInfo:
        """See TranscriptionBackend. Raises ModelNotReady where no replica has answered for MAX_SILENCE_S.

        Where a replica has sent parts of chunks, but has not been asked yet, the last answers of those before it hold.
        """
        if self._watching is None or self._watching.done():
            # In a context of its own, Ray Serve does not cancel it with the request.
            self._watching = asyncio.create_task(self._watch(), context=contextvars.Context())
        if not self._has_answer.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_ANSWER_TIMEOUT_S):
                    await self._has_answer.wait()
        oldest = time.monotonic() - MAX_SILENCE_S
        recent = [info for heard_at, info in self._answers.values() if heard_at >= oldest]
        known = [info for _, info in self._answers.values()] if self._part_at >= oldest else []
        return _merge(recent or known)

    async def _watch(self) -> None:
        """Ask the replicas for as long as the event loop runs."""
        start, finding = time.monotonic(), asyncio.create_task(self._find_replicas())
        while True:
            await asyncio.gather(*map(self._ask, self._actors))
            last = max([start, self._part_at, *(heard_at for heard_at, _ in self._answers.values())])
            if time.monotonic() - last > MAX_WAIT_S:
                for wait in self._waits:
                    if not wait.expired():
                        wait.reschedule(0)  # it ends now
            await asyncio.sleep(ASK_PERIOD_S if self._actors else ASK_PERIOD_S / 4)  # a replica may start any moment
            if finding.done():
                finding = asyncio.create_task(self._find_replicas())

    async def _find_replicas(self) -> None:
        with contextlib.suppress(RayServeException, RayError):
            for found in await self._engine.broadcast("replica").results_async(return_exceptions=True):
                if not isinstance(found, BaseException):
                    replica, actor = found
                    if replica not in self._actors:
                        self._actors[replica] = actor
                        await self._ask(replica)

    async def _ask(self, replica: str) -> None:
        """Ask a replica what it serves, and forget it where it has died, unless it was the last one."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                info = await self._actors[replica].__ray_call__.remote(_read_model_info)
            self._answers[replica] = time.monotonic(), info
            self._has_answer.set()
        except RayActorError:
            self._actors.pop(replica, None)
        except Exception:  # it hangs, or has no model yet: that is no answer, whatever the reason
            return
        if living := {id: answer for id, answer in self._answers.items() if id in self._actors}:
            self._answers = living

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[Part, None]:
        """See TranscriptionBackend. A second attempt yields only the text that the first did not.

        Raises ModelNotReady, ModelChanged.
        """
        sent, sent_token_count = "", 0
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            received, token_count = "", 0  # in this attempt
            try:
                async with aclosing(self._stream_from_replica(chunk, options, stream)) as parts:
                    async for part in parts:
                        if isinstance(part, Segment):
                            if received != sent:
                                raise ModelChanged
                            yield part
                            return
                        if isinstance(part, FoundLanguage):
                            yield part
                            continue
                        if isinstance(part, ScoredToken):
                            token_count += 1
                            if token_count > sent_token_count:
                                yield part
                                sent_token_count = token_count
                            continue
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
        parts = aiter(response)
        try:
            while (part := await self._next_part(parts)) is not None:
                yield part
        except RayTaskError as error:
            raise error.cause from None
        finally:
            response.cancel()

    async def _next_part(self, parts: AsyncIterator[Any]) -> Any:
        """Wait for the next part; None after the last. Raises ModelNotReady where no replica answers for MAX_WAIT_S."""
        wait = asyncio.timeout(None)
        try:
            async with wait:
                self._waits.add(wait)
                part = await anext(parts, None)
            self._part_at = time.monotonic()
            return part
        except TimeoutError as error:
            if wait.expired():
                raise ModelNotReady from error
            raise
        finally:
            self._waits.discard(wait)


def _read_model_info(actor: Any) -> ModelInfo:
    """Return what an engine replica serves; Ray runs this in the replica's process."""
    engine: Any = serve.get_replica_context().servable_object
    return engine.model_info()


def _merge(infos: list[ModelInfo]) -> ModelInfo:
    """Join what replicas tell; features count where all of them have them. Raises ModelNotReady for an empty list."""
    if not infos:
        raise ModelNotReady
    return replace(
        infos[0],
        supports_context=all(info.supports_context for info in infos),
        supports_word_timestamps=all(info.supports_word_timestamps for info in infos),
        languages=tuple(code for code in infos[0].languages if all(code in info.languages for info in infos)),
        finds_language=all(info.finds_language for info in infos),
        replicas=tuple(model for info in infos for model in info.replicas),
    )
