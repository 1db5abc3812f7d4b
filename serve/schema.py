"""What goes over the wire: the application's argument, OpenAI's transcription form, its answers and its errors."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field


class ServeArgs(BaseModel):
    """The argument of `serve run serve.app:build key=value ...` and of serve.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    model: str
    """A graft's folder, a stage's output folder or a hub id."""
    name: str | None = None
    """What clients call the model; by default the folder's name."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the weights; by default as they are stored."""
    min_replicas: int = Field(default=1, ge=1)
    """Models that are always up."""
    max_replicas: int = Field(default=1, ge=1)
    """Models that load may bring up."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """0 serves on CPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads, and CPUs taken from the cluster, of each replica."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that share a replica's batches; more wait in line."""
    max_queued_requests: int = Field(default=256, ge=-1)
    """Requests that may wait; more get 503. -1 is no limit."""
    max_upload_bytes: int = Field(default=25_000_000, ge=1)
    """Larger request bodies get 413."""
    max_duration_s: float = Field(default=1800, gt=0)
    """Longer audio gets 400."""


class TranscriptionForm(BaseModel):
    """OpenAI's form fields; of those that graft has no use for, only values that ask for nothing are taken."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    file: UploadFile
    model: str
    response_format: Literal["json", "text"] = "json"
    language: Literal["en"] = "en"
    temperature: Annotated[float, Field(ge=0, le=0)] = 0
    stream: Literal["false"] = "false"


class TranscriptionAnswer(BaseModel):
    """The answer in response_format json."""

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


class Fault(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: Literal["invalid_request_error", "server_error"] = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class FaultAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: Fault
