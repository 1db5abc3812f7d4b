"""What goes over the wire: OpenAI's transcription form, its answers, events and errors."""

import math
import zlib
from collections.abc import Iterable
from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator

from graft.inference.transcript import Segment, Transcript, Word

ResponseFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]


class TranscriptionForm(BaseModel):
    """OpenAI's form fields. What the model can't do is refused when it is known which one is asked."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    file: UploadFile
    model: str
    """Id of the served model, as GET /v1/models tells it."""
    language: str | None = None
    """ISO 639-1 code of what is spoken; by default the model's own language."""
    prompt: str | None = Field(default=None, max_length=4_000)
    """Words that may occur (names, terms), between commas or line ends; only for models that were trained for such lists."""
    keywords: list[Annotated[str, Field(max_length=100)]] = Field(default=[], alias="keywords[]", max_length=100)
    """Words that may occur, one each; with those of `prompt`."""
    response_format: ResponseFormat = "json"
    timestamp_granularities: list[Literal["word", "segment"]] = Field(
        default=["segment"], alias="timestamp_granularities[]"
    )
    """With verbose_json, `word` adds the times of words, with srt and vtt it gives each word its time, where an aligner is loaded."""
    temperature: Annotated[float, Field(ge=0, le=1)] = 0
    """0 alone: decoding is greedy, so that a request has one answer."""
    stream: bool = False
    """Whether the text comes in events, as it is heard."""
    chunking_strategy: Literal["auto"] | None = None
    """Long audio is always cut where nobody speaks."""

    @field_validator("prompt", "language", mode="after")
    @classmethod
    def _none_for_blank(cls, value: str | None) -> str | None:
        return value.strip() or None if value else None


class Usage(BaseModel):
    """How many seconds of audio were transcribed."""

    type: Literal["duration"] = "duration"
    seconds: float


class TranscriptionAnswer(BaseModel):
    """The answer in response_format json."""

    text: str
    usage: Usage


class TimedWord(BaseModel):
    """A word of verbose_json, in seconds."""

    word: str
    start: float
    end: float


class TimedSegment(BaseModel):
    """A segment of verbose_json; `flags` are graft's own: what is suspicious about the text."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int] = []
    temperature: float = 0.0
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    flags: list[str]


class VerboseAnswer(BaseModel):
    """The answer in response_format verbose_json."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    text: str
    segments: list[TimedSegment] | None = None
    words: list[TimedWord] | None = None
    usage: Usage


class DeltaEvent(BaseModel):
    """A part of the text, as it comes."""

    type: Literal["transcript.text.delta"] = "transcript.text.delta"
    delta: str


class DoneEvent(BaseModel):
    """The end of a stream: the deltas, joined."""

    type: Literal["transcript.text.done"] = "transcript.text.done"
    text: str


class ModelCard(BaseModel):
    """A model as GET /v1/models lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "graft"


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


FaultKind = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class Fault(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: FaultKind = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class FaultAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: Fault


def verbose(transcript: Transcript, *, language: str, granularities: Iterable[str]) -> VerboseAnswer:
    """A transcript in OpenAI's verbose form."""
    wanted = set(granularities)
    segments = [_segment(number, segment) for number, segment in enumerate(transcript.segments)]
    words = [_word(word) for segment in transcript.segments for word in segment.words]
    return VerboseAnswer(
        language=language,
        duration=transcript.duration_s,
        text=transcript.text,
        segments=segments if "segment" in wanted else None,
        words=words if "word" in wanted else None,
        usage=usage(transcript),
    )


def usage(transcript: Transcript) -> Usage:
    """What OpenAI would bill."""
    return Usage(seconds=transcript.duration_s)


def _segment(number: int, segment: Segment) -> TimedSegment:
    data, logprob = segment.text.encode(), segment.mean_logprob
    return TimedSegment(
        id=number,
        seek=round(segment.start_s * 100),
        start=segment.start_s,
        end=segment.end_s,
        text=segment.text,
        avg_logprob=logprob if logprob is not None and math.isfinite(logprob) else 0.0,
        compression_ratio=len(data) / len(zlib.compress(data)) if data else 0.0,
        no_speech_prob=float("no_speech" in segment.flags),
        flags=list(segment.flags),
    )


def _word(word: Word) -> TimedWord:
    return TimedWord(word=word.text, start=word.start_s, end=word.end_s)


def event(data: BaseModel) -> bytes:
    """An event of a stream (text/event-stream)."""
    return f"data: {data.model_dump_json()}\n\n".encode()
