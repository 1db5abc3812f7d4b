"""Decode uploads into chunks of speech in worker processes, so that no file can take the service down.

upload on disk -> the least busy process, limited in time and memory -> decode, find speech, cut -> chunks
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import Field

from graft.audio.chunking import Chunk, Chunker, ChunkSettings
from graft.audio.clip import AudioClip
from graft.audio.vad import SpeechSettings
from graft.config import Recipe
from graft.errors import AudioError

from ..logs import LOG
from .process_pool import CallFailed, ProcessWorker

UNDECODABLE = "file: cannot be decoded; convert it, for example with `ffmpeg -i IN OUT.flac`"
UPLOADS_PER_PROCESS = 1_000
"""Uploads after which a process is replaced, so that memory that decoders leak does not accumulate."""
SHORT_BYTES = 2**20
"""Larger uploads (over half a minute if uncompressed) leave the first process to short ones, which then wait less."""
PRELOAD = ["av", "torch", "graft.audio.decoding", "graft.audio.vad", __name__]
"""Modules that the forkserver imports, so that a new process is ready within a second."""


class DecodeArgs(Recipe):
    """Limits on uploads, and how they are cut into chunks."""

    processes: int = Field(default=2, ge=1)
    """Processes, each of which decodes one upload at a time. With two or more, one of them takes short uploads only."""
    max_duration_s: float = Field(default=3600, gt=0)
    """Longest audio in seconds. Longer audio gets a 413."""
    timeout_s: float = Field(default=60, gt=0)
    """Seconds that decoding an upload may take."""
    memory_bytes: int = Field(default=2 * 2**30, ge=2**28)
    """Memory in bytes that a process may allocate in addition to what it has at its start."""
    speech: SpeechSettings = SpeechSettings()
    """Settings of speech detection."""
    chunks: ChunkSettings = ChunkSettings()
    """Settings of the chunker."""


@dataclass(frozen=True)
class DecodedUpload:
    """An upload's duration in seconds and its chunks."""

    duration_s: float
    chunks: list[Chunk]


class Decoder:
    """Decodes uploads. Call `close` to end its processes."""

    def __init__(self, args: DecodeArgs) -> None:
        self._timeout_s = args.timeout_s
        self._processes = [
            ProcessWorker(
                partial(_make_decode, args), timeout_s=args.timeout_s, max_calls=UPLOADS_PER_PROCESS, preload=PRELOAD
            )
            for _ in range(args.processes)
        ]
        self._waiting_bytes = [0] * args.processes  # size of the uploads that each process has to decode

    async def __call__(self, path: str) -> DecodedUpload:
        """Decode and cut an upload; cancelling this kills the process that decodes it.

        Raises AudioError for an upload that cannot be decoded or is too long.
        """
        size, count = os.path.getsize(path), len(self._processes)
        first = 1 if size > SHORT_BYTES and count > 1 else 0
        index = min(range(first, count), key=self._waiting_bytes.__getitem__)
        self._waiting_bytes[index] += size
        try:
            result = await self._processes[index].call(path)
        except TimeoutError as error:
            raise AudioError(f"file: decoding took longer than {self._timeout_s:g} s; split it") from error
        except CallFailed as error:  # the process died, ran out of memory, or met an exception that is no AudioError
            LOG.warning("decoding an upload failed: %s", error)
            raise AudioError(UNDECODABLE) from error
        finally:
            self._waiting_bytes[index] -= size
        if isinstance(result, AudioError):
            raise result
        return result

    def close(self) -> None:
        """Kill the processes, even while they decode."""
        for process in self._processes:
            process.close()


def _make_decode(args: DecodeArgs) -> Callable[[str], DecodedUpload | AudioError]:
    """Prepare a worker process and return its function.

    What decoding needs is loaded before memory is limited. Core dumps and the output of decoding libraries are dropped.
    """
    import resource

    import torch

    import graft.audio.decoding  # noqa: F401
    from graft.audio.clip import read_audio

    torch.set_num_threads(1)
    chunker = Chunker(args.speech, args.chunks)
    chunker(AudioClip(np.zeros(16_000, np.float32)))  # loads the speech detector
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped_bytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = mapped_bytes + args.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

    def decode(path: str) -> DecodedUpload | AudioError:
        try:
            clip = read_audio(path, name="file", max_s=args.max_duration_s)
        except AudioError as error:
            return error
        return DecodedUpload(clip.duration_s, chunker(clip))

    return decode
