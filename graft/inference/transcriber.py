"""Transcribe audio of any length; bulk transcription, online service and the prompt use the same Transcriber.

audio -> read_audio -> chunks of up to 30 s -> features -> language -> prompt -> Engine -> check_quality -> Aligner
    -> Segment -> stitch -> Transcript
"""

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

from graft.audio.audio_info import AudioTrack
from graft.audio.chunking import Chunk, Chunker, find_telling, windows
from graft.audio.clip import AudioClip, read_audio
from graft.audio.defects import AudioDefect, merge_defects
from graft.audio.features import Features
from graft.audio.spans import read_span
from graft.checkpoints.loading import DTYPES, check_model, open_model
from graft.checkpoints.names import INT8, checkpoint_name
from graft.errors import AudioError, ModelError
from graft.inference.aligners.loading import open_aligner
from graft.inference.aligners.protocol import Aligner
from graft.inference.engines.graft_decoder import GraftDecoder
from graft.inference.engines.kv_cache import SlotDecoder
from graft.inference.engines.protocol import Engine, EngineCounts, EngineRequest, Token
from graft.inference.engines.sampling import has_repeated_ngram
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.inference.engines.whisper_decoder import WhisperDecoder
from graft.inference.hallucination import NO_REPEAT_NGRAM, QualityVerdict, check_quality, pick_better
from graft.inference.int8 import check_int8, quantize_to_int8
from graft.inference.segments import ScoredSegment, ScoredToken, Segment, Word
from graft.inference.transcript import Transcript, stitch
from graft.model.modeling import AnyGraft
from graft.processor import SpeechProcessor
from graft.text.languages import language_code

# A path, the bytes of a file, or samples.
Audio: TypeAlias = str | os.PathLike[str] | bytes | AudioClip
# A recording's duration in seconds, its defects, and its parts: the number of a channel, None where channels are mixed,
# a chunk, and its features.
Prepared: TypeAlias = tuple[float, tuple[AudioDefect, ...], list[tuple[int | None, Chunk, Features]]]
# mix: the mean of all channels; split: each channel by itself.
Channels: TypeAlias = Literal["mix", "split"]
# Gets the share of the speech that is transcribed, from 0 to 1.
Progress: TypeAlias = Callable[[float], object]
# Cuts a clip into chunks of at most 30 s: a Chunker, which skips what is no speech, or `windows`, which skips nothing.
ChunkFunction = Callable[[AudioClip], list[Chunk]]

# Tokens of the rows that decode together, by device: TransformersEngine's `max_batch_tokens`.
BATCH_TOKENS = {"cpu": 16_384, "cuda": 65_536}
# Tokens of the prompts that are read between two decode steps, by device: all running rows wait for them.
PREFILL_TOKENS = {"cpu": 1_024, "cuda": 8_192}
# Byte-level tokenizers write each byte of a token as one character.
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}

T = TypeVar("T")


