"""The arguments of the application: of `serve run serve.app:build key=value ...` and of serve.yaml."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .decode.decoder import DecodeArgs


class ServeArgs(BaseModel):
    """What is served, on what, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    model: str
    """A graft's folder, a stage's output folder or a hub id; `user_config: {model: ...}` of the Engine wins over it, also while it runs."""
    name: str | None = None
    """What clients call the model, also when another has taken over; by default the folder's name."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the weights; by default as they are stored."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What decodes; vllm needs the extra of that name."""
    quantization: str | None = None
    """vLLM's, of the language model's weights, such as fp8; by default none."""
    aligner: str | None = None
    """What times words: whisper (the bundled one), a folder or hub id of a Whisper or a CTC model; null: asking for them is a 400."""
    min_replicas: int = Field(default=1, ge=1)
    """Models that are always up."""
    max_replicas: int = Field(default=1, ge=1)
    """Models that load may bring up."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """0 serves on CPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads, and CPUs taken from the cluster, of each model."""
    max_ongoing_chunks: int = Field(default=64, ge=1)
    """Chunks of up to 28 s that a model has in hand; half as many bring up another."""
    min_ingress_replicas: int = Field(default=1, ge=1)
    max_ingress_replicas: int = Field(default=1, ge=1)
    """Processes that answer HTTP and decode."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that one of them has in hand; more get 429."""
    max_queued_s: float = Field(default=7_200, gt=0)
    """Seconds of speech that one of them has in hand; more get 429."""
    max_upload_bytes: int = Field(default=25_000_000, ge=1)
    """Larger request bodies get 413."""
    key_file: str | None = None
    """File of API keys, one a line; more may stand in GRAFT_API_KEYS, between commas. Without any, everyone may ask."""
    decode: DecodeArgs = DecodeArgs()
    upscale_delay_s: float = Field(default=10, ge=0)
    """Seconds of load before a replica comes."""
    downscale_delay_s: float = Field(default=300, ge=0)
    """Seconds without it before one goes."""

    @model_validator(mode="after")
    def _check_quantization(self) -> "ServeArgs":
        if self.quantization and self.engine != "vllm":
            raise ValueError(f"quantization={self.quantization} goes with engine=vllm")
        return self
