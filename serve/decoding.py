"""Uploads -> chunks of speech, in processes of their own: whatever a file does to its decoder, the service stays up.

upload on disk -> the process with the least to do (bounded in time and memory) -> decode, find speech, cut -> chunks
"""

import asyncio
import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pebble import ProcessExpired, ProcessPool
from pydantic import BaseModel, ConfigDict, Field

from graft.audio import AudioClip
from graft.chunking import Chunk, Chunker, ChunkSettings
from graft.errors import AudioError
from graft.speech import SpeechSettings

LOG = logging.getLogger("graft.serve")
DAMAGED = "file: can't be decoded: convert it, e.g. `ffmpeg -i IN OUT.flac`"
UPLOADS_PER_PROCESS = 1_000
"""Then a fresh process takes over: what decoders leak does not add up."""
SHORT_BYTES = 2**20
"""Longer uploads (of over half a minute, if not compressed) stay out of the first process, where short ones are not kept waiting."""
PRELOADED = ["av", "torch", "graft.decoding", "graft.speech", "serve.decoding"]
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
        self._processes = [_Process(args) for _ in range(args.processes)]

    async def __call__(self, path: str) -> Decoded:
        """Decode and cut an upload. Raises AudioError for one that can't be, or is too long; the process of a cancelled one is ended."""
        size = os.path.getsize(path)
        open_to_it = self._processes[1:] if size > SHORT_BYTES else self._processes
        return await min(open_to_it or self._processes, key=lambda process: process.waiting_bytes).decode(path, size)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.close()


class _Process:
    """One process and the uploads that wait for it; it is replaced when it dies."""

    def __init__(self, args: DecodeArgs) -> None:
        self._args = args
        self._pool = self._start()
        self.waiting_bytes = 0

    async def decode(self, path: str, size: int) -> Decoded:
        self.waiting_bytes += size
        try:
            try:
                return await self._decode(path)
            except ProcessExpired:  # perhaps of another upload, whose turn it still was
                return await self._decode(path)
        except TimeoutError as error:
            raise AudioError(f"file: not decoded within {self._args.timeout_s:g} s: cut it") from error
        except AudioError:
            raise
        except Exception as error:  # the process died, had too little memory, or met what no decoder foresaw
            LOG.warning("a decoder failed on an upload: %s", type(error).__name__)
            raise AudioError(DAMAGED) from error
        finally:
            self.waiting_bytes -= size

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()

    async def _decode(self, path: str) -> Decoded:
        if not self._pool.active:  # it broke, as where memory is too short to start a process
            self._pool = self._start()
        future = self._pool.schedule(_decode, args=(path, self._args.max_duration_s), timeout=self._args.timeout_s)
        return await asyncio.wrap_future(future)

    def _start(self) -> ProcessPool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pool = ProcessPool(
            max_workers=1,
            max_tasks=UPLOADS_PER_PROCESS,
            initializer=_prepare,
            initargs=(self._args.memory_bytes, self._args.speech, self._args.chunks),
            context=context,
        )
        pool.schedule(os.getpid)  # starts the process now, not at the first upload
        return pool


_cut: Callable[[AudioClip], list[Chunk]]


def _prepare(memory_bytes: int, speech: SpeechSettings, chunks: ChunkSettings) -> None:
    """Make a process ready: load what it needs, bound its memory, and keep what decoders print, and what crashes leave, to itself."""
    import resource

    import torch

    import graft.decoding  # noqa: F401 - before memory is bounded

    global _cut
    torch.set_num_threads(1)
    _cut = Chunker(speech, chunks)
    _cut(AudioClip(np.zeros(16_000, np.float32)))
    most = _address_space() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _decode(path: str, max_duration_s: float) -> Decoded:
    from graft.audio import read_audio

    clip = read_audio(path, name="file", max_s=max_duration_s)
    return Decoded(clip.duration_s, [_own(chunk) for chunk in _cut(clip)])


def _own(chunk: Chunk) -> Chunk:
    """A chunk with samples of its own, so that the clip is not sent along."""
    return Chunk(chunk.start_s, AudioClip(chunk.clip.samples.copy()), chunk.has_speech)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
