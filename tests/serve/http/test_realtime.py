"""Test live sessions over a real WebSocket, with OpenAI's own client and without it."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import websockets
from openai import AsyncOpenAI
from websockets.asyncio.client import connect

from graft.audio.clip import SAMPLE_RATE, read_audio
from serve.http.realtime import LiveLimits
from tests.support import media, tiny_models
from tests.support.http_service import open_backend, open_decoder, serve_api

pytestmark = pytest.mark.seconds
KEY = "a-key-of-the-test"
QUICK = LiveLimits(max_silence_s=1.0, max_session_s=4.0, max_send_s=1.0)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tiny_models.save_tiny_graft(tmp_path_factory.mktemp("realtime") / "graft", trained_context=True)
    with open_backend(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(backend: Any) -> Iterator[str]:
    with open_decoder() as decoder, serve_api(decoder, backend, keys=(KEY,), max_sessions=2) as address:
        yield address


@pytest.fixture(scope="module")
def quick_url(backend: Any) -> Iterator[str]:
    with open_decoder() as decoder, serve_api(decoder, backend, max_sessions=1, live_limits=QUICK) as address:
        yield address


def speech(rate: int = 24_000) -> bytes:
    """A prompt between seconds of silence, as PCM of 16 bits."""
    import soxr

    silence = np.zeros(SAMPLE_RATE, np.float32)
    samples = np.concatenate([silence, read_audio(media.PROMPTS[10]).samples, silence])
    return (soxr.resample(samples, SAMPLE_RATE, rate) * 32767).astype("<i2").tobytes()


def appended(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()}


@contextlib.asynccontextmanager
async def session(url: str, query: str = "?intent=transcription", **settings: Any) -> AsyncIterator[Any]:
    address = f"{url.replace('http', 'ws')}/v1/realtime{query}"
    headers = {"Authorization": f"Bearer {KEY}"}
    async with connect(address, **{"additional_headers": headers, "max_size": 2**25} | settings) as socket:
        yield socket


async def receive(socket: Any, kind: str) -> dict[str, Any]:
    """Return the next event of a type; an error is an error."""
    async with asyncio.timeout(60):
        while True:
            event = json.loads(await socket.recv())
            if event["type"].endswith(kind):
                return event
            assert event["type"] != "error", event


async def say(socket: Any, *events: dict[str, Any]) -> None:
    for event in events:
        await socket.send(json.dumps(event))


def test_openais_client_gets_the_events_that_its_types_know(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    model = requests.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"]

    async def run() -> list[Any]:
        client = AsyncOpenAI(api_key=KEY, base_url=f"{url}/v1")
        events = []
        query = {"intent": "transcription"}
        async with asyncio.timeout(60), client.realtime.connect(model=model, extra_query=query) as connection:
            await connection.session.update(
                session={
                    "type": "transcription",
                    "audio": {
                        "input": {
                            "format": {"type": "audio/pcm", "rate": 24_000},
                            "transcription": {"model": model, "language": "en"},
                            "turn_detection": {"type": "server_vad", "silence_duration_ms": 300},
                        }
                    },
                }
            )
            data = speech()
            for start in range(0, len(data), 9_600):
                await connection.input_audio_buffer.append(audio=base64.b64encode(data[start : start + 9_600]).decode())
            async for event in connection:
                events.append(event)
                if event.type == "conversation.item.input_audio_transcription.completed":
                    break
        await client.close()
        return events

    events = asyncio.run(run())
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds[:2] == ["created", "updated"]
    assert [kind for kind in kinds[2:] if kind != "delta"] == [
        "speech_started",
        "speech_stopped",
        "committed",
        "completed",
    ]
    last = events[-1]
    assert last.usage.type == "duration"
    assert last.usage.seconds > 0.5
    assert "".join(event.delta for event in events if event.type.endswith(".delta")) == last.transcript
    assert not any(type(event).__name__ == "BaseModel" for event in events)  # each has a type of the client's own


def test_a_session_is_described_and_changed(url: str) -> None:
    async def run() -> None:
        async with session(url) as socket:
            created = await receive(socket, "session.created")
            described = created["session"]
            assert described["id"].startswith("sess_")
            assert described["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24_000}
            assert described["audio"]["input"]["turn_detection"]["type"] == "server_vad"
            changes = {"audio": {"input": {"format": {"type": "audio/pcmu"}, "turn_detection": None}}}
            await say(socket, {"type": "session.update", "session": {"type": "transcription"} | changes})
            updated = (await receive(socket, "session.updated"))["session"]["audio"]["input"]
            assert (updated["format"]["type"], updated["turn_detection"]) == ("audio/pcmu", None)
            beta = {"input_audio_format": "pcm16", "input_audio_transcription": {"language": "en"}}
            await say(socket, {"type": "transcription_session.update", "session": beta})
            updated = (await receive(socket, "session.updated"))["session"]["audio"]["input"]
            assert updated["format"] == {"type": "audio/pcm", "rate": 24_000}
            assert updated["transcription"]["language"] == "en"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("event", "code", "words"),
    [
        ("nonsense", "invalid_message", "not JSON"),
        ("[1]", "invalid_message", "not a JSON object"),
        ({"type": "response.create"}, "unsupported_value", "'response.create' are not supported"),
        ({"type": "input_audio_buffer.append"}, "missing_required_parameter", "audio is missing"),
        ({"type": "input_audio_buffer.append", "audio": "%%"}, "invalid_audio", "not base64"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty", "no audio to commit"),
        ({"type": "session.update"}, "missing_required_parameter", "session is missing"),
        (
            {"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/mp3"}}}}},
            "unsupported_value",
            "session.audio.input.format",
        ),
        (
            {"type": "session.update", "session": {"audio": {"input": {"transcription": {"model": "whisper-9"}}}}},
            "model_not_found",
            "does not exist",
        ),
    ],
)
def test_what_is_wrong_with_a_message_is_said_and_the_session_goes_on(
    url: str, event: Any, code: str, words: str
) -> None:
    async def run() -> None:
        async with session(url) as socket:
            await receive(socket, "session.created")
            await socket.send(event if isinstance(event, str) else json.dumps(event | {"event_id": "mine"}))
            error = (await receive_error(socket))["error"]
            assert (error["code"], error["event_id"]) == (code, None if isinstance(event, str) else "mine")
            assert words in error["message"]
            await say(socket, {"type": "input_audio_buffer.clear"})
            await receive(socket, "cleared")

    asyncio.run(run())


async def receive_error(socket: Any) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while (event := json.loads(await socket.recv()))["type"] != "error":
            pass
        return event


async def closed(socket: Any) -> tuple[dict[str, Any] | None, int]:
    """Read until the connection is closed; returns the last error and the code."""
    error = None
    async with asyncio.timeout(60):
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                event = json.loads(await socket.recv())
                error = event["error"] if event["type"] == "error" else error
    return error, socket.close_code


@pytest.mark.parametrize(
    ("query", "key", "origin", "code", "words"),
    [
        ("?intent=transcription", "wrong", None, 3000, "API key"),
        ("?intent=conversation", KEY, None, 1008, "live sessions of transcription alone"),
        ("?model=whisper-9", KEY, None, 1008, "does not exist"),
        ("", KEY, "https://elsewhere.example", 3000, "name them in cors_origins"),
    ],
)
def test_who_may_not_have_a_session_is_told_why(
    url: str, query: str, key: str, origin: str | None, code: int, words: str
) -> None:
    async def run() -> tuple[dict[str, Any] | None, int]:
        headers = {"Authorization": f"Bearer {key}"} | ({"Origin": origin} if origin else {})
        async with session(url, query, additional_headers=headers) as socket:
            return await closed(socket)

    error, found = asyncio.run(run())
    assert error is not None
    assert words in error["message"]
    assert found == code


def test_a_web_page_may_send_its_key_as_a_subprotocol(url: str) -> None:
    async def run() -> None:
        names = ["realtime", f"openai-insecure-api-key.{KEY}"]
        async with session(url, "", additional_headers={}, subprotocols=names) as socket:
            await receive(socket, "session.created")
            assert socket.subprotocol == "realtime"

    asyncio.run(run())


def test_sessions_over_the_limit_are_refused_and_a_client_that_left_frees_its_place(url: str) -> None:
    async def run() -> None:
        async with session(url) as first, session(url) as second:
            for socket in (first, second):
                await receive(socket, "session.created")
            async with session(url) as third:
                error, code = await closed(third)
                assert error is not None
                assert (error["code"], code) == ("rate_limit_exceeded", 1013)
                assert "all 2 live sessions are taken" in error["message"]
            await say(first, appended(speech()[: 24_000 * 3]))
            first.transport.abort()  # in the middle of an utterance, without a word
            async with asyncio.timeout(30):
                while True:
                    async with session(url) as another:
                        if json.loads(await another.recv())["type"] == "session.created":
                            break
                    await asyncio.sleep(0.1)

    asyncio.run(run())


def test_silent_clients_and_old_sessions_end_with_a_reason(quick_url: str) -> None:
    async def silent() -> tuple[dict[str, Any] | None, int]:
        async with session(quick_url) as socket:
            return await closed(socket)

    async def old() -> tuple[dict[str, Any] | None, int]:
        async with session(quick_url) as socket:
            saying = asyncio.create_task(_keep_sending(socket))
            ended = await closed(socket)
            saying.cancel()
            return ended

    error, code = asyncio.run(silent())
    assert error is not None
    assert (error["code"], code) == ("session_idle", 1000)
    error, code = asyncio.run(old())
    assert error is not None
    assert (error["code"], code) == ("session_expired", 1000)


async def _keep_sending(socket: Any) -> None:
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            await say(socket, appended(b"\0\0" * 2_400))
            await asyncio.sleep(0.1)


def test_a_message_that_is_too_large_ends_the_session(url: str) -> None:
    async def run() -> tuple[dict[str, Any] | None, int]:
        async with session(url) as socket:
            await receive(socket, "session.created")
            with contextlib.suppress(websockets.ConnectionClosed):
                await socket.send(json.dumps({"type": "x", "audio": "A" * (15 * 2**20)}))
            return await closed(socket)

    error, code = asyncio.run(run())
    assert code == 1009
    assert error is None or error["code"] == "message_too_large"
