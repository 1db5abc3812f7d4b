"""Run a Transcriber in this process as a TranscriptionBackend, for engine replicas, tests and servers without Ray."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from graft.audio.chunking import Chunk
from graft.checkpoints.names import checkpoint_name
from graft.errors import GraftError
from graft.inference.engines.protocol import EngineCounts
from graft.inference.segments import ScoredToken
from graft.text.languages import language_code
from graft.text.prompts import check_language

from ..config import ServeArgs
from ..service import FoundLanguage, ModelInfo, Part, TranscriptionOptions

if TYPE_CHECKING:  # an ingress replica imports this file and starts sooner without torch
    from graft.inference.transcriber import Transcriber

ONLY_LANGUAGE = "en"
"""Language of a model whose prompt names none, unless the service is told another one."""


class LocalBackend:
    """A TranscriptionBackend that calls a Transcriber in this process."""

    def __init__(
        self, transcriber: "Transcriber", name: str | None = None, *, digest: str = "", language: str | None = None
    ) -> None:
        """`language` is that of requests which name none. Raises ModelError where the model's prompt cannot name it."""
        self._transcriber = transcriber
        self._active_chunks = 0
        languages = tuple(transcriber.languages)
        if not languages:
            language = language_code(language or ONLY_LANGUAGE)
        elif language:
            language = check_language(language, languages)
        elif len(languages) == 1:
            (language,) = languages
        self.info = ModelInfo(
            name or transcriber.name,
            language,
            transcriber.takes_context,
            transcriber.times_words,
            languages=languages,
            finds_language=transcriber.finds_language,
        )
        self.digest = digest

    @classmethod
    def open(cls, args: ServeArgs, model: str) -> "LocalBackend":
        """Open a model with the application's settings. Raises ModelError, MissingExtra."""
        from graft.audio.chunking import windows
        from graft.checkpoints.loading import model_digest
        from graft.inference.memory import check_memory
        from graft.inference.transcriber import open_transcriber

        if args.engine != "vllm":  # which quantizes, and refuses by itself what it has no room for
            check_memory(model, dtype=args.dtype, device=_device(args))
        digest = model_digest(model)
        transcriber = open_transcriber(
            model,
            device=_device(args),
            dtype=args.dtype,
            engine=args.engine,
            quantization=args.quantization,
            chunker=windows,  # the ingress cuts the audio; the backend gets chunks
            aligner=args.aligner,
            threads=args.threads,
        )
        # The name by which clients call the model stays when another model is loaded.
        name = args.name or checkpoint_name(args.model)
        try:
            return cls(transcriber, name, digest=digest, language=args.language)
        except GraftError:
            transcriber.close()
            raise

    async def close(self) -> None:
        """Wait for the chunks that are being transcribed, then release the model."""
        while self._active_chunks:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._transcriber.close)

    async def model_info(self) -> ModelInfo:
        """See TranscriptionBackend."""
        return self.info

    def counts(self) -> EngineCounts:
        """Return what the engine holds now and what it has done."""
        return self._transcriber.counts()

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[Part, None]:
        """See TranscriptionBackend."""
        self._active_chunks += 1
        asked: dict[str, Any] = {"context": options.context, "language": options.language}
        try:
            if options.finds_language and not options.language:
                asked["language"] = await self._transcriber.find_language([chunk])
                if asked["language"]:
                    yield FoundLanguage(asked["language"])
            if stream:
                async with aclosing(self._transcriber.stream_chunk(chunk, **asked, scored=True)) as parts:
                    async for part in parts:
                        if options.logprobs or not isinstance(part, ScoredToken):
                            yield part
            else:
                (segment,) = await self._transcriber.transcribe_chunks(
                    [chunk], **asked, words=options.word_timestamps, scored=options.logprobs, prefix=options.prefix
                )
                yield segment
        finally:
            self._active_chunks -= 1


def fits_beside(args: ServeArgs, model: str) -> bool:
    """Tell whether a model fits into memory beside the one that this process has opened with the same settings.

    vLLM takes its share of a device, whatever the model's size, so that no two fit.
    """
    from graft.inference.memory import free_memory, model_memory

    if args.engine == "vllm":
        return False
    try:
        return model_memory(model, dtype=args.dtype, device=_device(args)).total <= free_memory(_device(args))
    except (GraftError, OSError, ValueError):  # not a model: opening it says why
        return True


def _device(args: ServeArgs) -> str:
    return "cuda" if args.gpus_per_replica else "cpu"
