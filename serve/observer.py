"""Define the callbacks by which a Service and its API report requests; serve/metrics.py turns them into metrics."""


class Observer:
    """Receives events of requests and ignores them; subclasses override what they need."""

    def on_response(self, endpoint: str, status: int, seconds: float) -> None:
        """A request to an endpoint ended, with a complete response or because its client left (status 499)."""

    def on_first_text(self, seconds: float) -> None:
        """A streamed transcription produced its first text, so many seconds after its request."""

    def on_transcript(self, audio_s: float, seconds: float) -> None:
        """An upload of `audio_s` seconds was transcribed completely within `seconds`."""
