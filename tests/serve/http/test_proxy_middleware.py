"""The middleware in Ray Serve's proxies: responses that never began or broke off, and Ray Serve's own errors."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from serve.http.proxy_middleware import ProxyErrorMiddleware


def get(*messages: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    """Return the response of an application that sends these messages and then ends."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(ProxyErrorMiddleware(application))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/", headers=headers)

    return asyncio.run(run())


def start(content_type: str, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type.encode())]}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_a_response_that_never_began_is_a_503_with_the_requests_id():
    response = get(headers={"X-Request-Id": "mine"})
    assert (response.status_code, response.headers["Retry-After"], response.headers["X-Request-Id"]) == (
        503,
        "1",
        "mine",
    )
    assert response.json()["error"]["type"] == "server_error"
    assert "X-Request-Id" not in get().headers


@pytest.mark.parametrize(
    ("status", "kind", "retry_after"),
    [
        (404, "invalid_request_error", None),
        (408, "server_error", None),
        (429, "rate_limit_error", "1"),
        (500, "server_error", None),
        (503, "server_error", "1"),
    ],
)
def test_ray_serves_errors_in_plain_text_get_openais_shape(status, kind, retry_after):
    response = get(start("text/plain; charset=utf-8", status), body(b"Request 7 ", more=True), body(b"timed out"))
    assert (response.status_code, response.headers.get("Retry-After")) == (status, retry_after)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["type"] == kind
    assert "Request 7" not in response.text


def test_responses_of_the_api_pass_unchanged():
    assert get(start("text/plain"), body(b"a text\n")).text == "a text\n"
    refused = get(start("application/json", 429), body(b'{"error": 1}'))
    assert (refused.status_code, refused.json()) == (429, {"error": 1})


def test_a_stream_that_breaks_off_ends_with_an_error_event():
    events = [start("text/event-stream; charset=utf-8"), body(b"data: {}\n\n", more=True)]
    first, last = get(*events).text.strip().split("\n\n")
    assert first == "data: {}"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert get(*events, body(b"")).text == "data: {}\n\n"
    assert get(start("application/json"), body(b"{}")).text == "{}"


HOSTILE_IDS = ["\u2028INFO forged", "x -- POST / 200 1ms", "a" * 101, "é", "\udcff", "a\tb", ""]


@pytest.mark.parametrize("given", HOSTILE_IDS, ids=ascii)
def test_a_request_id_that_may_not_be_logged_does_not_reach_ray_serve(given):
    assert "x-request-id" not in forwarded(("X-Request-Id", given))
    assert forwarded(("X-Request-Id", given), ("X-Request-Id", "mine"))["x-request-id"] == "mine"


def test_headers_that_steer_ray_serve_are_removed_and_others_pass():
    steering = ["serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id", "X-Session-Id", "x_session_id"]
    steering += ["X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled"]
    passed = {"x-request-id": "mine", "traceparent": "00-1-1-01", "authorization": "Bearer \udcff"}
    got = forwarded(*((name, "0") for name in steering), ("traceparent", "\udcff"), *passed.items())
    assert passed.items() <= got.items()
    assert not {name.lower() for name in steering} & set(got)
    assert forwarded(("X-Request-Id", "one"), ("X-Request-Id", "two"))["x-request-id"] == "one"


def forwarded(*headers: tuple[str, str]) -> dict[str, str]:
    """Return the headers with which a request reaches the application behind the middleware; the last ones count."""
    seen: dict[str, str] = {}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.update((name.decode(), value.decode(errors="surrogateescape")) for name, value in scope["headers"])

    async def run() -> None:
        transport = httpx.ASGITransport(ProxyErrorMiddleware(application))
        raw = [(name.encode(), value.encode(errors="surrogateescape")) for name, value in headers]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get("/", headers=raw)

    asyncio.run(run())
    return seen
