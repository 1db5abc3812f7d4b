"""Define the form, responses, events and errors of OpenAI's transcription API."""

import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from graft.inference.segments import ScoredSegment, ScoredToken, Segment
from graft.inference.transcript import Transcript


class TranscriptionRequest(BaseModel):
    """Fields of a transcription request beside its audio.

    Values on which the answer's language or shape depends get a 400 where the service does not provide them. Hints that
    cannot be honoured, and other fields, are ignored.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), use_attribute_docstrings=True)

    model: str
    """Id of the served model, as listed by GET /v1/models."""
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    """Format of the response."""
    timestamp_granularities: list[Literal["word", "segment"]] = ["segment"]
    """`word` adds timestamps of words to verbose_json and times each word in srt and vtt. It needs a loaded aligner."""
    stream: bool = False
    """Send the text in server-sent events while it is decoded."""
    language: str | None = None
    """Language of the speech: a code such as `en` or `en-US`, its English name, or `auto`. It must be one that the
    model knows."""
    task: Literal["transcribe"] = "transcribe"
    """Accepted for compatibility."""
    strict: bool | None = None
    """Refuse the request with a 400 where one of its fields would be ignored."""
    include: list[Literal["logprobs"]] = []
    """`logprobs` adds the tokens and their log-probabilities to the response in json, and to the events of a stream."""
    prompt: str | None = Field(default=None, max_length=4_000)
    """Words that may occur (names, terms), separated by commas or line ends. It is ignored if the model was not trained
    for them."""
    keywords: list[Annotated[str, Field(max_length=100)]] = Field(default=[], max_length=100)
    """Words that may occur, one in each field, in addition to those in `prompt`."""
    temperature: Annotated[float, Field(ge=0, le=1)] = 0
    """Any other than 0 is ignored: decoding is greedy, so that equal requests get equal responses."""
    chunking_strategy: Literal["auto"] | None = None
    """Any other than `auto` is ignored. Long audio is always cut where there is no speech."""

    @field_validator("prompt", mode="after")
    @classmethod
    def _strip(cls, value: str | None) -> str | None:
        return value.strip() if value else None


LISTS = frozenset(name for name, field in TranscriptionRequest.model_fields.items() if isinstance(field.default, list))
"""Fields that hold lists; in forms their names end in `[]`, and they occur once for each item."""
HINTS = frozenset({"include", "prompt", "keywords", "temperature", "chunking_strategy"})
"""Fields that are ignored where they are malformed or cannot be honoured."""


def request_body_schema() -> dict[str, Any]:
    """Describe the two kinds of body in OpenAPI's form: multipart/form-data with a file, and JSON with base64."""
    schema = TranscriptionRequest.model_json_schema()
    fields, description = schema.pop("properties"), "The audio or video file."
    audio = {"type": "string", "format": "binary", "description": description}
    encoded = {"type": "string", "description": f"{description} It is sent in base64."}
    format_hint = {"type": "string", "description": "It is not needed: the format is read from the audio."}
    form = {f"{name}[]" if name in LISTS else name: field for name, field in fields.items()}
    spoken = {"type": "object", "required": ["data"], "properties": {"data": encoded, "format": format_hint}}
    return {
        "required": True,
        "content": {
            kind: {"schema": schema | {"properties": {name: field} | others, "required": [name, *schema["required"]]}}
            for kind, name, field, others in (
                ("multipart/form-data", "file", audio, form),
                ("application/json", "input_audio", spoken, fields),
            )
        },
    }


class Usage(BaseModel):
    """Seconds of audio that were transcribed."""

    type: Literal["duration"] = "duration"
    seconds: float


class TokenUsage(BaseModel):
    """Tokens that the model read and wrote, and seconds of audio, in the last event of a stream."""

    type: Literal["tokens"] = "tokens"
    input_tokens: int
    output_tokens: int
    total_tokens: int
    seconds: float


