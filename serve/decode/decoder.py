"""Uploads -> chunks of speech, in processes of their own: whatever a file does to its decoder, the service stays up.

upload on disk -> the process with the least to do (bounded in time and memory) -> decode, find speech, cut -> chunks
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from graft.audio.chunking import Chunk, Chunker, ChunkSettings
from graft.audio.clip import AudioClip
from graft.audio.vad import SpeechSettings
from graft.errors import AudioError

from ..logs import LOG
from .process_pool import CallFailed, ProcessWorker

DAMAGED = "file: can't be decoded: convert it, e.g. `ffmpeg -i IN OUT.flac`"
UPLOADS_PER_PROCESS = 1_000
"""Then a fresh process takes over: what decoders leak does not add up."""
SHORT_BYTES = 2**20
"""Longer uploads (of over half a minute, if not compressed) stay out of the first process, where short ones are not kept waiting."""
PRELOADED = ["av", "torch", "graft.audio.decoding", "graft.audio.vad", "serve.decode.decoder"]
"""By the process from which the others are forked: so a new one is there within a second."""


class DecodeArgs(BaseModel):
    """What an upload may take."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    processes: int = Field(default=2, ge=1)
    """Uploads that are decoded at a time; of several, one is left to short ones."""
    max_duration_s: float = Field(default=3600, gt=0)
    """Longer audio is refused."""
    timeout_s: float = Field(default=60, gt=0)
    """Seconds for which an upload may keep a process."""
    memory_bytes: int = Field(default=2 * 2**30, ge=2**28)
    """Memory that a process may take on top of what it has when it starts."""
    speech: SpeechSettings = SpeechSettings()
    chunks: ChunkSettings = ChunkSettings()


@dataclass(frozen=True)
class Decoded:
    """An upload's length in seconds and its chunks."""

    duration_s: float
    chunks: list[Chunk]


class Decoder:
    """Decodes uploads. Call `close` to end its processes."""

    def __init__(self, args: DecodeArgs) -> None:
        self._timeout_s = args.timeout_s
        self._processes = [_Process(args) for _ in range(args.processes)]

    async def __call__(self, path: str) -> Decoded:
        """Decode and cut an upload; the process of a cancelled one is ended. Raises AudioError for one that can't be, or is too long."""
        size = os.path.getsize(path)
        open_to_it = self._processes[1:] if size > SHORT_BYTES else self._processes
        try:
            decoded = await min(open_to_it or self._processes, key=lambda process: process.waiting_bytes).decode(
                path, size
            )
        except TimeoutError as error:
            raise AudioError(f"file: not decoded within {self._timeout_s:g} s: cut it") from error
        except CallFailed as error:  # its process died, had too little memory, or met what no decoder foresaw
            LOG.warning("a decoder failed on an upload: %s", error)
            raise AudioError(DAMAGED) from error
        if isinstance(decoded, AudioError):
            raise decoded
        return decoded

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.close()


class _Process(ProcessWorker["Decoded | AudioError"]):
    """A process that decodes, and the bytes that wait for it."""

    def __init__(self, args: DecodeArgs) -> None:
        super().__init__(
            partial(_opened, args), timeout_s=args.timeout_s, max_calls=UPLOADS_PER_PROCESS, preload=PRELOADED
        )
        self.waiting_bytes = 0

    async def decode(self, path: str, size: int) -> Decoded | AudioError:
        self.waiting_bytes += size
        try:
            return await self.call(path)
        finally:
            self.waiting_bytes -= size


def _opened(args: DecodeArgs) -> Callable[[str], Decoded | AudioError]:
    """What decodes, once the process is ready: it has loaded what that takes, and has its memory bounded.

    It keeps to itself what decoders print, and what crashes leave.
    """
    import resource

    import torch

    import graft.audio.decoding  # noqa: F401 - before memory is bounded
    from graft.audio.clip import read_audio

    torch.set_num_threads(1)
    cut = Chunker(args.speech, args.chunks)
    cut(AudioClip(np.zeros(16_000, np.float32)))
    most = _address_space() + args.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def decode(path: str) -> Decoded | AudioError:
        try:
            clip = read_audio(path, name="file", max_s=args.max_duration_s)
        except AudioError as error:
            return error
        return Decoded(clip.duration_s, [_own(chunk) for chunk in cut(clip)])

    return decode


def _own(chunk: Chunk) -> Chunk:
    """A chunk with samples of its own, so that the clip is not sent along."""
    return Chunk(chunk.start_s, AudioClip(chunk.clip.samples.copy()), chunk.has_speech)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
