"""Define the form, responses, events and errors of OpenAI's transcription API."""

import json
import math
import zlib
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator

from graft.inference.transcript import Segment, Transcript


class TranscriptionForm(BaseModel):
    """Form fields of a transcription request. Values that the served model does not support get a 400."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    file: UploadFile
    """The audio or video file."""
    model: str
    """Id of the served model, as listed by GET /v1/models."""
    language: str | None = None
    """ISO 639-1 code of the spoken language. By default it is the model's language."""
    prompt: str | None = Field(default=None, max_length=4_000)
    """Words that may occur (names, terms), separated by commas or line ends. Some models are not trained for them."""
    keywords: list[Annotated[str, Field(max_length=100)]] = Field(default=[], alias="keywords[]", max_length=100)
    """Words that may occur, one in each field, in addition to those in `prompt`."""
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    """Format of the response."""
    timestamp_granularities: list[Literal["word", "segment"]] = Field(
        default=["segment"], alias="timestamp_granularities[]"
    )
    """`word` adds timestamps of words to verbose_json and times each word in srt and vtt. It needs a loaded aligner."""
    temperature: Annotated[float, Field(ge=0, le=1)] = 0
    """Only 0 is supported: decoding is greedy, so that equal requests get equal responses."""
    stream: bool = False
    """Send the text in server-sent events while it is decoded."""
    chunking_strategy: Literal["auto"] | None = None
    """Accepted for compatibility. Long audio is always cut where there is no speech."""

    @field_validator("prompt", "language", mode="after")
    @classmethod
    def _none_for_blank(cls, value: str | None) -> str | None:
        return value.strip() or None if value else None


class Usage(BaseModel):
    """Seconds of audio that were transcribed."""

    type: Literal["duration"] = "duration"
    seconds: float


class TranscriptionResponse(BaseModel):
    """The response with response_format json."""

    text: str
    usage: Usage


class TranscriptionWord(BaseModel):
    """A word of verbose_json; its times are in seconds."""

    word: str
    start: float
    end: float


class TranscriptionSegment(BaseModel):
    """A segment of verbose_json; `flags` is graft's addition and names what is suspicious about the text."""

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


class VerboseTranscriptionResponse(BaseModel):
    """The response with response_format verbose_json."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    text: str
    segments: list[TranscriptionSegment] | None = None
    words: list[TranscriptionWord] | None = None
    usage: Usage


class ModelCard(BaseModel):
    """A model as listed by GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "graft"


class ModelList(BaseModel):
    """The response of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ErrorDetail(BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: ErrorType = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


def verbose_response(
    transcript: Transcript, *, language: str, granularities: Collection[str]
) -> VerboseTranscriptionResponse:
    """Convert a transcript to OpenAI's verbose_json."""
    segments = [_convert_segment(number, segment) for number, segment in enumerate(transcript.segments)]
    words = [
        TranscriptionWord(word=word.text, start=word.start_s, end=word.end_s)
        for segment in transcript.segments
        for word in segment.words
    ]
    return VerboseTranscriptionResponse(
        language=language,
        duration=transcript.duration_s,
        text=transcript.text,
        segments=segments if "segment" in granularities else None,
        words=words if "word" in granularities else None,
        usage=Usage(seconds=transcript.duration_s),
    )


def _convert_segment(number: int, segment: Segment) -> TranscriptionSegment:
    data, logprob = segment.text.encode(), segment.mean_logprob
    return TranscriptionSegment(
        id=number,
        seek=round(segment.start_s * 100),  # in frames of 10 ms
        start=segment.start_s,
        end=segment.end_s,
        text=segment.text,
        avg_logprob=logprob if logprob is not None and math.isfinite(logprob) else 0.0,
        compression_ratio=len(data) / len(zlib.compress(data)) if data else 0.0,
        no_speech_prob=float("no_speech" in segment.flags),
        flags=list(segment.flags),
    )


def format_event(data: Mapping[str, Any]) -> bytes:
    """Format a server-sent event (text/event-stream)."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
