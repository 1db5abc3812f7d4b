"""Decode uploads into chunks of speech in worker processes, so that no file can take the service down.

upload on disk -> its client's turn -> a process, limited in time and memory -> decode, find speech, cut -> chunks
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import Field

from graft.audio.chunking import Chunk, Chunker, ChunkSettings
from graft.audio.clip import AudioClip
from graft.audio.defects import AudioDefect
from graft.audio.vad import SpeechSettings
from graft.config import Recipe
from graft.errors import AudioError, AudioTooLong

from ..logs import LOG
from .process_pool import CallFailed, ProcessWorker
from .turns import Turns

UNDECODABLE = "file: cannot be decoded; convert it, for example with `ffmpeg -i IN OUT.flac`"
UPLOADS_PER_PROCESS = 1_000
"""Uploads after which a process is replaced, so that memory that decoders leak does not accumulate."""
SHORT_S = 60.0
"""Seconds of audio that an upload may have to be decoded in its first turn."""
SHORT_TIMEOUT_S = 10.0
"""Seconds that a first turn may take. An upload that needs more waits for a long one."""
PRELOAD = ["av", "torch", "graft.audio.decoding", "graft.audio.spans", "graft.audio.vad", __name__]
"""Modules that the forkserver imports, so that a new process is ready within a second."""


class DecodeArgs(Recipe):
    """Limits on uploads, and how they are cut into chunks."""

    processes: int = Field(default=2, ge=1)
    """Processes, each of which decodes one upload at a time. With two or more, one of them is kept for uploads of up to
    a minute and for reading headers."""
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
    """An upload's duration in seconds, its chunks, and what is wrong with its audio."""

    duration_s: float
    chunks: list[Chunk]
    defects: tuple[AudioDefect, ...] = ()


@dataclass(frozen=True)
class LongUpload:
    """Says that an upload is longer than SHORT_S, and how long its header says that it is."""

    stated_s: float


@dataclass(frozen=True)
class DecodeCall:
    """What a process is asked for: a whole upload, or the upload if it is short and else what its header says."""

    path: str
    only_short: bool


DecodeResult = DecodedUpload | LongUpload | AudioError


class Decoder:
    """Decodes uploads. Call `close` to end its processes.

    Each upload first gets a short turn, which decodes it if it is short and else reads its header. Long ones wait for
    another turn in a process that is not kept for short turns. Who has used the processes least gets the next turn,
    and among the uploads of one client the shortest.
    """

    def __init__(self, args: DecodeArgs) -> None:
        self._args = args
        self._turns = Turns(
            [
                ProcessWorker(
                    partial(_make_decode, args),
                    timeout_s=args.timeout_s,
                    max_calls=UPLOADS_PER_PROCESS,
                    preload=PRELOAD,
                )
                for _ in range(args.processes)
            ]
        )

    async def __call__(self, path: str, client: str = "") -> DecodedUpload:
        """Decode and cut an upload of a client; cancelling this kills the process that decodes it.

        Raises AudioError for an upload that cannot be decoded or is too long.
        """
        result = await self._decode_if_short(path, client)
        if isinstance(result, LongUpload):
            result = await self._call(DecodeCall(path, only_short=False), client, result.stated_s, self._args.timeout_s)
        if isinstance(result, DecodedUpload):
            return result
        raise result if isinstance(result, AudioError) else AudioError(UNDECODABLE)

    async def _decode_if_short(self, path: str, client: str) -> DecodeResult:
        timeout_s = min(SHORT_TIMEOUT_S, self._args.timeout_s)
        try:
            return await self._call(DecodeCall(path, only_short=True), client, 0.0, timeout_s)
        except TimeoutError:
            return LongUpload(self._args.max_duration_s)  # whatever its header says

    async def _call(self, call: DecodeCall, client: str, expected_s: float, timeout_s: float) -> DecodeResult:
        """Call a process in the client's turn. Raises AudioError, and TimeoutError for a short turn."""
        try:
            async with self._turns.take(client, expected_s, is_long=not call.only_short) as process:
                return await process.call(call, timeout_s=timeout_s)
        except TimeoutError as error:
            if timeout_s < self._args.timeout_s:
                raise
            raise AudioError(f"file: decoding took longer than {timeout_s:g} s; split it") from error
        except CallFailed as error:  # the process died, ran out of memory, or met an exception that is no AudioError
            LOG.warning("decoding an upload failed: %s", error)
            raise AudioError(UNDECODABLE) from error

    def close(self) -> None:
        """Kill the processes, even while they decode."""
        self._turns.close()


def _make_decode(args: DecodeArgs) -> Callable[[DecodeCall], DecodeResult]:
    """Prepare a worker process and return its function.

    What decoding needs is loaded before memory is limited. Core dumps and the output of decoding libraries are dropped.
    """
    import resource

    import torch

    from graft.audio.clip import read_audio
    from graft.audio.spans import probe

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

    def decode(call: DecodeCall) -> DecodeResult:
        is_limited = call.only_short and args.max_duration_s > SHORT_S
        try:
            if is_limited and (stated_s := probe(call.path, name="file").duration_s or 0.0) > SHORT_S:
                return LongUpload(stated_s)
            max_s = SHORT_S if is_limited else args.max_duration_s
            clip = read_audio(call.path, name="file", max_s=max_s, salvage=True)
        except AudioTooLong as error:  # the header is silent or false
            return LongUpload(args.max_duration_s) if is_limited else error
        except AudioError as error:
            return error
        return DecodedUpload(clip.duration_s, chunker(clip), clip.defects)

    return decode
