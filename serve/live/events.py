"""Write the events of a live session in the form of OpenAI's Realtime API."""

import uuid
from typing import Any

from .settings import SessionSettings

Event = dict[str, Any]
_TRANSCRIPTION = "conversation.item.input_audio_transcription"


def new_id(prefix: str) -> str:
    """Return an id that no other session has, such as item_1f0c..."""
    return f"{prefix}_{uuid.uuid4().hex[:24]}"


def make_event(type: str, **fields: Any) -> Event:
    """Return an event of the server."""
    return {"type": type, "event_id": new_id("event"), **fields}


def describe_session(id: str, settings: SessionSettings, *, expires_at: int | None = None) -> Event:
    """Return the session in session.created and session.updated."""
    described = settings.model_dump()
    described["audio"]["input"]["noise_reduction"] = None
    return {
        "id": id,
        "object": "realtime.transcription_session",
        **described,
        "include": None,
        "expires_at": expires_at,
    }


def speech_started(item_id: str, audio_start_ms: int) -> Event:
    """Somebody began to speak, so many milliseconds after the session's first audio; padding is included."""
    return make_event("input_audio_buffer.speech_started", item_id=item_id, audio_start_ms=audio_start_ms)


def speech_stopped(item_id: str, audio_end_ms: int) -> Event:
    """The pause after speech was long enough; the time includes it."""
    return make_event("input_audio_buffer.speech_stopped", item_id=item_id, audio_end_ms=audio_end_ms)


def committed(item_id: str, previous_item_id: str | None) -> Event:
    """An utterance is complete and gets its last text."""
    return make_event("input_audio_buffer.committed", item_id=item_id, previous_item_id=previous_item_id)


def text_delta(item_id: str, delta: str) -> Event:
    """More text of an utterance, which is not taken back."""
    return make_event(f"{_TRANSCRIPTION}.delta", item_id=item_id, content_index=0, delta=delta)


def completed(item_id: str, transcript: str, seconds: float) -> Event:
    """All the text of an utterance, and the seconds of its audio."""
    usage = {"type": "duration", "seconds": round(seconds, 3)}
    return make_event(
        f"{_TRANSCRIPTION}.completed", item_id=item_id, content_index=0, transcript=transcript, usage=usage
    )


def failed(item_id: str, error: dict[str, Any]) -> Event:
    """An utterance could not be transcribed; the session goes on."""
    return make_event(f"{_TRANSCRIPTION}.failed", item_id=item_id, content_index=0, error=error)


def error_event(error: dict[str, Any], client_event_id: str | None = None) -> Event:
    """Something is wrong with what the client sent, or with the session."""
    return make_event("error", error={**error, "event_id": client_event_id})
