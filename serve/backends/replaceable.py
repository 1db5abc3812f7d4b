"""Replace the model of an engine replica while it transcribes.

fits into memory:  open the new model beside the old one -> send new chunks to it -> close the old one after its chunks
does not fit:      new chunks wait -> close the old model after its chunks -> open the new one -> the chunks go on
"""

import asyncio
import os
import tempfile
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from filelock import FileLock

from graft.audio.chunking import Chunk
from graft.checkpoints.names import checkpoint_name
from graft.inference.engines.protocol import EngineCounts

from ..logs import LOG
from ..service import NO_COUNTS, FailedChange, ModelInfo, ModelNotReady, Part, ReplicaModel, TranscriptionOptions
from .local import LocalBackend


class ReplaceableModel:
    """The open model of an engine replica. One that cannot be opened leaves the model before it in place.

    `open_model` opens a model, and `fits` tells whether one more fits into memory; both run in threads. `replica` is
    the name under which ModelInfo lists the model.
    """

    def __init__(
        self, replica: str, open_model: Callable[[str], LocalBackend], fits: Callable[[str], bool] = lambda model: True
    ) -> None:
        self._replica, self._open_model, self._fits = replica, open_model, fits
        self._backend: LocalBackend | None = None
        self._is_open = asyncio.Event()  # set while there is a backend
        self._info: ModelInfo | None = None  # of the last backend
        self._digest = ""
        self._wanted = ""
        self._failure: FailedChange | None = None
        self._changing = asyncio.Lock()
        self.path = ""
        """The folder or hub id of the model."""
        self.is_lost = False
        """Whether no model is open and none will be: only another process can help."""

    async def open(self, models: Sequence[str]) -> None:
        """Open the first of these models that can be opened. Raises the first error where none can be."""
        errors: list[Exception] = []
        for model in dict.fromkeys(models):
            try:
                self._use(model, await asyncio.to_thread(self._open_model, model))
                break
            except Exception as error:
                errors.append(error)
                LOG.error("the model %s cannot be opened: %s", model, _one_line(error))
                await _release(error)
        else:
            raise errors[0]
        self._wanted = models[0]
        self._failure = _describe_failure(models[0], errors[0]) if errors else None

    async def replace(self, model: str) -> None:
        """Replace the model, if it is not replaced by yet another one meanwhile; returns when the old one is closed."""
        self._wanted = model
        async with self._changing:
            if model != self._wanted:
                return
            if model == self.path:  # the change back from one that failed
                self._failure = None
            elif not await self._replace_beside(model):
                await self._replace_alone(model)

    async def fits(self, model: str) -> bool:
        """Tell whether a model fits into memory beside the one that is open."""
        return await asyncio.to_thread(self._fits, model)

    def model_info(self) -> ModelInfo:
        """Return what is served, or what was served before the change under way. Any thread may call it.

        Raises ModelNotReady.
        """
        if self._info is None:
            raise ModelNotReady
        name, is_open = checkpoint_name(self.path), self._backend is not None
        own = ReplicaModel(self._replica, name, self._digest, is_open=is_open, failure=self._failure)
        return replace(self._info, replicas=(own,))

    def counts(self) -> EngineCounts:
        """Return what the engine holds now and what it has done; zeros while no model is open."""
        return self._backend.counts() if self._backend else NO_COUNTS

    async def transcribe_chunk(
        self, chunk: Chunk, options: TranscriptionOptions, *, stream: bool
    ) -> AsyncGenerator[Part, None]:
        """See TranscriptionBackend. A chunk waits while no model is open."""
        while (backend := self._backend) is None:
            await self._is_open.wait()
        async with aclosing(backend.transcribe_chunk(chunk, options, stream=stream)) as parts:
            async for part in parts:
                yield part

    async def _replace_beside(self, model: str) -> bool:
        """Open a model beside the old one, and close that; returns False where memory does not hold both."""
        try:
            new = await asyncio.to_thread(self._open_beside, model)
        except Exception as error:
            if _is_out_of_memory(error):
                await _release(error)
                return False
            LOG.error("the new model %s cannot be loaded, the old one stays: %s", model, _one_line(error))
            self._failure = _describe_failure(model, error)
            await _release(error)
            return True
        old = self._backend
        self._use(model, new)
        self._failure = None
        if old is not None:
            await old.close()
        return True

    async def _replace_alone(self, model: str) -> None:
        """Close the old model before the new one is opened; where that fails, the old one is opened again."""
        LOG.warning("the new model %s does not fit into memory beside the old one, which is closed first", model)
        old, self._backend = self._backend, None
        self._is_open.clear()
        if old is not None:
            await old.close()
        del old
        await _release()
        before = self.path
        try:
            self._use(model, await asyncio.to_thread(self._open_model, model))
            self._failure = None
            return
        except Exception as error:
            LOG.error("the new model %s cannot be loaded, the old one is opened again: %s", model, _one_line(error))
            self._failure = _describe_failure(model, error)
            await _release(error)
        try:
            self._use(before, await asyncio.to_thread(self._open_model, before))
        except Exception as error:
            LOG.error("the old model %s cannot be opened again: %s", before, _one_line(error))
            self.is_lost = True

    def _open_beside(self, model: str) -> LocalBackend:
        # The engines of a machine take turns, because each counts the memory that it finds free as its own.
        with FileLock(os.path.join(tempfile.gettempdir(), f"graft-engine-{os.getuid()}.lock")):
            if not self._fits(model):
                raise MemoryError
            return self._open_model(model)

    def _use(self, model: str, backend: LocalBackend) -> None:
        self._backend, self._info, self._digest, self.path = backend, backend.info, backend.digest, model
        self._is_open.set()
        LOG.info("the model %s was loaded", checkpoint_name(model))


def _one_line(error: Exception) -> str:
    from graft.storage.locations import one_line_error  # pyarrow, which an ingress need not load

    return f"{type(error).__name__}: {one_line_error(error)}"


def _describe_failure(model: str, error: Exception) -> FailedChange:
    return FailedChange(checkpoint_name(model), type(error).__name__)


def _is_out_of_memory(error: Exception) -> bool:
    from graft.inference.engines.transformers_engine import is_out_of_memory  # torch, which an engine has loaded

    return is_out_of_memory(error)


async def _release(error: Exception | None = None) -> None:
    """Free the memory of a model that was closed, or of one whose opening failed with an error."""
    from graft.inference.memory import release_memory

    if error is not None:
        traceback.clear_frames(error.__traceback__)  # they hold what was loaded; the frames that run stay
    await asyncio.to_thread(release_memory)
