"""Say what the service reports: requests to an Observer, and records that Ray Serve logs (one JSON object a line)."""

import logging
import re

LOG = logging.getLogger("graft.serve")
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}")
"""Form of a client's request id that is taken over: it can neither break nor forge a line of a log."""


class Observer:
    """Receives events of requests and ignores them; serve/metrics.py turns them into metrics."""

    def on_response(self, endpoint: str, status: int, seconds: float, *, key: str) -> None:
        """A request with a key of this name ended, with a complete response or because its client left (status 499)."""

    def on_first_text(self, seconds: float) -> None:
        """A streamed transcription produced its first text, so many seconds after its request."""

    def on_transcript(self, audio_s: float, seconds: float, *, key: str) -> None:
        """An upload of `audio_s` seconds, with a key of this name, was transcribed completely within `seconds`."""

    def on_live_text(self, seconds: float) -> None:
        """An utterance of a live session had its last text, so many seconds after its end."""


def log_through_ray_serve() -> None:
    """Send what graft logs in this process to Ray Serve's log files, with request id, replica and application."""
    logger = logging.getLogger("graft")
    logger.handlers = logging.getLogger("ray.serve").handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False
