"""Transcriber: audio of any length in, transcripts out; the same object in bulk, online and at the prompt.

audio -> read_audio -> chunks of up to 30 s -> features and prompt -> Engine -> guards -> Aligner -> Segment -> stitch -> Transcript
"""

import asyncio
import math
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

import torch

from graft.audio.chunking import Chunk, Chunker, windows
from graft.audio.clip import AudioClip, read_audio
from graft.checkpoints.loading import DTYPES, open_graft
from graft.checkpoints.names import checkpoint_name
from graft.errors import AudioError, ModelError
from graft.inference.aligners.loading import open_aligner
from graft.inference.aligners.protocol import Aligner
from graft.inference.engines.protocol import Engine, EngineCounts, EngineRequest, Token
from graft.inference.engines.sampling import repeats
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.inference.hallucination import NO_REPEAT_NGRAM, QualityVerdict, check_quality, pick_better
from graft.inference.transcript import Segment, Transcript, Word, stitch
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import GraftProcessor

Audio: TypeAlias = str | os.PathLike[str] | bytes | AudioClip
"""A path, the bytes of a file, or samples."""

BATCH_TOKENS = {"cpu": 16_384, "cuda": 65_536}
ChunkFunction = Callable[[AudioClip], list[Chunk]]
"""Cuts a clip into chunks of at most 30 s: a Chunker, which skips what is no speech, or `windows`, which skips nothing."""

PREFILL_TOKENS = {"cpu": 1_024, "cuda": 8_192}
"""Of prompts that are read between two steps: what waits for them is everyone's next word."""

T = TypeVar("T")


