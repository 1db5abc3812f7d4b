"""Share the service among live sessions: how many there are, and which of their passes the engines have."""

from collections.abc import Iterator
from contextlib import aclosing, contextmanager

from graft.audio.chunking import Chunk
from graft.inference.segments import Segment

from ..fairness import FairSlots
from ..service import NO_SEGMENT, Client, FoundLanguage, Service, ServiceBusy, TranscriptionOptions

RETRY_AFTER_S = 30
"""Seconds after which to ask again for a live session; they last for minutes."""


class LiveCapacity:
    """Holds the places of live sessions, of which there are at most `max_sessions`, and runs their passes.

    A session takes one of the places of requests too. Last passes over utterances share the engines with uploads. At
    most `max_early_passes` of those before the last run at once, so that text that comes early never delays last text
    for long.
    """

    def __init__(self, service: Service, *, max_sessions: int, max_early_passes: int) -> None:
        self.service = service
        self.session_count = 0
        self._max_sessions = max_sessions
        self._early_slots = FairSlots(max_early_passes, max_early_passes)

    @contextmanager
    def hold_session(self, client: Client) -> Iterator[None]:
        """Hold a place until the block ends. Raises ServiceBusy, ServiceStopping."""
        if self.session_count >= self._max_sessions:
            raise ServiceBusy(RETRY_AFTER_S, f"all {self._max_sessions} live sessions are taken")
        with self.service.hold_place(client):
            self.session_count += 1
            try:
                yield
            finally:
                self.session_count -= 1

    async def transcribe(
        self, chunk: Chunk, options: TranscriptionOptions, client: Client, *, is_last: bool
    ) -> tuple[Segment, str | None]:
        """Transcribe what is there of an utterance; returns the language too, where it was found out.

        Raises ServiceBusy, ModelNotReady, ModelError.
        """
        if not is_last:
            async with self._early_slots.slot(client.id):
                return await self._transcribe(chunk, options)
        with self.service.queue_speech(client, chunk.clip.duration_s):
            async with self.service.chunk_slot(client):
                return await self._transcribe(chunk, options)

    async def _transcribe(self, chunk: Chunk, options: TranscriptionOptions) -> tuple[Segment, str | None]:
        language = options.language
        async with aclosing(self.service.backend.transcribe_chunk(chunk, options, stream=False)) as parts:
            async for part in parts:
                if isinstance(part, FoundLanguage):
                    language = part.code
                elif isinstance(part, Segment):
                    return part, language
        raise RuntimeError(NO_SEGMENT)
