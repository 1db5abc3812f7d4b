"""Define the arguments of the application, for `graft serve`, `serve run serve.app:build key=value ...`, serve.yaml."""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from graft.config import Recipe
from graft.keys import Checkpoint, Heading, Location, MachineKey, ModelKey

from .decode.decoder import DecodeArgs

T = TypeVar("T")
RequestKey = Annotated[T, Heading("requests")]


def _check_origin(origin: str) -> str:
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
        raise ValueError("give an origin without a path, such as https://app.example.com, or *")
    return origin


Origin = Annotated[str, AfterValidator(_check_origin)]


class ServeArgs(Recipe):
    """The served model, the resources of its replicas, and the limits on requests."""

    model: ModelKey[Checkpoint]
    """Folder or hub id of a graft or of a Whisper checkpoint, output folder of a training stage, name of a graft that
    comes with the package, or `whisper`, the bundled Whisper base. `user_config: {model: ...}` of the deployment Engine
    overrides it and can be changed while the service runs."""
    name: ModelKey[str | None] = None
    """Name by which clients call the model, also after another one was loaded. By default it is the folder's name."""
    aliases: ModelKey[tuple[str, ...]] = ()
    """Other names by which clients may call the model, such as whisper-1 for programs that know OpenAI's names only."""
    language: ModelKey[str | None] = None
    """Language of the speech where a request names none, such as de (ISO 639-1). By default a Whisper finds out the
    language of each upload. A graft whose prompt cannot name languages transcribes this one alone, by default en."""
    dtype: ModelKey[Literal["fp32", "bf16", "int8"] | None] = None
    """Precision of the weights. By default it is the one in which they are stored. int8 is for CPUs with VNNI or AMX,
    where it is about twice as fast as fp32."""
    engine: ModelKey[Literal["transformers", "vllm"]] = "transformers"
    """Inference engine. `vllm` runs grafts alone and needs the extra of that name."""
    quantization: ModelKey[str | None] = None
    """vLLM's quantization of the language model's weights, such as fp8. By default there is none."""
    aligner: ModelKey[Checkpoint | None] = None
    """Model that computes word timestamps: `whisper` (the bundled one), or the folder or hub id of a Whisper or CTC
    model. Without one, requests for word timestamps get a 400."""
    min_replicas: MachineKey[int] = Field(default=1, ge=1)
    """Engine replicas that always run."""
    max_replicas: MachineKey[int] = Field(default=1, ge=1)
    """Engine replicas that run under load."""
    gpus_per_replica: MachineKey[float] = Field(default=0, ge=0)
    """GPUs of each engine replica. 0 serves on the CPU."""
    threads: MachineKey[int] = Field(default=1, ge=1)
    """CPU threads of each engine replica, and the CPUs that it reserves in the cluster."""
    max_ongoing_chunks: RequestKey[int] = Field(default=64, ge=1)
    """Chunks (of up to 28 s) that an engine replica accepts at a time. Half as many make another replica start."""
    min_ingress_replicas: MachineKey[int] = Field(default=1, ge=1)
    """Ingress replicas, which answer HTTP and decode audio, that always run."""
    max_ingress_replicas: MachineKey[int] = Field(default=1, ge=1)
    """Ingress replicas that run under load."""
    max_ongoing_requests: RequestKey[int] = Field(default=64, ge=1)
    """Uploads that an ingress replica accepts at a time. More of them get a 429."""
    max_ongoing_requests_per_key: RequestKey[int | None] = Field(default=None, ge=1)
    """Uploads of one API key that an ingress replica accepts at a time, those that are arriving included. More of them
    get a 429. A key gets the same share of max_queued_s and of the engines' chunks; of those, where there are several
    keys, at most four in each engine on a CPU. By default it is half of max_ongoing_requests where there are several
    keys, and all of them where there is one or none."""
    max_live_sessions: RequestKey[int] = Field(default=8, ge=0)
    """Live sessions that an ingress replica has at a time; each counts as an upload, too. More of them are refused."""
    max_queued_s: RequestKey[float] = Field(default=7_200, gt=0)
    """Seconds of speech that an ingress replica accepts at a time. Uploads beyond that get a 429."""
    request_timeout_s: RequestKey[float] = Field(default=600, gt=0)
    """Seconds that a request may take, from its first byte to the end of its answer. Longer ones get a 408."""
    max_upload_bytes: RequestKey[int] = Field(default=25_000_000, ge=1)
    """Largest request body in bytes. Larger ones get a 413."""
    min_upload_bytes_per_s: RequestKey[float] = Field(default=4_000, ge=0)
    """Bytes a second at which an upload must arrive, apart from pauses of up to 15 s. Slower ones get a 408. 0 accepts
    any rate."""
    key_file: RequestKey[Location | None] = None
    """File of API keys, one a line, in addition to those in GRAFT_API_KEYS, which are separated by commas. An entry is
    a key or `name: key`; logs and metrics use the name. Without any key, requests are not authenticated."""
    strict: RequestKey[bool] = False
    """Refuse requests with fields that the model cannot honour. By default such fields are ignored, and the header
    X-Graft-Ignored names them. The form field `strict` overrides it."""
    cors_origins: RequestKey[tuple[Origin, ...]] = ()
    """Origins of web pages that may call the service from a browser, such as https://app.example.com; `*` is any."""
    decode: RequestKey[DecodeArgs] = DecodeArgs()
    """Settings of the processes that decode uploads."""
    upscale_delay_s: MachineKey[float] = Field(default=10, ge=0)
    """Seconds of load after which a replica is added."""
    downscale_delay_s: MachineKey[float] = Field(default=300, ge=0)
    """Seconds without load after which a replica is removed."""

    @model_validator(mode="after")
    def _check_quantization(self) -> "ServeArgs":
        if self.quantization and self.engine != "vllm":
            raise ValueError(f"quantization={self.quantization} requires engine=vllm")
        if self.dtype == "int8" and (self.engine == "vllm" or self.gpus_per_replica):
            raise ValueError("dtype=int8 is for CPUs and engine=transformers: leave out gpus_per_replica and engine")
        return self
