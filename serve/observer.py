"""Who watches requests go by: by default nobody; on Ray Serve metrics.py."""


class Observer:
    """What is told of requests; by default it does nothing with it."""

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """A request to an endpoint of the API was answered to the end, or its client left."""

    def began(self, seconds: float) -> None:
        """A stream's first text came, so long after its request."""

    def transcribed(self, audio_s: float, seconds: float) -> None:
        """An upload of so many seconds was transcribed to the end, so long after it had come."""
