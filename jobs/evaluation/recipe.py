"""The recipe of jobs.evaluate."""

from typing import Literal

from pydantic import Field

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.config import Recipe
from graft.data.settings import Sources


class EvaluateRecipe(Recipe):
    """The model to score, and the clips to score it on."""

    model: str
    """Folder or hub id of a graft, or the output folder of a stage."""
    data: dict[str, Sources]
    """Test sets by name: parquet files, a folder, a glob, or {files, columns}."""
    out: str
    """Folder for the report. While the job runs, its results, made sounds and joined recordings are there too: every
    machine of a cluster must see it."""
    baseline: str | None = "bundled"
    """Whisper checkpoint that is scored beside the model; `bundled` is Whisper base, null scores none."""
    limit: int | None = Field(default=None, ge=1)
    """Number of clips to score, the first ones of each set; null scores all."""
    audio_check: str | None = None
    """Name of a set that is also scored with every clip's audio swapped for another's, which a model that listens
    fails."""
    instructions: list[str] = Field(default=[])
    """Text styles or phrasings that the model was trained for; the answers to each are scored as those of a further
    model."""
    sounds: bool = False
    """Count what is written on silence, noise, tones and ringing, which are made by the seed."""
    recordings_s: float | None = Field(default=None, gt=30)
    """Score each set also as recordings of about so many seconds, in which its clips follow one another with short
    pauses."""
    windows: bool = False
    """By default clips are transcribed as jobs.transcribe does: a detector finds the speech in them and the rest is
    skipped. true transcribes all of each clip in windows of at most 30 s, without the detector."""
    speech: SpeechSettings = SpeechSettings()
    """How speech is found, as in jobs.transcribe; windows=true does not use it."""
    chunks: ChunkSettings = ChunkSettings()
    """How speech is cut into chunks, as in jobs.transcribe; windows=true does not use it."""
    batch_clips: int = Field(default=16, ge=1)
    """Number of clips that a worker reads and transcribes together."""
    readers: int = Field(default=1, ge=1)
    """Most processes that decode audio and find speech; each takes one CPU."""
    workers: int = Field(default=1, ge=1)
    """Number of models that transcribe side by side."""
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of each worker, and CPUs that it takes from the cluster."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the weights; null takes the one that they are stored in, as jobs.transcribe does."""
    gpu: bool = False
    """Whether each worker takes a GPU."""
    seed: int = 0
    """Seed of the bootstrap intervals and of the sounds."""
    expected: dict[str, dict[Literal["wer", "cer", "wer_raw", "cer_raw"], tuple[float, float]]] = Field(default={})
    """Published figures: set -> rate -> the least and the greatest value that agree with one. When a rate of the model
    is outside, the job ends with exit code 1."""
