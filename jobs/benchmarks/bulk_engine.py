"""An engine that answers at a device's rate without a model: prefills and steps only take their time, and answers have the same words.

All else is as in the engines of graft: requests wait, rows join and leave between steps, and tokens reach whoever waits for them.
"""

import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import WhisperFeatureExtractor

from graft.checkpoints.loading import open_processor
from graft.inference.engines.protocol import EngineCounts, EngineRequest, Token
from graft.inference.engines.scheduler import ENCODER_ROWS, Row, received, send, underway
from graft.inference.transcriber import Transcriber

from .speech import WORDS

MEL_COUNT = 128
"""As a 7B graft's encoder hears."""
TOKENS_PER_S = 3.0
"""Of an answer to a second of speech, in lower case."""
MOST_ROWS = 256
LOGPROB = -0.1


@dataclass(frozen=True)
class Device:
    """The seconds that a device takes: to hear a second of audio and read its prompt, and for a step: for all rows, and for each.

    These are of one H200 at half its peak with a 7B graft at 25 Hz. A clip of 10 s takes 0.68 TFLOP to encode and 3.67 TFLOP to read, at
    790 TFLOP/s; a step reads 14.1 GB of weights, and 17 MB of the cache for each row, at 4.8 TB/s.
    """

    prefill_s: float = 2 * 0.435 / 790
    step_s: float = 2 * 14.1e9 / 4.8e12
    row_step_s: float = 2 * 17e6 / 4.8e12

    def slowed(self, times: float) -> "Device":
        """A device that takes so many times as long."""
        return Device(self.prefill_s * times, self.step_s * times, self.row_step_s * times)

    def rate(self, rows: int, clip_s: float = 10.0) -> float:
        """Seconds of audio a second while it has so many clips of a length to decode at a time."""
        steps_s = TOKENS_PER_S * clip_s * (self.step_s + rows * self.row_step_s)
        return rows * clip_s / (rows * clip_s * self.prefill_s + steps_s)


class StandInEngine:
    """An Engine whose device is a clock. The device keeps to its time while this process is late to look at it, as long as it has work."""

    def __init__(self, device: Device, answer_ids: Sequence[int]) -> None:
        self._device = device
        self._answer_ids = list(answer_ids)
        self._running: list[Row] = []
        self._waiting: list[Row] = []
        self._prefills = self._steps = self._tokens = 0
        self._busy_s = 0.0
        self._is_closed = False
        self._changed = threading.Condition()  # guards what waits, and whether it is closed
        self._thread = threading.Thread(target=self._work, name="graft-stand-in", daemon=True)
        self._thread.start()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """See Engine."""
        row = Row(request)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(row)
            self._changed.notify()
        try:
            while token := await received(row):
                yield token
        finally:
            row.is_over = True

    def abort(self, request_id: str) -> None:
        """See Engine."""
        send([(row, None) for row in [*self._waiting, *self._running] if row.request.request_id == request_id])

    def counts(self) -> EngineCounts:
        """See Engine."""
        return EngineCounts(
            underway(self._running), underway(self._waiting), self._prefills, self._steps, self._tokens, self._busy_s
        )

    def close(self) -> None:
        """See Engine."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        free_at = time.monotonic()
        while not self._is_closed:
            if not self._running and self._has_waited():
                free_at = time.monotonic()
            turn_s = self._turn_s()
            free_at += turn_s
            time.sleep(max(0.0, free_at - time.monotonic()))
            self._busy_s += turn_s
            self._hand_out()
        send([(row, RuntimeError("the engine is closed")) for row in [*self._waiting, *self._running]])

    def _has_waited(self) -> bool:
        """Wait for something to do; whether there was nothing."""
        with self._changed:
            is_idle = not self._waiting
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
        return is_idle

    def _turn_s(self) -> float:
        """Let rows join, and tell how long their prefill and a step of all take."""
        with self._changed:
            room = min(ENCODER_ROWS, MOST_ROWS - len(self._running))
            joining, self._waiting = self._waiting[:room], self._waiting[room:]
        self._running = [row for row in [*self._running, *joining] if not row.is_over]
        self._prefills += bool(joining)
        self._steps += 1
        audio_s = sum(_audio_s(row) for row in joining)
        return audio_s * self._device.prefill_s + self._device.step_s + len(self._running) * self._device.row_step_s

    def _hand_out(self) -> None:
        """Send each row its next token, and end those that have all."""
        items: list[tuple[Row, Token | None]] = []
        for row in self._running:
            row.tokens.append(self._answer_ids[len(row.tokens) % len(self._answer_ids)])
            items.append((row, Token(row.tokens[-1], LOGPROB)))
            if len(row.tokens) >= min(TOKENS_PER_S * _audio_s(row), row.request.max_new_tokens):
                items.append((row, None))
        self._tokens += len(self._running)
        send(items)
        self._running = [row for row in self._running if not row.is_over]


def open_stand_in(graft: str, device: Device) -> Transcriber:
    """A Transcriber with a graft's processor, as many mels as a 7B graft's, and an engine that only takes a device's time."""
    import torch

    torch.set_num_threads(1)
    processor = open_processor(graft)
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=MEL_COUNT)
    words = np.random.default_rng(0).choice(WORDS, size=round(30 * TOKENS_PER_S))
    return Transcriber(StandInEngine(device, processor.target_ids(" ".join(words))), processor, "stand-in")


def _audio_s(row: Row) -> float:
    return row.request.features.frame_count / 100
