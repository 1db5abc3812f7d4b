"""Clips of a corpus -> texts, through Ray Data: a pool of actors with a graft or plain Whisper each takes batches of rows.

A clip that can't be read is a value too: it has an error and no text.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from graft.audio.clip import AudioClip, read_audio
from graft.checkpoints.names import absolute_checkpoint
from graft.data.dataset import RowReader, RowTable
from graft.errors import AudioError, DataError, GraftError, ModelError


@dataclass(frozen=True)
class AsrModelSpec:
    """Who listens, and on what each of the `workers` does."""

    kind: Literal["graft", "whisper"]
    path: str
    dtype: str = "fp32"
    gpu: bool = False
    threads: int = 1
    workers: int = 1
    instruction: str | None = None
    """What a graft is asked to write, by the name of a wording or in words; null: what it was trained on first."""


@dataclass(frozen=True)
class ClipTranscript:
    """What is heard in a clip, or else the error that says why it can't be read."""

    text: str = ""
    error: str = ""
    duration_s: float = 0.0
    mean_logprob: float | None = None
    """Of the text's tokens; Whisper's alone."""


@dataclass(frozen=True)
class BatchTranscripts:
    """The clips of the `number`-th batch, and when it was begun and done (seconds)."""

    number: int
    clips: list[ClipTranscript]
    times: list[float]


def transcribe_rows(
    listener: AsrModelSpec, rows: RowTable, batches: Sequence[np.ndarray]
) -> Iterator[BatchTranscripts]:
    """Transcribe batches of row numbers, in the order in which they are ready. Raises ModelError for a model that can't be opened."""
    import ray

    path = absolute_checkpoint(listener.path)
    blocks = ray.data.range(len(batches), override_num_blocks=len(batches)).map_batches(
        AsrWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(listener.workers, len(batches))),
        num_cpus=listener.threads,
        num_gpus=1 if listener.gpu else 0,
        fn_constructor_args=(listener, path, ray.put(rows), ray.put(list(batches))),
    )
    for block in blocks.iter_batches(batch_size=None, batch_format="numpy"):
        for number, heard in zip(block["id"], block["heard"], strict=True):
            answer = json.loads(str(heard))
            if answer["fault"]:
                raise ModelError(answer["fault"])
            yield BatchTranscripts(int(number), [ClipTranscript(**clip) for clip in answer["clips"]], answer["times"])


def whisper_folder(name: str) -> str:
    """The checkpoint that a recipe names, `bundled` or another. Raises ModelError where it is no Whisper, MissingExtra."""
    from graft.checkpoints.build import check_kind
    from graft.checkpoints.bundled.cache import bundled_whisper

    path = str(bundled_whisper()) if name == "bundled" else name
    check_kind(path, "whisper")
    return path


class AsrWorker:
    """A Ray Data actor: batch numbers -> texts of their clips.

    A model that can't be opened is a value too, `fault`: raised in here, Ray would print it with three tracebacks.
    """

    def __init__(self, listener: AsrModelSpec, path: str, rows: Any, batches: Any) -> None:
        import ray
        import torch

        torch.set_num_threads(listener.threads)
        self.rows: RowTable = ray.get(rows)
        self.batches: list[np.ndarray] = ray.get(batches)
        self.fault = ""
        try:
            self.listen = _load(listener, path)
        except GraftError as error:
            self.fault = str(error)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "id": block["id"],
            "heard": np.array([json.dumps(self._hear(self.batches[int(number)])) for number in block["id"]]),
        }

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self.rows.files)

    def _hear(self, batch: np.ndarray) -> dict[str, Any]:
        if self.fault:
            return {"fault": self.fault}
        start = time.time()
        clips = [self._read(int(row)) for row in batch]
        heard = iter(self.listen([clip for clip in clips if isinstance(clip, AudioClip)]))
        answers = [next(heard) if isinstance(clip, AudioClip) else ClipTranscript(error=str(clip)) for clip in clips]
        return {"fault": "", "clips": [asdict(answer) for answer in answers], "times": [start, time.time()]}

    def _read(self, row: int) -> AudioClip | AudioError | DataError:
        rows = self.rows
        try:
            wav, path = self._reader.wav(rows.file[row], rows.row_group[row], rows.row[row])
            return read_audio(wav, name=path or rows.id(row))
        except (AudioError, DataError) as error:
            return error


def _load(listener: AsrModelSpec, path: str) -> Callable[[Sequence[AudioClip]], list[ClipTranscript]]:
    from graft.audio.chunking import windows
    from graft.checkpoints.loading import DTYPES
    from graft.inference.engines.whisper_baseline import WhisperBaseline
    from graft.inference.transcriber import open_transcriber

    device = "cuda" if listener.gpu else "cpu"
    if listener.kind == "whisper":
        whisper = WhisperBaseline(path, device=device, dtype=DTYPES[listener.dtype])
        return lambda clips: [
            ClipTranscript(hearing.text, duration_s=clip.duration_s, mean_logprob=hearing.mean_logprob)
            for clip, hearing in zip(clips, whisper.transcribe_many(clips), strict=True)
        ]
    transcriber = open_transcriber(
        path, device=device, dtype=listener.dtype, chunker=windows
    )  # all of a clip, as Whisper hears it

    def transcribe(clips: Sequence[AudioClip]) -> list[ClipTranscript]:
        heard = []
        for transcript in transcriber.transcribe_many(clips, instruction=listener.instruction):
            if isinstance(transcript, AudioError):
                raise transcript  # left out, it would shift every later clip's text to its neighbour
            heard.append(ClipTranscript(transcript.text, duration_s=transcript.duration_s))
        return heard

    return transcribe