class TokenLogprob(BaseModel):
    """A token of the text, which may be a part of a character, and its natural log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class TranscriptionResponse(BaseModel):
    """The response with response_format json."""

    text: str
    usage: Usage
    logprobs: list[TokenLogprob] | None = None


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


class AudioDefectResponse(BaseModel):
    """What is wrong with the audio, and the time in seconds that it concerns."""

    flag: str
    start: float
    end: float


class VerboseTranscriptionResponse(BaseModel):
    """The response with response_format verbose_json; `defects` is graft's addition."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    text: str
    segments: list[TranscriptionSegment] | None = None
    words: list[TranscriptionWord] | None = None
    defects: list[AudioDefectResponse] = []
    usage: Usage


class FailedChange(BaseModel):
    """A model that was to replace a replica's and could not be opened, and the class of the error."""

    model: str
    error: str


class ReplicaCard(BaseModel):
    """What an engine replica serves."""

    replica: str
    model: str
    """Name of the checkpoint's folder, or its hub id."""
    digest: str
    """SHA-256 of its weights and configuration, as `graft transcribe` records it."""
    state: Literal["ready", "changing"]
    """`changing` while the replica opens its next model and has closed the one before."""
    failed_change: FailedChange | None = None


class ModelCard(BaseModel):
    """A model as listed by GET /v1/models; `replicas` is graft's addition."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "graft"
    replicas: list[ReplicaCard] = []


class ModelList(BaseModel):
    """The response of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


UNKNOWN_LANGUAGE = "und"
"""What ISO 639 calls a language that is not known."""
LEAST_LOGPROB = -9_999.0
"""Stands for the log-probability of a token that has none, as in OpenAI's API."""
ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ErrorDetail(BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: ErrorType = "invalid_request_error"
    param: str | None = None
    code: str | None = None


TIMED_OUT = ErrorDetail(
    message="the request timed out: split the audio, or try again", type="server_error", code="timeout"
)


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


def verbose_response(transcript: Transcript, *, granularities: Collection[str]) -> VerboseTranscriptionResponse:
    """Convert a transcript to OpenAI's verbose_json."""
    segments = [_convert_segment(number, segment) for number, segment in enumerate(transcript.segments)]
    words = [
        TranscriptionWord(word=word.text, start=word.start_s, end=word.end_s)
        for segment in transcript.segments
        for word in segment.words
    ]
    return VerboseTranscriptionResponse(
        language=transcript.language or UNKNOWN_LANGUAGE,
        duration=transcript.duration_s,
        text=transcript.text,
        segments=segments if "segment" in granularities else None,
        words=words if "word" in granularities else None,
        defects=[
            AudioDefectResponse(flag=defect.flag, start=defect.start_s, end=defect.end_s)
            for defect in transcript.defects
        ],
        usage=Usage(seconds=transcript.duration_s),
    )


def convert_tokens(tokens: Iterable[ScoredToken]) -> list[TokenLogprob]:
    """Convert tokens to OpenAI's logprobs."""
    return [
        TokenLogprob(
            token=token.data.decode(errors="replace"),
            bytes=list(token.data),
            logprob=token.logprob if math.isfinite(token.logprob) else LEAST_LOGPROB,
        )
        for token in tokens
    ]


def tokens_of(transcript: Transcript) -> list[ScoredToken]:
    """Return the tokens of a transcript whose segments are scored."""
    return [token for segment in _scored_segments(transcript) for token in segment.tokens]


def token_usage(transcript: Transcript) -> TokenUsage:
    """Count the tokens of a transcript whose segments are scored."""
    read = sum(segment.prompt_token_count for segment in _scored_segments(transcript))
    written = len(tokens_of(transcript))
    return TokenUsage(
        input_tokens=read, output_tokens=written, total_tokens=read + written, seconds=transcript.duration_s
    )


def _scored_segments(transcript: Transcript) -> list[ScoredSegment]:
    return [segment for segment in transcript.segments if isinstance(segment, ScoredSegment)]


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
