"""A Transcriber in this process as the Listener of a Service: for tests, notebooks and servers without Ray."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from graft.audio.chunking import Chunk
from graft.checkpoints.names import checkpoint_name
from graft.inference.engines.protocol import EngineCounts
from graft.inference.transcript import Segment

from ..config import ServeArgs
from ..service import ModelInfo, TranscriptionOptions

if TYPE_CHECKING:  # an ingress, which hears nothing itself, is there sooner without torch
    from graft.inference.transcriber import Transcriber


def served_name(args: ServeArgs) -> str:
    """What clients call the model; it stays when another model takes over."""
    return args.name or checkpoint_name(args.model)


class LocalBackend:
    """See Listener."""

    def __init__(self, transcriber: "Transcriber", name: str | None = None) -> None:
        self._transcriber = transcriber
        self._hearing = 0
        self._about = ModelInfo(name or transcriber.name, "en", transcriber.takes_context, transcriber.times_words)

    @classmethod
    def open(cls, args: ServeArgs, model: str) -> "LocalBackend":
        """Open a model with the settings of the application. Raises ModelError, MissingExtra."""
        from graft.audio.chunking import windows
        from graft.inference.transcriber import open_transcriber

        transcriber = open_transcriber(
            model,
            device="cuda" if args.gpus_per_replica else "cpu",
            dtype=args.dtype,
            engine=args.engine,
            quantization=args.quantization,
            chunker=windows,  # the ingress cuts the audio; the backend gets chunks
            aligner=args.aligner,
            threads=args.threads,
        )
        return cls(transcriber, served_name(args))

    async def close(self) -> None:
        """Release the model, once nothing is being heard."""
        while self._hearing:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._transcriber.close)

    async def about(self) -> ModelInfo:
        """See Listener."""
        return self._about

    def counts(self) -> EngineCounts:
        """What the engine holds and has done."""
        return self._transcriber.counts()

    async def hear(
        self, chunk: Chunk, asked: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[str | Segment, None]:
        """See Listener."""
        self._hearing += 1
        try:
            if stream:
                async with aclosing(self._transcriber.stream_chunk(chunk, context=asked.context)) as parts:
                    async for part in parts:
                        yield part
            else:
                (segment,) = await self._transcriber.transcribe_chunks(
                    [chunk], context=asked.context, words=asked.words
                )
                yield segment
        finally:
            self._hearing -= 1