class Transcriber:
    """Transcribes with an engine and the processor of its model; `name` stands in the transcripts.

    Any number of threads and event loops may use one at once: their chunks share the engine's batches. `chunker` cuts a
    clip into chunks. What the guards find suspicious is decoded once more, with n-grams blocked, and flagged if it stays so. With an `aligner`, segments have
    words.
    """

    def __init__(
        self,
        engine: Engine,
        processor: GraftProcessor,
        name: str,
        *,
        chunker: ChunkFunction = windows,
        aligner: Aligner | None = None,
    ) -> None:
        self.name = name
        self._engine = engine
        self._processor = processor
        self._chunker = chunker
        self._aligner = aligner
        self._tokenizing = threading.Lock()  # fast tokenizers refuse a second thread at times ("Already borrowed")
        # One thread prepares while the engine decodes; more would only fight over cores and the GIL.
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-prepare")
        self._aligning = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-align")

    def transcribe(
        self,
        audio: Audio,
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        words: bool | None = None,
    ) -> Transcript:
        """Transcribe one recording of any length.

        `instruction` names a text style (raw, lower, formatted) or is a phrasing that asks for one; `context` lists words that may occur;
        `words` says whether segments have words with times, by default wherever there is an aligner.
        Raises AudioError if the recording can't be read, ModelError for a style or context that the model was not trained for, and for
        words without an aligner.
        """
        return _run(self.transcribe_async(audio, instruction=instruction, context=context, words=words))

    def transcribe_many(
        self,
        audios: Sequence[Audio],
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        words: bool | None = None,
    ) -> list[Transcript | AudioError]:
        """Transcribe recordings together; one that can't be read has its AudioError in its place. Raises ModelError as `transcribe`.

        All are prepared before the first is decoded, so that the engine's batches are full, and the same at every call.
        """
        asked, timed = self._processor.instruction(instruction, context), self._times(words)

        async def prepare(audio: Audio) -> "_Prepared | AudioError":
            try:
                return await self._in_background(self._prepare, audio, asked)
            except AudioError as error:
                return error

        async def decode(prepared: "_Prepared | AudioError") -> Transcript | AudioError:
            return prepared if isinstance(prepared, AudioError) else await self._decode(prepared, timed)

        async def transcribe_all() -> list[Transcript | AudioError]:
            return await asyncio.gather(*map(decode, await asyncio.gather(*map(prepare, audios))))

        return _run(transcribe_all())

    async def transcribe_async(
        self,
        audio: Audio,
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        words: bool | None = None,
    ) -> Transcript:
        """Transcribe one recording without blocking the event loop; cancelling frees its place in the engine. Raises as `transcribe`."""
        asked, timed = self._processor.instruction(instruction, context), self._times(words)
        return await self._decode(await self._in_background(self._prepare, audio, asked), timed)

    async def transcribe_chunks(
        self,
        chunks: Sequence[Chunk],
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        words: bool | None = None,
    ) -> list[Segment]:
        """Transcribe chunks that are cut already; a segment for each, in their order. Raises ModelError as `transcribe`."""
        asked, timed = self._processor.instruction(instruction, context), self._times(words)
        return await asyncio.gather(*(self._hear(chunk, asked, timed) for chunk in chunks))

    async def stream_chunk(
        self, chunk: Chunk, *, instruction: str | None = None, context: Sequence[str] | None = None
    ) -> AsyncGenerator[str | Segment, None]:
        """Yield a chunk's text in parts as it comes, and at last its segment, whose text is those parts joined.

        Nothing is taken back: what the guards find suspicious is flagged, but not decoded again. Raises ModelError as `transcribe`.
        """
        asked = self._processor.instruction(instruction, context)
        request = await self._in_background(self._request, chunk.clip, asked)
        tokens: list[Token] = []
        sent = ""
        async with aclosing(self._engine.stream(request)) as stream:
            async for token in stream:
                tokens.append(token)
                text = self._text(tokens).rstrip("\ufffd").rstrip()  # a character may take several tokens
                if len(text) > len(sent) and text.startswith(sent):
                    yield text[len(sent) :]
                    sent = text
        judged = self._judged(chunk, request, tokens)
        if rest := judged.text.removeprefix(sent):
            yield rest
        yield await self._segment(chunk, judged, words=False)

    @property
    def takes_context(self) -> bool:
        """Whether the model was trained for lists of words that may occur."""
        return self._processor.trained_context

    @property
    def times_words(self) -> bool:
        """Whether there is an aligner."""
        return self._aligner is not None

    def counts(self) -> EngineCounts:
        """What the engine holds and has done, for benchmarks and metrics."""
        return self._engine.counts()

    def close(self) -> None:
        """Stop the engine and release the model."""
        self._engine.close()
        self._preparing.shutdown()
        self._aligning.shutdown()

    def _prepare(self, audio: Audio, instruction: str) -> "_Prepared":
        clip = audio if isinstance(audio, AudioClip) else read_audio(audio)
        chunks = self._chunker(clip)
        return _Prepared(clip.duration_s, chunks, [self._request(chunk.clip, instruction) for chunk in chunks])

    def _request(self, clip: AudioClip, instruction: str) -> EngineRequest:
        features = self._processor.featurizer(clip)
        with self._tokenizing:
            prompt_ids = self._processor.prompt_ids(features.frame_count, instruction)
        return EngineRequest(uuid.uuid4().hex, features, prompt_ids, max_new_tokens(clip.duration_s))

    def _times(self, words: bool | None) -> bool:
        """Whether words are timed, if they are to be. Raises ModelError where nothing can."""
        if words and not self._aligner:
            raise ModelError("words have no times without an aligner: load the model with aligner='whisper'")
        return self._aligner is not None if words is None else words

    async def _decode(self, prepared: "_Prepared", words: bool) -> Transcript:
        parts = zip(prepared.chunks, prepared.requests, strict=True)
        segments = await asyncio.gather(*(self._decode_chunk(chunk, request, words) for chunk, request in parts))
        aligner = self._aligner.name if self._aligner and words else None
        return stitch(segments, duration_s=prepared.duration_s, model=self.name, aligner=aligner)

    async def _hear(self, chunk: Chunk, instruction: str, words: bool) -> Segment:
        return await self._decode_chunk(chunk, await self._in_background(self._request, chunk.clip, instruction), words)

    async def _decode_chunk(self, chunk: Chunk, request: EngineRequest, words: bool) -> Segment:
        judged, ids = await self._answer(chunk, request)
        if judged.flags and repeats(ids, NO_REPEAT_NGRAM):
            request = replace(request, request_id=uuid.uuid4().hex, no_repeat_ngram=NO_REPEAT_NGRAM)
            judged = pick_better(judged, (await self._answer(chunk, request))[0])
        return await self._segment(chunk, judged, words=words)

    async def _segment(self, chunk: Chunk, judged: QualityVerdict, *, words: bool) -> Segment:
        timed = await self._words(chunk, judged.text) if words else ()
        return Segment(
            chunk.start_s, chunk.start_s + chunk.clip.duration_s, judged.text, judged.mean_logprob, judged.flags, timed
        )

    async def _words(self, chunk: Chunk, text: str) -> tuple[Word, ...]:
        if not (self._aligner and text):
            return ()
        words = await asyncio.get_running_loop().run_in_executor(self._aligning, self._aligner.align, chunk.clip, text)
        return tuple(Word(chunk.start_s + word.start_s, chunk.start_s + word.end_s, word.text) for word in words)

    async def _answer(self, chunk: Chunk, request: EngineRequest) -> tuple[QualityVerdict, list[int]]:
        """Decode a chunk; returns the judged text and its tokens."""
        async with aclosing(self._engine.stream(request)) as stream:
            tokens = [token async for token in stream]
        return self._judged(chunk, request, tokens), [token.id for token in tokens]

    def _judged(self, chunk: Chunk, request: EngineRequest, tokens: Sequence[Token]) -> QualityVerdict:
        is_cut = len(tokens) == request.max_new_tokens
        logprobs = [token.logprob for token in tokens]
        return check_quality(
            self._text(tokens), logprobs, duration_s=chunk.clip.duration_s, is_cut=is_cut, has_speech=chunk.has_speech
        )

    def _text(self, tokens: Sequence[Token]) -> str:
        """What tokens say, in one line, so that words joined by spaces are the text."""
        with self._tokenizing:
            text = self._processor.tokenizer.decode([token.id for token in tokens], skip_special_tokens=True)
        return " ".join(text.split())

    async def _in_background(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, function, *arguments)


