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
"""Keys that change how a run works and which files it writes, not what the transcripts say."""


class TranscribeRecipe(Recipe):
    """The audio to transcribe, the model, and how the run works."""

    model: str
    """Folder or hub id of a graft, the output folder of a stage, or the name of a graft that comes with the package."""
    model_digest: str | None = None
    """SHA-256 over the model's files, which a run checks; null takes the model as it is. Results of different models
    are never mixed."""
    audio: str | list[str]
    """Files, folders (at any depth), globs, s3:// and other URIs, .txt lists of them with one in each line, and
    parquet files with audio in them."""
    out: str | None = None
    """Folder for the transcripts, which every machine of a cluster must see; null only prints them."""
    columns: Columns = Columns()
    """Names of the columns of parquet files."""
    channels: Literal["mix", "split"] = "mix"
    """mix transcribes the mean of all channels; split transcribes each by itself and orders the labelled segments by
    time, for calls with one speaker on each channel."""
    instruction: str | None = None
    """Text style (raw, lower, formatted) that the model was trained for, or a phrasing that asks for one; null takes
    the model's own."""
    context: list[str] | None = None
    """Words that may occur (names, terms), for a model that was trained for lists of words."""
    aligner: str | None = None
    """Model that finds the times of words: whisper (the bundled one), or folder or hub id of a Whisper or a CTC model;
    with null, words have no times."""
    speech: SpeechSettings = SpeechSettings()
    """How speech is found in the audio."""
    chunks: ChunkSettings = ChunkSettings()
    """How speech is cut into chunks for the model."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the weights; null takes the one that they are stored in."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine of the language model; vllm schedules its own batches and needs `pip install 'graft[vllm]'`."""
    quantization: str | None = None
    """Method by which vLLM quantizes the language model, such as fp8; null does not quantize it."""
    item_s: float = Field(default=1800.0, ge=10)
    """Approximate seconds of audio in a work item. Longer recordings are shared out to several workers, and a killed
    run loses at most the items that it was transcribing."""
    formats: tuple[Format, ...] = ("txt", "json")
    """Formats of the files that are written for each recording besides its parquet row."""
    cues: CueLimits = CueLimits()
    """How much text a subtitle shows at a time."""
    workers: int = Field(default=1, ge=1)
    """Number of models that transcribe side by side."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each worker, and CPUs that it takes from the cluster."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs, or share of one, that each worker takes; 0 transcribes on CPUs."""
    readers: int = Field(default=1, ge=1)
    """Most processes that decode audio and find speech; each takes one CPU."""
    items_per_batch: int = Field(default=16, ge=1)
    """Number of items that are read, transcribed and written together."""
    strict: bool = False
    """Whether the exit code is 3 if a recording failed."""
    retry_errors: bool = False
    """Whether recordings that failed in an earlier run are tried again."""
    price: float | None = Field(default=None, ge=0)
    """Price of an hour of the whole cluster in your currency; the summary then has the cost of an hour of audio."""
