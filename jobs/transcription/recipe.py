"""The recipe of jobs.transcribe."""

from typing import Literal

from pydantic import Field

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.config import Recipe
from graft.data.settings import Columns
from graft.inference.subtitles import CueLimits, Format

EXECUTION_KEYS = frozenset(
    {
        "workers",
        "threads",
        "gpus_per_worker",
        "readers",
        "items_per_batch",
        "formats",
        "cues",
        "strict",
        "retry_errors",
        "price",
    }
    | {f"cues.{name}" for name in CueLimits.model_fields}
)
"""Keys that change how transcripts come, and in which files, not what they say."""


class TranscribeRecipe(Recipe):
    """What jobs.transcribe does."""

    model: str
    """A graft's folder, a stage's output folder or a hub id."""
    model_digest: str | None = None
    """SHA-256 over its files; null: what is there. Results of another are never mixed with these."""
    audio: str | list[str]
    """Files, folders (at any depth), globs, s3:// and other URIs; .txt lists of them, one a line; parquet files with audio in them."""
    out: str | None = None
    """Folder for the transcripts; without it they are only printed."""
    columns: Columns = Columns()
    """What the columns of parquet files are called."""
    channels: Literal["mix", "split"] = "mix"
    """split transcribes every channel by itself, labels its segments and orders them by time: for calls with a speaker a side."""
    instruction: str | None = None
    """A text style (raw, lower, formatted) that the model was trained for, or a phrasing that asks for one; by default its own."""
    context: list[str] | None = None
    """Words that may occur (names, terms), where the model was trained for lists of words."""
    aligner: str | None = None
    """What times words: whisper (the bundled one), a folder or hub id of a Whisper or a CTC model; null: words have no times."""
    speech: SpeechSettings = SpeechSettings()
    chunks: ChunkSettings = ChunkSettings()
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the weights; by default as they are stored."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """vllm: the language model in vLLM, with its own batches (`pip install 'graft[vllm]'`)."""
    quantization: str | None = None
    """How vLLM quantizes the language model, such as fp8; null: not at all."""
    item_s: float = Field(default=1800.0, ge=10)
    """Seconds of audio in a work item, about: longer recordings are shared out, and a killed run loses no more."""
    formats: tuple[Format, ...] = ("txt", "json")
    """Files to write of each recording besides its parquet row."""
    cues: CueLimits = CueLimits()
    """How much a subtitle shows at a time."""
    workers: int = Field(default=1, ge=1)
    """Models that transcribe side by side."""
    threads: int = Field(default=1, ge=1)
    """CPU threads, and CPUs taken from the cluster, of each worker."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """0 transcribes on CPU."""
    readers: int = Field(default=1, ge=1)
    """Most processes that decode and look for speech; each takes a CPU."""
    items_per_batch: int = Field(default=16, ge=1)
    """Items that are read, heard and written together."""
    strict: bool = False
    """Whether the exit code is 3 if any recording failed."""
    retry_errors: bool = False
    """Whether recordings that failed in an earlier run are tried again."""
    price: float | None = Field(default=None, ge=0)
    """Of an hour on the whole cluster: the summary then tells the cost of an hour of audio."""
