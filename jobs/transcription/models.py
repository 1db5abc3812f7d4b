"""Open the models that transcribe chunks of audio in the bulk pipeline: a graft, or plain Whisper as the baseline."""

import asyncio
import functools
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from graft.audio.chunking import Chunk, windows
from graft.checkpoints.names import absolute_checkpoint
from graft.inference.transcript import Segment

if TYPE_CHECKING:
    from graft.audio.clip import AudioClip
    from graft.inference.engines.whisper_baseline import WhisperBaseline, WhisperTranscript
    from graft.inference.transcriber import Transcriber


class ChunkTranscriber(Protocol):
    """A model that transcribes chunks, called from several threads and event loops; graft's Transcriber is one."""

    @property
    def transcribe_chunks(self) -> Callable[..., Awaitable[Sequence[Segment]]]:
        """Chunks that are cut already, and options -> a segment for each, in their order."""


Opener = Callable[[], ChunkTranscriber]


def model_opener(kind: Literal["graft", "whisper"], model: str, *, threads: int, gpu: bool, **settings: Any) -> Opener:
    """Return a function that opens a model in a worker; `settings` are graft.load's, for Whisper `dtype` alone."""
    opener: Callable[..., ChunkTranscriber] = _open_graft if kind == "graft" else _open_whisper
    return functools.partial(
        opener, absolute_checkpoint(model), threads=threads, device="cuda" if gpu else "cpu", **settings
    )


def find_whisper(name: str) -> str:
    """Return the Whisper checkpoint that a recipe names; `bundled` is Whisper base. Raises ModelError, MissingExtra."""
    from graft.checkpoints.build import check_kind
    from graft.checkpoints.bundled.cache import bundled_whisper

    path = str(bundled_whisper()) if name == "bundled" else name
    check_kind(path, "whisper")
    return path


class WhisperTranscriber:
    """Plain Whisper as a ChunkTranscriber; the chunks of all items on one event loop are decoded together."""

    def __init__(self, whisper: "WhisperBaseline") -> None:
        self._whisper = whisper
        self._lock = threading.Lock()  # PyTorch's threads serve one batch at a time
        self._batches: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[list[AudioClip], list[WhisperTranscript]]
        ] = weakref.WeakKeyDictionary()

    async def transcribe_chunks(self, chunks: Sequence[Chunk]) -> list[Segment]:
        """Transcribe chunks of at most 30 s; a segment for each, in their order."""
        clips, answers = self._batches.setdefault(asyncio.get_running_loop(), ([], []))
        start = len(clips)
        clips += [chunk.clip for chunk in chunks]
        await asyncio.sleep(0)  # every other item adds its chunks before the first one goes on
        if len(answers) < len(clips):
            with self._lock:
                answers += self._whisper.transcribe_many(clips[len(answers) :])
        return [
            Segment(chunk.start_s, chunk.start_s + chunk.clip.duration_s, answer.text, answer.mean_logprob)
            for chunk, answer in zip(chunks, answers[start : start + len(chunks)], strict=True)
        ]


def _open_graft(model: str, **settings: Any) -> "Transcriber":
    from graft.inference.transcriber import open_transcriber

    return open_transcriber(model, chunker=windows, **settings)  # readers cut the audio; the chunker is not called


def _open_whisper(checkpoint: str, *, threads: int, device: str, dtype: str | None) -> WhisperTranscriber:
    import torch

    from graft.checkpoints.loading import DTYPES
    from graft.inference.engines.whisper_baseline import WhisperBaseline

    torch.set_num_threads(threads)
    return WhisperTranscriber(WhisperBaseline(checkpoint, device=device, dtype=DTYPES[dtype] if dtype else None))
