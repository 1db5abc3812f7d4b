"""Transcribe one client's audio while it comes, independently of HTTP: audio in, events out.

    bytes -> samples at 16 kHz -> scores of speech -> utterances -> passes -> agreed words -> events

While somebody speaks, the utterance is transcribed again every so often. Words on which two passes agree are sent and
stay: the next pass begins with them, and decodes only what follows. A pass at the start of a pause is the last one
where the pause ends the utterance, so that the last text then comes at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from graft.audio.chunking import QUIET_S, Chunk, quietest
from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.vad import FRAME
from graft.inference.segments import Segment

from ..logs import LOG, Observer
from ..service import TranscriptionOptions
from .events import Event, committed, make_event, new_id, speech_started, speech_stopped
from .formats import AudioReader
from .samples import SampleBuffer
from .settings import ServerVad, SessionSettings
from .turns import Scorer, TurnDetector
from .utterance import Piece, Utterance

INTERVAL_S = 0.5
"""Seconds of new audio after which an utterance is transcribed again; more where a pass takes longer."""
EARLY_PAUSE_S = 0.16
"""Seconds of silence after which an utterance is transcribed as if it had ended."""
TAIL_S = 0.3
"""Seconds of silence after speech that are transcribed with it."""
LONGEST_PIECE_S = 28.0
"""Longest stretch that a pass takes; longer speech is cut where it scores lowest in the second half."""
MAX_AHEAD_S = 30.0
"""Seconds of speech that may wait for their last pass; meanwhile no more audio is taken."""
KEPT_S = 1.0
"""Seconds of audio that are kept beside the padding while nobody speaks: so late speech may be noticed."""


class EmptyBuffer(Exception):
    """There is no audio to commit."""


class Transcribe(Protocol):
    """Transcribes a chunk; returns the language too, where it was found out."""

    def __call__(
        self, chunk: Chunk, options: TranscriptionOptions, *, is_last: bool
    ) -> Awaitable[tuple[Segment, str | None]]: ...


@dataclass(eq=False)
class _Pass:
    """One transcription of a piece up to a position; `in_pause` says that it ends in silence."""

    piece: Piece
    end: int
    in_pause: bool
    task: "asyncio.Task[tuple[Segment, str | None]]"

    def covers(self) -> bool:
        """Whether it has all of the speech of a piece that has ended."""
        return self.piece.end is not None and _covers(self.piece, self.end)


class LiveSession:
    """Takes audio by `append`, `commit` and `clear`, and passes events to `send` while `run` runs.

    `options` say what passes ask for. `describe_error` turns an exception of a pass into the error of an event. Errors
    of `commit` and `append` concern the call alone.
    """

    def __init__(
        self,
        transcribe: Transcribe,
        send: Callable[[Event], None],
        scorer: Scorer,
        *,
        options: TranscriptionOptions,
        describe_error: Callable[[Exception], dict[str, Any]],
        observer: Observer | None = None,
        key: str = "",
    ) -> None:
        self.options = options
        self.settings = SessionSettings()
        self._transcribe, self._send, self._scorer = transcribe, send, scorer
        self._describe_error, self._observer, self._key = describe_error, observer or Observer(), key
        self._reader = AudioReader(self.settings.input.format)
        self._detector = TurnDetector(ServerVad().threshold)
        self._buffer = SampleBuffer()
        self._unscored = np.zeros(0, np.float32)
        self._scores: list[float] = []  # of the piece that is spoken
        self._utterance: Utterance | None = None  # that is spoken
        self._piece: Piece | None = None  # that is spoken
        self._pieces: deque[Piece] = deque()  # to transcribe, in order
        self._committed_to = self._piece_end = 0
        self._previous_id: str | None = None
        self._running: _Pass | None = None
        self._pass_s = 0.0
        self._changed = asyncio.Event()  # there may be something to transcribe
        self._caught_up = asyncio.Event()  # something was transcribed

    def update(self, settings: SessionSettings, options: TranscriptionOptions) -> None:
        """Use other settings from the next sample on."""
        if settings.input.format != self.settings.input.format:
            self._reader = AudioReader(settings.input.format)
        self.settings, self.options = settings, options
        self._detector.threshold = TurnDetector(self._turns.threshold).threshold

    async def append(self, data: bytes) -> None:
        """Take audio in the session's format; returns later where too much speech waits."""
        await self._add(*await asyncio.to_thread(self._hear, data))

    async def commit(self) -> None:
        """End the utterance, whether somebody speaks or not. Raises EmptyBuffer."""
        await self._add(*await asyncio.to_thread(self._hear_rest))
        if self._buffer.end == self._committed_to:
            raise EmptyBuffer
        if self._piece is not None:
            self._end_speech(self._piece, self._buffer.end)
        self._utterance = self._utterance or Utterance(new_id("item"), self._committed_to)
        self._commit_utterance(self._buffer.end)

    def clear(self) -> None:
        """Forget the audio that is not committed, and what was said in it."""
        dropped = self._utterance
        self._pieces = deque(piece for piece in self._pieces if piece.utterance is not dropped)
        if self._running and self._running.piece.utterance is dropped:
            self._running.task.cancel()
        self._utterance = self._piece = None
        self._committed_to = self._piece_end = self._buffer.end
        self._detector.reset()
        self._send(make_event("input_audio_buffer.cleared"))

    async def run(self) -> None:
        """Transcribe until it is cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while step := self._next_pass():
                self._running = step
                try:
                    await self._finish_pass(step)
                finally:
                    step.task.cancel()
                    self._running = None
                self._caught_up.set()

    async def finish(self) -> None:
        """Wait until all committed utterances have their last text."""
        while any(piece.end is not None for piece in self._pieces):
            self._caught_up.clear()
            await self._caught_up.wait()

    @property
    def _turns(self) -> ServerVad:
        return self.settings.input.turn_detection or ServerVad()

    def _hear(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Decode audio and score it, in a thread; returns the samples and the scores of new whole frames."""
        return self._score(self._reader.read(data))

    def _hear_rest(self) -> tuple[np.ndarray, np.ndarray]:
        rest, self._reader = self._reader.flush(), AudioReader(self.settings.input.format)
        return self._score(rest)

    def _score(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        waiting = np.concatenate([self._unscored, samples])
        whole = len(waiting) - len(waiting) % FRAME
        self._unscored = waiting[whole:]
        return samples, self._scorer(waiting[:whole]) if whole else np.zeros(0, np.float32)

    async def _add(self, samples: np.ndarray, scores: np.ndarray) -> None:
        self._buffer.add(samples)
        for score in scores.tolist():
            self._add_frame(score)
        kept = self._buffer.end - round((self._turns.prefix_padding_ms / 1000 + KEPT_S) * SAMPLE_RATE)
        self._buffer.drop_before(min(kept, self._piece.start) if self._piece else kept)
        self._changed.set()
        while self._waiting_s() > MAX_AHEAD_S:
            self._caught_up.clear()
            await self._caught_up.wait()

    def _waiting_s(self) -> float:
        return sum(piece.end - piece.start for piece in self._pieces if piece.end is not None) / SAMPLE_RATE

    def _add_frame(self, score: float) -> None:
        """Take the score of the next frame: speech begins, goes on, is cut or ends."""
        detector = self._detector
        if detector.add(score):
            self._begin_speech()
        if self._piece is None:
            return
        self._scores.append(score)
        if detector.silence >= self._turns.silence_duration_ms / 1000 * SAMPLE_RATE:
            self._end_speech(self._piece, detector.position)
            if self.settings.input.turn_detection and self._utterance:
                self._send(speech_stopped(self._utterance.id, _milliseconds(detector.position)))
                self._commit_utterance(detector.position)
        elif detector.position - self._piece.start >= LONGEST_PIECE_S * SAMPLE_RATE:
            self._cut_piece(self._piece)

    def _begin_speech(self) -> None:
        padding = round(self._turns.prefix_padding_ms / 1000 * SAMPLE_RATE)
        begun = self._detector.speech_start or 0
        start = max(begun - padding, self._piece_end, self._buffer.start)
        detects_turns = self.settings.input.turn_detection is not None
        if self._utterance is None:
            self._utterance = Utterance(new_id("item"), start if detects_turns else self._committed_to)
        if detects_turns:
            self._send(speech_started(self._utterance.id, _milliseconds(start)))
        self._begin_piece(self._utterance, start)

    def _begin_piece(self, utterance: Utterance, start: int) -> None:
        self._piece = Piece(utterance, start)
        utterance.pieces.append(self._piece)
        self._pieces.append(self._piece)
        self._scores = []

    def _cut_piece(self, piece: Piece) -> None:
        """End a piece that is as long as a pass takes, where it scores lowest, and go on with the next one."""
        half = len(self._scores) // 2
        width = round(QUIET_S * SAMPLE_RATE / FRAME)
        first = len(self._scores) - half
        later = np.array(self._scores[first:], np.float64)
        kept = quietest(later, width)
        cut = self._detector.position - (len(later) - kept) * FRAME
        rest = self._scores[first + kept :]
        self._end_piece(piece, cut, cut)
        self._begin_piece(piece.utterance, cut)
        self._scores = rest

    def _end_speech(self, piece: Piece, end: int) -> None:
        """End a piece shortly after its last sound, at most at `end`."""
        speech_end = self._detector.speech_end
        self._end_piece(piece, min(speech_end + round(TAIL_S * SAMPLE_RATE), end), speech_end)
        self._detector.reset()

    def _end_piece(self, piece: Piece, end: int, speech_end: int) -> None:
        piece.end, piece.speech_end = end, speech_end
        piece.samples = self._buffer.copy(piece.start, end)
        self._piece, self._piece_end = None, end
        if self._running and self._running.piece is piece and not self._running.covers():
            self._running.task.cancel()
        self._changed.set()

    def _commit_utterance(self, end: int) -> None:
        utterance = self._utterance
        if utterance is None:
            return
        utterance.end, utterance.committed_at = end, time.monotonic()
        self._send(committed(utterance.id, self._previous_id))
        self._previous_id, self._utterance, self._committed_to = utterance.id, None, end
        self._end_if_done(utterance)

    def _end_if_done(self, utterance: Utterance) -> None:
        if utterance.end is None or not utterance.is_done:
            return
        seconds = (utterance.end - utterance.start) / SAMPLE_RATE
        self._send(utterance.last_event(seconds))
        if utterance.error is None:
            self._observer.on_live_text(time.monotonic() - utterance.committed_at)
            self._observer.on_transcript(seconds, max(utterance.work_s, 1e-3), key=self._key)

    def _next_pass(self) -> _Pass | None:
        """Start the next pass; None where there is nothing to transcribe."""
        while self._pieces:
            piece = self._pieces[0]
            if piece.end is None:
                return self._next_early_pass(piece)
            if piece.utterance.error is None and not (piece.pass_text is not None and _covers(piece, piece.pass_end)):
                return self._start_pass(piece, piece.end, in_pause=True)
            self._end_text(piece, piece.pass_text or "")
        return None

    def _next_early_pass(self, piece: Piece) -> _Pass | None:
        """Start a pass over a piece that is spoken, if there is enough that is new."""
        if piece.utterance.error is not None:
            return None
        end, speech_end = self._buffer.end, self._detector.speech_end
        early_pause = EARLY_PAUSE_S * SAMPLE_RATE
        if self._detector.silence >= early_pause:
            is_new = piece.pass_end < speech_end + early_pause
            return self._start_pass(piece, end, in_pause=True) if is_new else None
        interval = max(INTERVAL_S, self._pass_s) * SAMPLE_RATE
        is_due = end - max(piece.pass_end, piece.start) >= interval
        return self._start_pass(piece, end, in_pause=False) if is_due else None

    def _start_pass(self, piece: Piece, end: int, *, in_pause: bool) -> _Pass:
        samples = self._buffer.copy(piece.start, end) if piece.samples is None else piece.samples
        chunk = Chunk(piece.start / SAMPLE_RATE, AudioClip(samples), has_speech=True)
        language = piece.utterance.language or self.options.language
        options = replace(self.options, language=language, prefix=piece.agreement.text)
        call = self._transcribe(chunk, options, is_last=in_pause)
        return _Pass(piece, end, in_pause, asyncio.ensure_future(call))

    async def _finish_pass(self, step: _Pass) -> None:
        """Wait for a pass, and send the words that are agreed on then."""
        piece, start = step.piece, time.monotonic()
        await asyncio.wait([step.task])
        self._pass_s = time.monotonic() - start
        piece.utterance.work_s += self._pass_s
        if step.task.cancelled():  # another one is better
            return
        piece.pass_end = step.end
        if error := step.task.exception():
            self._fail(step, error)
            return
        segment, language = step.task.result()
        piece.pass_text = segment.text
        if step.covers():
            self._end_text(piece, segment.text)
        elif piece in self._pieces:  # it was not cleared
            self._send_text(piece, piece.agreement.add(segment.text, is_spoken=not step.in_pause))
            if piece.has_text:
                piece.utterance.language = language

    def _fail(self, step: _Pass, error: BaseException) -> None:
        """End an utterance whose last pass failed; where an earlier one did, the next may succeed."""
        if not isinstance(error, Exception):
            raise error
        LOG.warning("a pass over live speech failed: %s", type(error).__name__)
        step.piece.pass_text = None
        if step.covers():
            step.piece.utterance.error = self._describe_error(error)
            self._end_text(step.piece, "")

    def _end_text(self, piece: Piece, text: str) -> None:
        """Send the rest of a piece's text, and its utterance's last event if it is complete."""
        if piece in self._pieces:
            self._pieces.remove(piece)
            piece.is_done = True
            if piece.utterance.error is None:
                self._send_text(piece, piece.agreement.finish(text))
            self._end_if_done(piece.utterance)
            self._caught_up.set()

    def _send_text(self, piece: Piece, new: str) -> None:
        if event := piece.utterance.add_text(piece, new):
            self._send(event)


def _covers(piece: Piece, end: int) -> bool:
    """Whether a pass that read to `end` has all of the speech of a piece that has ended."""
    return piece.end is not None and end >= min(piece.end, piece.speech_end + EARLY_PAUSE_S * SAMPLE_RATE)


def _milliseconds(samples: int) -> int:
    return round(1000 * samples / SAMPLE_RATE)
