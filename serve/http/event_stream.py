"""Send a transcription as server-sent events: its text in parts, comments while there is none, then all of it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeAlias

from fastapi.responses import StreamingResponse

from graft.inference.segments import ScoredToken
from graft.inference.transcript import Transcript

from ..logs import LOG
from ..service import TranscriptionOptions
from .errors import describe_exception, error_response
from .schema import convert_tokens, format_event, token_usage

KEEP_ALIVE_S = 15.0
"""Seconds without text after which a stream sends a comment, so that nobody on the way takes it for dead."""
NO_TRANSCRIPT = "a stream ended without its transcript"
COMMENT = b": no text yet\n\n"
StreamPart: TypeAlias = str | ScoredToken | Transcript


async def stream_events(
    parts: AsyncGenerator[StreamPart, None],
    upload: AsyncExitStack,
    options: TranscriptionOptions,
    keep_alive_s: float,
    headers: Mapping[str, str],
) -> StreamingResponse:
    """Return a stream of events, and of a comment after each `keep_alive_s` seconds without text.

    `parts` are those of Service.stream; `upload` is closed at their end. An error within `keep_alive_s` seconds and
    before the first text is raised, so that the response gets its status. Any other becomes an event.
    """
    paused = _with_pauses(parts, upload, keep_alive_s)
    first = await anext(paused)

    async def events() -> AsyncIterator[bytes]:
        text, part = "", first
        tokens: list[ScoredToken] = []
        new_tokens: list[ScoredToken] = []  # since the last event
        async with aclosing(paused):
            try:
                while not isinstance(part, Transcript):
                    if part is None:
                        yield COMMENT
                    elif isinstance(part, ScoredToken):
                        new_tokens.append(part)
                    else:
                        text += part
                        yield event("transcript.text.delta", {"delta": part}, new_tokens)
                        tokens += new_tokens
                        new_tokens = []
                    part = await anext(paused)
                done = {"text": text, "usage": token_usage(part).model_dump()}  # the text is all deltas joined
                yield event("transcript.text.done", done, tokens + new_tokens)
            except Exception as error:
                LOG.error("a stream failed: %s", describe_exception(error))
                yield b"data: " + bytes(error_response(error).body) + b"\n\n"

    def event(kind: str, data: Mapping[str, Any], tokens: Iterable[ScoredToken]) -> bytes:
        logprobs = {"logprobs": [token.model_dump() for token in convert_tokens(tokens)]} if options.logprobs else {}
        return format_event({"type": kind, **data, **logprobs})

    headers = {"Cache-Control": "no-cache", **headers}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def _with_pauses(
    parts: AsyncGenerator[StreamPart, None], upload: AsyncExitStack, pause_s: float
) -> AsyncGenerator[StreamPart | None, None]:
    """Yield what a generator yields, and None after each `pause_s` seconds in which it yields nothing."""
    queue: asyncio.Queue[StreamPart | Exception] = asyncio.Queue()

    async def fill() -> None:
        try:
            async with upload, aclosing(parts):
                async for part in parts:
                    queue.put_nowait(part)
        except Exception as error:
            queue.put_nowait(error)
        finally:  # nobody reads this after a transcript or an error
            queue.put_nowait(RuntimeError(NO_TRANSCRIPT))

    # One task runs the generator from its beginning to its end, as whoever cancels parts of it expects.
    task = asyncio.create_task(fill())
    try:
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    part = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(part, Exception):
                raise part
            yield part
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
