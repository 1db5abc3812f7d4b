"""What Prometheus sees of the service, on the metrics port of every Ray node.

The names begin with ray_graft_ there, counters end with _total, and Ray Serve adds the labels deployment, replica and application.
cluster/dashboard.json draws them.
"""

import asyncio
from collections.abc import Callable

from ray.serve.metrics import Counter, Gauge, Histogram

from graft.inference.engines.protocol import EngineCounts

from .observer import Observer
from .service import Service

SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
SPEEDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
NOTHING = EngineCounts(running=0, waiting=0, prefills=0, steps=0, tokens=0, busy_s=0.0)


class RequestMetrics(Observer):
    """See Observer. Of an ingress replica."""

    def __init__(self) -> None:
        told = "Requests answered, by endpoint and status; 499: the client left before."
        self._answered = Counter("graft_requests", told, ("endpoint", "status"))  # type: ignore[arg-type]  # Ray says that there is one tag
        self._latency = Histogram(
            "graft_request_seconds", "From a request to the end of its answer.", list(SECONDS), ("endpoint",)
        )
        self._first_text = Histogram(
            "graft_first_text_seconds", "From an upload to the first text of its stream.", list(SECONDS)
        )
        self._speed = Histogram(
            "graft_request_rtfx", "Seconds of an upload per second that its transcript took.", list(SPEEDS)
        )
        self._audio = Counter("graft_audio_seconds", "Seconds of uploads transcribed.")
        self._requests = Gauge("graft_requests_in_hand", "Uploads that an ingress has in hand.")
        self._queue = Gauge("graft_queue_seconds", "Seconds of speech that an ingress has in hand.")

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """See Observer."""
        self._answered.inc(tags={"endpoint": endpoint, "status": str(status)})
        self._latency.observe(seconds, tags={"endpoint": endpoint})

    def began(self, seconds: float) -> None:
        """See Observer."""
        self._first_text.observe(seconds)

    def transcribed(self, audio_s: float, seconds: float) -> None:
        """See Observer."""
        _add(self._audio, audio_s)
        self._speed.observe(audio_s / seconds)

    def stand(self, service: Service) -> None:
        """Take note of how a service stands."""
        self._requests.set(service.requests)
        self._queue.set(service.queued_s)


class EngineMetrics:
    """Of an engine replica."""

    def __init__(self) -> None:
        self._running = Gauge("graft_batch_size", "Chunks that decode together.")
        self._waiting = Gauge("graft_waiting_chunks", "Chunks that wait to be decoded.")
        self._prefills = Counter("graft_prefills", "Times that clips were encoded and their prompts read.")
        self._steps = Counter("graft_steps", "Steps that gave each chunk of a batch a token.")
        self._tokens = Counter("graft_tokens", "Tokens of answers.")
        self._busy = Counter("graft_busy_seconds", "Seconds that prefills and steps took.")
        self._heard = Counter("graft_heard_seconds", "Seconds of chunks heard.")
        self._last = NOTHING

    def heard(self, audio_s: float) -> None:
        """Take note of a chunk that was heard to the end."""
        _add(self._heard, audio_s)

    def stand(self, counts: EngineCounts) -> None:
        """Take note of how an engine stands, another than before too."""
        last = self._last if counts.prefills >= self._last.prefills and counts.busy_s >= self._last.busy_s else NOTHING
        self._last = counts
        self._running.set(counts.running)
        self._waiting.set(counts.waiting)
        _add(self._prefills, counts.prefills - last.prefills)
        _add(self._steps, counts.steps - last.steps)
        _add(self._tokens, counts.tokens - last.tokens)
        _add(self._busy, counts.busy_s - last.busy_s)


async def every_second(look: Callable[[], None]) -> None:
    """Look how things stand, for as long as the event loop runs."""
    while True:
        look()
        await asyncio.sleep(1)


def _add(counter: Counter, amount: float) -> None:
    if amount > 0:  # else refused
        counter.inc(amount)
