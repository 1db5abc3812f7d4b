"""Export the service's metrics for Prometheus, on the metrics port of every Ray node.

Ray prefixes the names with `ray_`, appends `_total` to counters, and Ray Serve adds the labels deployment, replica and
application. cluster/dashboard.json is a Grafana dashboard of them.
"""

import asyncio
from collections.abc import Callable

from ray.serve.metrics import Counter, Gauge, Histogram

from graft.inference.engines.protocol import EngineCounts

from .logs import Observer
from .service import NO_COUNTS, ReplicaModel, Service

SECONDS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0]
REAL_TIME_FACTORS = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]


class RequestMetrics(Observer):
    """Metrics of an ingress replica."""

    def __init__(self) -> None:
        self._responses = Counter(
            "graft_requests",
            "Requests answered, by endpoint and status; 499 means that the client left before the response began.",
            ("endpoint", "status", "key"),  # type: ignore[arg-type]  # Ray annotates a tuple of one tag
        )
        self._latency = Histogram(
            "graft_request_seconds", "Seconds from a request to the end of its response.", SECONDS, ("endpoint",)
        )
        self._first_text = Histogram(
            "graft_first_text_seconds", "Seconds from an upload to the first text of its stream.", SECONDS
        )
        self._real_time_factor = Histogram(
            "graft_request_rtfx",
            "Seconds of audio in an upload per second that its transcription took.",
            REAL_TIME_FACTORS,
        )
        self._audio = Counter("graft_audio_seconds", "Seconds of audio in transcribed uploads.", ("key",))
        self._live_text = Histogram(
            "graft_live_text_seconds",
            "Seconds from the end of an utterance of a live session to its last text.",
            SECONDS,
        )
        self._requests = Gauge("graft_requests_in_hand", "Uploads that an ingress is working on.")
        self._queue = Gauge("graft_queue_seconds", "Seconds of speech in the uploads that an ingress is working on.")

    def on_response(self, endpoint: str, status: int, seconds: float, *, key: str) -> None:
        """See Observer."""
        self._responses.inc(tags={"endpoint": endpoint, "status": str(status), "key": key})
        self._latency.observe(seconds, tags={"endpoint": endpoint})

    def on_first_text(self, seconds: float) -> None:
        """See Observer."""
        self._first_text.observe(seconds)

    def on_transcript(self, audio_s: float, seconds: float, *, key: str) -> None:
        """See Observer."""
        self._audio.inc(audio_s, tags={"key": key})
        self._real_time_factor.observe(audio_s / seconds)

    def on_live_text(self, seconds: float) -> None:
        """See Observer."""
        self._live_text.observe(seconds)

    def sample(self, service: Service) -> None:
        """Record what a service is working on now."""
        self._requests.set(service.request_count)
        self._queue.set(service.queued_s)


class EngineMetrics:
    """Metrics of an engine replica."""

    def __init__(self) -> None:
        self._running = Gauge("graft_batch_size", "Chunks that are decoded together.")
        self._waiting = Gauge("graft_waiting_chunks", "Chunks that wait to be decoded.")
        self._prefills = Counter("graft_prefills", "Batches of clips whose audio and prompts were encoded.")
        self._steps = Counter("graft_steps", "Decoding steps, each of which adds one token to each chunk of a batch.")
        self._tokens = Counter("graft_tokens", "Tokens generated.")
        self._busy = Counter("graft_busy_seconds", "Seconds spent in prefills and decoding steps.")
        self._transcribed = Counter("graft_heard_seconds", "Seconds of audio in transcribed chunks.")
        self._model = Gauge(
            "graft_model_info",
            "1 for the model that a replica serves, by its name and digest, and 0 for those before it.",
            ("name", "digest"),  # type: ignore[arg-type]  # as above
        )
        self._failed_change = Gauge(
            "graft_model_change_failed",
            "1 while a replica serves another model than the configuration names, because that cannot be opened.",
        )
        self._last = NO_COUNTS
        self._last_model: dict[str, str] | None = None

    def on_chunk(self, audio_s: float) -> None:
        """Record a chunk that was transcribed completely."""
        self._transcribed.inc(audio_s)

    def sample_model(self, model: ReplicaModel) -> None:
        """Record which model a replica serves, and whether a change of it failed."""
        labels = {"name": model.model, "digest": model.digest}
        if self._last_model not in (None, labels):
            self._model.set(0, tags=self._last_model)
        self._last_model = labels
        self._model.set(1, tags=labels)
        self._failed_change.set(model.failure is not None)

    def sample(self, counts: EngineCounts) -> None:
        """Record an engine's counts, which start at zero again when another model is loaded."""
        is_same_engine = counts.prefills >= self._last.prefills and counts.busy_s >= self._last.busy_s
        last = self._last if is_same_engine else NO_COUNTS
        self._last = counts
        self._running.set(counts.running)
        self._waiting.set(counts.waiting)
        for counter, total, before in (
            (self._prefills, counts.prefills, last.prefills),
            (self._steps, counts.steps, last.steps),
            (self._tokens, counts.tokens, last.tokens),
            (self._busy, counts.busy_s, last.busy_s),
        ):
            if total > before:  # Ray refuses an increase by 0
                counter.inc(total - before)


async def call_every_second(function: Callable[[], None]) -> None:
    """Call a function every second for as long as the event loop runs."""
    while True:
        function()
        await asyncio.sleep(1)