class Transcriber:
    """Transcribes with an engine and the processor of its model; transcripts name the model by `name`.

    Any number of threads and event loops may use one transcriber at once: their chunks share the engine's batches.
    `chunker` cuts a clip into chunks. A chunk whose text is flagged by `check_quality` and repeats an n-gram is decoded
    once more, with n-grams blocked; the better text is kept, with its flags. With an `aligner`, segments have words
    with times.
    """

    def __init__(
        self,
        engine: Engine,
        processor: SpeechProcessor,
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
        self._tokenizer_lock = threading.Lock()  # fast tokenizers sometimes refuse a second thread ("Already borrowed")
        # One thread prepares while the engine decodes; more would only compete for cores and the GIL.
        self._prepare_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-prepare")
        self._align_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="graft-align")

    def transcribe(
        self,
        audio: Audio,
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        language: str | None = None,
        words: bool | None = None,
        channels: Channels = "mix",
        audio_track: AudioTrack | None = None,
        progress: Progress | None = None,
    ) -> Transcript:
        """Transcribe one recording of any length.

        `instruction` is a text style (raw, lower, formatted) or a phrasing that asks for one; `context` lists words
        that may occur; `language` (ISO 639-1) is that of the speech, for a model whose prompt can name it: a Whisper
        that is told none finds it out, once for the recording; `words` says whether segments have words with times, by
        default wherever there is an aligner.
        `channels` is "mix" for the mean of all channels, or "split" for each by itself, as in calls with one speaker on
        each: segments then name their channels, and are in order of time. Of a file with several audio tracks,
        `audio_track` is the one to take, by its number from 1 or its language, by default the file's own default.
        `progress` is a function that is called with the share of the speech that is transcribed: with 0 when the
        recording is decoded, then after each chunk, and last with 1. Raises AudioError if the recording cannot be read
        or lacks the track, ModelError for a style or context that the model was not trained for, and for words without
        an aligner.
        """
        return _run(
            self.transcribe_async(
                audio,
                instruction=instruction,
                language=language,
                context=context,
                words=words,
                channels=channels,
                audio_track=audio_track,
                progress=progress,
            )
        )

    def transcribe_many(
        self,
        audios: Sequence[Audio],
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        language: str | None = None,
        words: bool | None = None,
        channels: Channels = "mix",
        audio_track: AudioTrack | None = None,
        progress: Progress | None = None,
    ) -> list[Transcript | AudioError]:
        """Transcribe recordings together; the place of one that cannot be read holds its AudioError.

        All recordings are prepared before the first is decoded, so that the engine's batches are full, and the same in
        every call. `progress` gets the share of the speech of all recordings. Raises ModelError as `transcribe` does.
        """
        asked = self._check(instruction, context, language, words)

        async def prepare(audio: Audio) -> Prepared | AudioError:
            try:
                return await self._in_background(self._prepare, audio, channels, audio_track)
            except AudioError as error:
                return error

        async def transcribe_all() -> list[Transcript | AudioError]:
            prepared = await asyncio.gather(*map(prepare, audios))
            report = _Report(progress, [one for one in prepared if not isinstance(one, AudioError)])
            own = await asyncio.gather(*(self._with_language(asked, one) for one in prepared))

            async def decode(one: Prepared | AudioError, asked: _Asked) -> Transcript | AudioError:
                return one if isinstance(one, AudioError) else await self._transcribe_prepared(one, asked, report)

            return await asyncio.gather(*map(decode, prepared, own))

        return _run(transcribe_all())

    async def transcribe_async(
        self,
        audio: Audio,
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        language: str | None = None,
        words: bool | None = None,
        channels: Channels = "mix",
        audio_track: AudioTrack | None = None,
        progress: Progress | None = None,
    ) -> Transcript:
        """Transcribe one recording without blocking the event loop, which calls `progress`.

        Cancelling releases its slots in the engine. Raises as `transcribe` does.
        """
        asked = self._check(instruction, context, language, words)
        prepared = await self._in_background(self._prepare, audio, channels, audio_track)
        asked = await self._with_language(asked, prepared)
        return await self._transcribe_prepared(prepared, asked, _Report(progress, [prepared]))

    async def transcribe_chunks(
        self,
        chunks: Sequence[Chunk],
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        language: str | None = None,
        words: bool | None = None,
        scored: bool = False,
        prefix: str = "",
    ) -> list[Segment]:
        """Transcribe chunks of one recording; returns a segment for each, in order, if `scored` a ScoredSegment.

        Each text begins with `prefix`, which is in the model's style and is read, not decoded; its tokens count as
        certain. A `language` that the model's prompt cannot name is for the aligner alone. Raises ModelError as
        `transcribe` does otherwise.
        """
        asked = _Asked(instruction, context, language, self._wants_words(words), prefix=prefix)
        asked = replace(asked, found=None if language else await self._find_language(chunks, words=asked.words))

        async def transcribe_chunk(chunk: Chunk) -> Segment:
            request = await self._in_background(self._featurize, chunk, asked)
            return await self._decode_chunk(chunk, request, asked, scored=scored)

        return await asyncio.gather(*map(transcribe_chunk, chunks))

    async def find_language(self, chunks: Sequence[Chunk]) -> str | None:
        """Return the language (ISO 639-1) of a recording, of which these are the first chunks, as a Whisper hears it.

        It is that of the model or else of the aligner. None where neither finds it out, or there are no chunks.
        """
        return await self._find_language(chunks, words=self._aligner is not None)

    async def stream_chunk(
        self,
        chunk: Chunk,
        *,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
        language: str | None = None,
        scored: bool = False,
    ) -> AsyncGenerator[str | ScoredToken | Segment, None]:
        """Yield a chunk's text in parts as it is decoded, and at last its segment, whose text is all parts joined.

        If `scored`, each token is yielded before the text that it completes, and the segment is a ScoredSegment. No
        part is taken back: text that `check_quality` flags is not decoded again. Raises ModelError as
        `transcribe_chunks` does.
        """
        found = None if language else await self._find_language([chunk], words=False)
        asked = _Asked(instruction, context, language, words=False, found=found)
        request = await self._in_background(self._featurize, chunk, asked)
        tokens: list[Token] = []
        sent = ""
        async with aclosing(self._engine.stream(request)) as stream:
            async for token in stream:
                tokens.append(token)
                if scored:
                    for one in self._score([token]):
                        yield one
                text = self._decode_text(tokens).rstrip("\ufffd").rstrip()  # a character may take several tokens
                if len(text) > len(sent) and text.startswith(sent):
                    yield text[len(sent) :]
                    sent = text
        verdict = self._judge(chunk, request, tokens)
        if rest := verdict.text.removeprefix(sent):
            yield rest
        segment = await self._make_segment(chunk, verdict, asked)
        yield self._add_tokens(segment, request, tokens) if scored else segment

    @property
    def takes_context(self) -> bool:
        """Whether the model takes lists of words that may occur."""
        return self._processor.trained_context

    @property
    def times_words(self) -> bool:
        """Whether there is an aligner."""
        return self._aligner is not None

    @property
    def languages(self) -> Sequence[str]:
        """Languages (ISO 639-1) that the model's prompt may name; none where it names none."""
        return self._processor.languages

    @property
    def finds_language(self) -> bool:
        """Whether the model itself finds out which language is spoken."""
        return bool(self._processor.language_ids)

    def counts(self) -> EngineCounts:
        """Return the engine's state and totals, for benchmarks and metrics."""
        return self._engine.counts()

    def close(self) -> None:
        """Stop the engine and release the model."""
        self._engine.close()
        self._prepare_thread.shutdown()
        self._align_thread.shutdown()

    def _check(
        self, instruction: str | None, context: Sequence[str] | None, language: str | None, words: bool | None
    ) -> "_Asked":
        """Return what a recording is to be transcribed with. Raises ModelError for what the model does not take."""
        self._processor.instruction(instruction, context, language)
        return _Asked(instruction, context, language and language_code(language), self._wants_words(words))

    def _wants_words(self, words: bool | None) -> bool:
        """Return whether words are timed. Raises ModelError where they are asked for and there is no aligner."""
        if words and not self._aligner:
            raise ModelError("words have no times without an aligner: load the model with aligner='whisper'")
        return self._aligner is not None if words is None else words

    def _prepare(self, audio: Audio, channels: Channels, track: AudioTrack | None) -> Prepared:
        clips = _read_channels(audio, track) if channels == "split" else {None: _read_mixed(audio, track)}
        parts = [
            (number, chunk, self._processor.featurizer(chunk.clip))
            for number, clip in clips.items()
            for chunk in self._chunker(clip)
        ]
        first = next(iter(clips.values()))
        return first.duration_s, first.defects, parts

    def _featurize(self, chunk: Chunk, asked: "_Asked") -> EngineRequest:
        return self._make_request(chunk, self._processor.featurizer(chunk.clip), asked)

    def _make_request(self, chunk: Chunk, features: Features, asked: "_Asked") -> EngineRequest:
        found = asked.found if self._processor.language_ids else None  # what an aligner hears, no prompt names
        language = (asked.language or found) if self._processor.languages else None
        instruction = self._processor.instruction(asked.instruction, asked.context, language)
        with self._tokenizer_lock:
            prompt_ids = self._processor.prompt_ids(features.frame_count, instruction)
            most = self._processor.max_new_tokens(chunk.clip.duration_s, instruction)
            prefix_ids = tuple(self._processor.prefix_ids(asked.prefix)) if asked.prefix else ()
        return EngineRequest(uuid.uuid4().hex, features, prompt_ids, most, prefix_ids=prefix_ids)

    async def _find_language(self, chunks: Sequence[Chunk], *, words: bool) -> str | None:
        """Find the language of a recording by its first chunks, with the aligner only where `words` are timed."""
        if not chunks:
            return None
        clip = chunks[find_telling(chunks)].clip
        ids = self._processor.language_ids
        if not ids:
            if not (words and self._aligner):
                return None
            find = partial(self._aligner.find_language, clip)
            return await asyncio.get_running_loop().run_in_executor(self._align_thread, find)
        features = await self._in_background(self._processor.featurizer, clip)
        first_ids = tuple(ids.values())
        request = EngineRequest(uuid.uuid4().hex, features, self._processor.start_ids, 1, first_ids=first_ids)
        (token,) = await self._decode(request)
        return next(code for code, id in ids.items() if id == token.id)

    async def _with_language(self, asked: "_Asked", prepared: Prepared | AudioError) -> "_Asked":
        """Add the language that is found in a recording where none is asked for."""
        if asked.language or isinstance(prepared, AudioError):
            return asked
        found = await self._find_language([chunk for _, chunk, _ in prepared[2]], words=asked.words)
        return replace(asked, found=found)

    async def _transcribe_prepared(self, prepared: Prepared, asked: "_Asked", report: "_Report") -> Transcript:
        duration_s, defects, parts = prepared
        requests = [self._make_request(chunk, features, asked) for _, chunk, features in parts]

        async def decode(channel: int | None, chunk: Chunk, request: EngineRequest) -> Segment:
            segment = await self._decode_chunk(chunk, request, asked)
            report.add(chunk)
            return replace(segment, channel=channel)

        return stitch(
            await asyncio.gather(*(decode(*part[:2], request) for part, request in zip(parts, requests, strict=True))),
            duration_s=duration_s,
            model=self.name,
            aligner=self._aligner.name if self._aligner and asked.words else None,
            defects=defects,
            language=asked.spoken,
        )

    async def _decode_chunk(
        self, chunk: Chunk, request: EngineRequest, asked: "_Asked", *, scored: bool = False
    ) -> Segment:
        tokens = await self._decode(request)
        verdict = self._judge(chunk, request, tokens)
        if verdict.flags and has_repeated_ngram([token.id for token in tokens], NO_REPEAT_NGRAM):
            request = replace(request, request_id=uuid.uuid4().hex, no_repeat_ngram=NO_REPEAT_NGRAM)
            other_tokens = await self._decode(request)
            other = self._judge(chunk, request, other_tokens)
            if pick_better(verdict, other) is other:
                tokens, verdict = other_tokens, other
        segment = await self._make_segment(chunk, verdict, asked)
        return self._add_tokens(segment, request, tokens) if scored else segment

    async def _decode(self, request: EngineRequest) -> list[Token]:
        """Return the tokens of an answer, those of its prefix too."""
        given = [Token(id, 0.0) for id in request.prefix_ids]
        async with aclosing(self._engine.stream(request)) as stream:
            return given + [token async for token in stream]

    def _judge(self, chunk: Chunk, request: EngineRequest, tokens: Sequence[Token]) -> QualityVerdict:
        return check_quality(
            self._decode_text(tokens),
            [token.logprob for token in tokens[len(request.prefix_ids) :]],
            duration_s=chunk.clip.duration_s,
            is_cut=len(tokens) == request.max_new_tokens,
            has_speech=chunk.has_speech,
        )

    def _decode_text(self, tokens: Sequence[Token]) -> str:
        """Return the text of tokens with single spaces, so that its words joined by spaces are the text."""
        with self._tokenizer_lock:
            text = self._processor.tokenizer.decode([token.id for token in tokens], skip_special_tokens=True)
        return " ".join(text.split())

    def _score(self, tokens: Sequence[Token]) -> list[ScoredToken]:
        """Return the bytes of tokens that are not special."""
        tokenizer = self._processor.tokenizer
        with self._tokenizer_lock:
            special = self._special_ids
            written = [token for token in tokens if token.id not in special]
            pieces = tokenizer.convert_ids_to_tokens([token.id for token in written])
        return [ScoredToken(_bytes_of(piece), token.logprob) for piece, token in zip(pieces, written, strict=True)]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._processor.tokenizer.all_special_ids)

    def _add_tokens(self, segment: Segment, request: EngineRequest, tokens: Sequence[Token]) -> ScoredSegment:
        scored = tuple(self._score(tokens))
        return ScoredSegment(**vars(segment), tokens=scored, prompt_token_count=len(request.prompt_ids))

    async def _make_segment(self, chunk: Chunk, verdict: QualityVerdict, asked: "_Asked") -> Segment:
        start_s, text = chunk.start_s, verdict.text
        timed: tuple[Word, ...] = ()
        if asked.words and self._aligner and text:
            align = partial(self._aligner.align, chunk.clip, text, asked.spoken)
            found = await asyncio.get_running_loop().run_in_executor(self._align_thread, align)
            timed = tuple(Word(start_s + word.start_s, start_s + word.end_s, word.text) for word in found)
        end_s = start_s + chunk.clip.duration_s
        return Segment(start_s, end_s, text, verdict.mean_logprob, verdict.flags, timed)

    async def _in_background(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._prepare_thread, function, *arguments)


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

    `model` is the folder or hub id of a graft or of a Whisper checkpoint, a stage's output folder, the name of a graft
    that comes with the package, or `whisper`, the bundled Whisper base. `device` defaults to cuda where there is a GPU,
    `dtype` ("fp32", "bf16", "int8" or torch's) to the precision that the weights are stored in, `name` to the folder's
    name. int8 is for CPUs; `graft.inference.int8` says what it rounds. `chunker` defaults to a Chunker, which skips
    what is no speech; pass `chunking.windows` to transcribe all of a clip, or for chunks that are cut already.
    `aligner` times words: "whisper" is the bundled one, any other string the folder or hub id of a Whisper or CTC
    model. `engine` and `quantization`, vLLM's name of a method, are of a graft's language model. `threads` sets the
    number of torch's CPU threads in this process. Raises ModelError, ValueError for an unknown dtype, MissingExtra
    where bundled weights or vLLM are not installed.
    """
    if isinstance(dtype, str) and dtype not in (*DTYPES, INT8):
        raise ValueError(f"dtype is {dtype!r}, not one of {', '.join((*DTYPES, INT8))}")
    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() and dtype != INT8 else "cpu")
    if dtype == INT8:
        check_int8(device, engine=engine)
    weights = torch.float32 if dtype == INT8 else DTYPES[dtype] if isinstance(dtype, str) else dtype
    if isinstance(aligner, str):  # opened first, so that a wrong name fails before a large model loads for minutes
        aligner = open_aligner(aligner, device=device)
    name, chunker = name or checkpoint_name(model), chunker or Chunker()
    if engine == "vllm":
        from graft.inference.engines.vllm_engine import open_vllm_engine

        check_model(os.fspath(model), engine=engine)
        opened = open_vllm_engine(os.fspath(model), device=device, dtype=weights, quantization=quantization)
        return Transcriber(*opened, name, chunker=chunker, aligner=aligner)
    network, processor = open_model(os.fspath(model), device=device, dtype=weights)
    if dtype == INT8:
        quantize_to_int8(network)
    return make_transcriber(network, processor, name=name, chunker=chunker, aligner=aligner)


def make_transcriber(
    model: AnyGraft | WhisperForConditionalGeneration,
    processor: SpeechProcessor,
    *,
    name: str,
    chunker: ChunkFunction = windows,
    aligner: Aligner | None = None,
) -> Transcriber:
    """Make a Transcriber of a model that is open already, with the transformers engine."""
    pad_id = processor.tokenizer.pad_token_id or 0  # a Whisper's tokenizer may have none; what pads is masked
    decoder: SlotDecoder
    if isinstance(model, WhisperForConditionalGeneration):
        decoder = WhisperDecoder(model, pad_id=pad_id)
    else:
        decoder = GraftDecoder(model, pad_id=pad_id)
    engine = TransformersEngine(
        decoder,
        eos_ids=processor.end_ids(model.generation_config),
        max_batch_tokens=BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]),
        max_prefill_tokens=PREFILL_TOKENS.get(model.device.type, PREFILL_TOKENS["cpu"]),
    )
    return Transcriber(engine, processor, name, chunker=chunker, aligner=aligner)


def _bytes_of(piece: str) -> bytes:
    """Return the bytes that a byte-level token stands for; a token that was added to the vocabulary is plain text."""
    if all(character in BYTE_OF_CHARACTER for character in piece):
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)
    return piece.encode()


def _read_mixed(audio: Audio, track: AudioTrack | None) -> AudioClip:
    return audio if isinstance(audio, AudioClip) else read_audio(audio, track=track, salvage=True)


def _read_channels(audio: Audio, track: AudioTrack | None) -> dict[int | None, AudioClip]:
    """Read each channel of a recording by itself, by its number; a clip is the only channel of its recording."""
    if isinstance(audio, AudioClip):
        return {1: audio}
    defects: list[AudioDefect] = []
    blocks = [block.samples for block in read_span(audio, channels="split", track=track, defects=defects)]
    if not blocks:
        return {1: _read_mixed(audio, track)}  # which raises the AudioError of a recording without samples
    samples, found = np.concatenate(blocks), merge_defects(defects)  # (samples, channels)
    return {
        number: AudioClip(np.ascontiguousarray(channel), found) for number, channel in enumerate(samples.T, start=1)
    }


@dataclass(frozen=True)
class _Asked:
    """What a recording is transcribed with; `found` is its language where none is asked for.

    Its texts begin with `prefix`.
    """

    instruction: str | None
    context: Sequence[str] | None
    language: str | None
    words: bool
    found: str | None = None
    prefix: str = ""

    @property
    def spoken(self) -> str | None:
        return self.language or self.found


class _Report:
    """Tells a function how much of the speech of recordings is transcribed."""

    def __init__(self, progress: Progress | None, prepared: Sequence[Prepared]) -> None:
        self._progress = progress
        self._all_s = sum(chunk.clip.duration_s for *_, parts in prepared for _, chunk, _ in parts)
        self._done_s = 0.0
        self._left = sum(len(parts) for *_, parts in prepared)
        if progress:
            progress(0.0 if self._left else 1.0)

    def add(self, chunk: Chunk) -> None:
        """Count a chunk as transcribed."""
        self._done_s += chunk.clip.duration_s
        self._left -= 1
        if self._progress:
            self._progress(self._done_s / self._all_s if self._left else 1.0)  # sums of floats may differ by a bit


def _run(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine to its end, even where an event loop already runs in this thread (Jupyter)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