@dataclass(frozen=True)
class _Prepared:
    """A recording cut into chunks, and what the engine is asked for each."""

    duration_s: float
    chunks: list[Chunk]
    requests: list[EngineRequest]


def open_transcriber(
    model: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    engine: Literal["transformers", "vllm"] = "transformers",
    quantization: str | None = None,
    chunker: ChunkFunction | None = None,
    aligner: Aligner | str | None = None,
    threads: int | None = None,
    name: str | None = None,
) -> Transcriber:
    """Open a model for transcription; `graft.load` is this function.

    `model` is a graft's folder, a stage's output folder, a hub id, or the name of a graft that comes with the package.
    `device` defaults to cuda where there is a GPU, `dtype` ("fp32", "bf16" or torch's) to the precision that the weights
    are stored in, `name` to the folder's name. `chunker` defaults to a Chunker, which skips what is no speech; pass
    `chunking.windows` to transcribe all of a clip or chunks that are cut already. `aligner` times words: "whisper" is the
    bundled one, any other string the folder or hub id of a Whisper or CTC model. `quantization` is vLLM's name of a
    method. `threads` sets the number of CPU threads of torch in this process. Raises ModelError, ValueError for an unknown
    dtype, MissingExtra where the bundled Whisper or vLLM is not installed.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, not one of {', '.join(DTYPES)}")
    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if isinstance(aligner, str):  # opened first, so that a wrong name fails before a large model loads for minutes
        aligner = open_aligner(aligner, device=device)
    name, chunker = name or checkpoint_name(model), chunker or Chunker()
    if engine == "vllm":
        from graft.inference.engines.vllm_engine import open_vllm_engine

        opened = open_vllm_engine(os.fspath(model), device=device, dtype=weights, quantization=quantization)
        return Transcriber(*opened, name, chunker=chunker, aligner=aligner)
    loaded, processor = open_graft(os.fspath(model), device=device, dtype=weights)
    return transcriber_of(loaded, processor, name=name, chunker=chunker, aligner=aligner)


def transcriber_of(
    model: GraftForConditionalGeneration,
    processor: GraftProcessor,
    *,
    name: str,
    chunker: ChunkFunction = windows,
    aligner: Aligner | None = None,
) -> Transcriber:
    """Make the Transcriber of a model that is open already."""
    engine = TransformersEngine(
        model,
        pad_id=processor.tokenizer.pad_token_id,
        eos_ids=processor.end_ids(model.generation_config),
        max_batch_tokens=BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]),
        max_prefill_tokens=PREFILL_TOKENS.get(model.device.type, PREFILL_TOKENS["cpu"]),
    )
    return Transcriber(engine, processor, name, chunker=chunker, aligner=aligner)


def max_new_tokens(duration_s: float) -> int:
    """The most tokens that speech of this length can need: 10 a second and some to begin with."""
    return 16 + math.ceil(10 * duration_s)


def _run(coroutine: Coroutine[object, object, T]) -> T:
    """Run to the end, also where an event loop already runs in this thread (Jupyter)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
