"""A Transcriber in this process as the Listener of a Service: for tests, notebooks and servers without Ray."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from graft.chunking import Chunk
from graft.transcriber import Transcriber
from graft.transcript import Segment
from serve.service import About, Asked


class LocalListener:
    """See Listener."""

    def __init__(self, transcriber: Transcriber, name: str | None = None) -> None:
        self._transcriber = transcriber
        self._hearing = 0
        self._about = About(name or transcriber.name, "en", transcriber.takes_context, transcriber.times_words)

    async def close(self) -> None:
        """Release the model, once nothing is being heard."""
        while self._hearing:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._transcriber.close)

    async def about(self) -> About:
        """See Listener."""
        return self._about

    async def hear(self, chunk: Chunk, asked: Asked, *, stream: bool) -> AsyncGenerator[str | Segment, None]:
        """See Listener."""
        self._hearing += 1
        try:
            if stream:
                async with aclosing(self._transcriber.stream_chunk(chunk, context=asked.context)) as parts:
                    async for part in parts:
                        yield part
            else:
                (segment,) = await self._transcriber.transcribe_chunks([chunk], context=asked.context, words=asked.words)
                yield segment
        finally:
            self._hearing -= 1
