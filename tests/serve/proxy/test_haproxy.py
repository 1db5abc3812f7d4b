"""HAProxy before the API, as Ray Serve runs it: requests that never end, replicas that die, ids, and what is told."""

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from serve.http.errors import error_response
from serve.http.proxy_middleware import CUT_OFF, ERRORS_BY_STATUS
from serve.http.schema import ErrorResponse
from serve.service import ModelNotReady
from tests.support.haproxy import PROGRAM, RUNNING, HAProxy, answering_server, run_haproxy, write_configuration
from tests.support.http_service import run_server, serve_api
from tests.support.media import SHORTEST_FIRST
from tests.support.ray_service import speech_flac

pytestmark = pytest.mark.processes

KEY = "sk-mine"
HEAD = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
TRANSCRIPTIONS = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def haproxy(decoder: Any, backend: Any) -> Iterator[HAProxy]:
    """HAProxy before the API."""
    with (
        serve_api(decoder, backend, keys=(KEY,), max_upload_bytes=2_000_000) as server,
        run_haproxy([server], health="/healthz", timeout_client_s=2) as running,
    ):
        yield running


def client(haproxy: HAProxy, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{haproxy.url}/v1", api_key=KEY, max_retries=0, **options)


def ask(haproxy: HAProxy, audio: bytes, *, key: str = KEY, **form: str) -> requests.Response:
    return requests.post(
        f"{haproxy.url}{TRANSCRIPTIONS}",
        files={"file": ("a.flac", audio)},
        data={"model": "tiny-graft", **form},
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )


# Requests


def test_endless_and_slow_heads_are_refused_while_others_are_answered(haproxy: HAProxy) -> None:
    took_s: dict[str, float] = {}

    def send(name: str, status: bytes, *parts: bytes, **options: Any) -> None:
        response, took_s[name] = haproxy.send(*parts, **options)
        assert response.startswith(b"HTTP/1.1 " + status) or not response

    heads = [("half", b"408", HEAD), ("slow", b"408", HEAD + b"X: ", *[b"a"] * 80)]
    slow = [threading.Thread(target=send, args=head, kwargs={"pause_s": 0.1}) for head in heads for _ in range(20)]
    for thread in slow:
        thread.start()
    for _ in range(3):
        send("endless", b"400", HEAD + b"X: ", *[b"a" * 65_536] * 2_000)  # 131 MB
        assert took_s["endless"] < 2
        start = time.monotonic()
        assert requests.get(f"{haproxy.url}/healthz", timeout=5).status_code == 200
        assert time.monotonic() - start < 1
    for thread in slow:
        thread.join()
    assert took_s.keys() == {"endless", "half", "slow"}
    assert max(took_s.values()) < 10


def test_a_body_that_stalls_is_given_up(haproxy: HAProxy) -> None:
    head = f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000\r\n"
    response, took_s = haproxy.send(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x".encode())
    assert response.startswith(b"HTTP/1.1 400")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert took_s < 5


def test_the_api_is_asked_with_its_keys_and_limits(haproxy: HAProxy, transcriber: Any) -> None:
    audio = SHORTEST_FIRST[0].read_bytes()
    assert ask(haproxy, audio).json()["text"] == transcriber.transcribe(audio).text
    assert ask(haproxy, audio, key="sk-yours").status_code == 401
    large = speech_flac(60)
    assert 1_000_000 < len(large) < 2_000_000
    assert ask(haproxy, large, response_format="text").text == transcriber.transcribe(large).text + "\n"
    endless = bytes(30_000_000)
    for _ in range(3):  # the answer comes before the upload has ended, and must arrive nevertheless
        assert ask(haproxy, endless).json()["error"]["code"] == "upload_too_large"
        assert ask(haproxy, endless, key="sk-yours").json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("given", [["mine_1.2-3"], ["a,b"], ["a", "b"], ["\xff"], []])
def test_every_request_and_answer_has_one_id(given: list[str]) -> None:
    heads: list[bytes] = []

    def answer(connection: socket.socket, head: bytes) -> None:
        heads.append(head)
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Request-ID: other\r\nContent-Length: 2\r\n\r\nok")

    with answering_server(answer) as server, run_haproxy([server]) as haproxy:
        lines = "".join(f"X-Request-Id: {value}\r\n" for value in given).encode("latin-1")
        response, _ = haproxy.send(b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n")
    sent, received = (re.findall(rb"(?im)^x-request-id: (.*)\r$", text) for text in (heads[0], response))
    assert len(sent) == 1
    assert sent == received
    assert sent[0] == b"mine_1.2-3" if given == ["mine_1.2-3"] else re.fullmatch(rb"[0-9a-f-]{36}", sent[0])


def test_websockets_pass() -> None:
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    app = Starlette(routes=[WebSocketRoute("/echo", echo), Route("/-/healthz", lambda _: Response())])
    with (
        run_server(app) as server,
        run_haproxy([server], timeout_client_s=30) as haproxy,
        connect(f"{haproxy.url.replace('http', 'ws')}/echo") as websocket,
    ):
        for text in ("one", "two"):
            websocket.send(text)
            assert websocket.recv(timeout=10) == text


# Replicas that die


def die(connection: socket.socket, head: bytes) -> None:
    """Die at once, before the request has ended where it is long."""


def stall(connection: socket.socket, head: bytes) -> None:
    time.sleep(3)


@pytest.mark.parametrize("size", [1_000, 5_000_000])
def test_a_request_whose_replica_dies_gets_a_503_that_clients_repeat(size: int) -> None:
    with answering_server(die) as server, run_haproxy([server]) as haproxy:
        response = ask(haproxy, os.urandom(size))
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert response.headers["Content-Type"] == "application/json"
        assert re.fullmatch(r"[\w-]{36}", response.headers["X-Request-Id"])
        assert response.json() == ErrorResponse(error=CUT_OFF).model_dump()
        with requests.Session() as session:  # on a connection that is kept open, too
            assert {session.get(f"{haproxy.url}/v1/models").status_code for _ in range(3)} == {503}
        with pytest.raises(openai.InternalServerError) as caught:
            client(haproxy).audio.transcriptions.create(file=("a.flac", os.urandom(size)), model="m")
        assert (caught.value.status_code, caught.value.code) == (503, CUT_OFF.code)


def test_a_replica_that_does_not_answer_is_a_503_too() -> None:
    with answering_server(stall) as server, run_haproxy([server], timeout_server_s=1) as haproxy:
        response = ask(haproxy, b"abc")
    assert (response.status_code, response.json()["error"]["code"]) == (503, CUT_OFF.code)


def test_another_replica_answers_where_one_is_gone() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with answering_server(answer) as up, socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))  # nothing listens there
        with run_haproxy([f"http://127.0.0.1:{gone.getsockname()[1]}", up]) as haproxy:
            assert {requests.get(haproxy.url, timeout=10).text for _ in range(4)} == {"ok"}


@pytest.mark.parametrize("servers", [None, []], ids=["no application", "no replica"])
def test_a_service_that_starts_is_a_503(servers: list[str] | None) -> None:
    with run_haproxy(servers) as haproxy:
        response = ask(haproxy, b"abc")
    expected = error_response(ModelNotReady())
    assert (response.status_code, response.headers["Retry-After"]) == (503, expected.headers["Retry-After"])
    error, known = response.json()["error"], json.loads(bytes(expected.body))["error"]
    assert (error["type"], error["code"]) == (known["type"], known["code"])


def test_an_address_outside_the_route_is_a_404() -> None:
    with run_haproxy(["http://127.0.0.1:1"], route="/asr") as other:
        response = requests.get(f"{other.url}/v1/models", timeout=10)
    assert response.status_code == 404
    assert response.json() == ErrorResponse(error=ERRORS_BY_STATUS[404]).model_dump()


def test_a_stream_is_passed_on_as_it_comes_and_breaks_off_where_its_replica_dies() -> None:
    def stream(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in (b"one", b"two"):
            event = b'data: {"type": "transcript.text.delta", "delta": "%s"}\n\n' % word
            connection.sendall(b"%x\r\n%s\r\n" % (len(event), event))
            time.sleep(0.3)

    deltas: dict[str, float] = {}
    with answering_server(stream) as server, run_haproxy([server]) as haproxy:

        def read() -> None:
            for event in client(haproxy).audio.transcriptions.create(file=("a.flac", b"abc"), model="m", stream=True):
                deltas[event.delta] = time.monotonic()  # type: ignore[union-attr]

        with pytest.raises((httpx.RemoteProtocolError, openai.APIConnectionError)):
            read()
    assert [*deltas] == ["one", "two"]
    assert deltas["two"] - deltas["one"] > 0.2


# The configuration


def test_only_the_services_port_is_open_and_haproxy_finds_no_fault(tmp_path: Path) -> None:
    """Where another version of Ray writes the configuration in another way, this tells what is not replaced."""
    file = tmp_path / "haproxy.cfg"
    write_configuration(file, ["http://127.0.0.1:30000"], timeout_server_s=660)
    warnings = []
    for program in (RUNNING["GRAFT_HAPROXY"], str(PROGRAM)):
        check = [program, "-c", "-f", str(file)]
        checked = subprocess.run(check, env=os.environ | RUNNING, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        warnings.append(checked.stderr.count("[WARNING]"))
    assert warnings[0] == warnings[1]
    configuration = file.read_text()
    addresses = re.findall(r"^ +bind (\S+)", configuration, re.MULTILINE)
    assert [address for address in addresses if not address.startswith("unix@")] == ["127.0.0.1:8000"]
    for replaced in ("errorfile", "http-reuse always", "mode 666", "content-type text/plain lf-string"):
        assert replaced not in configuration
    for name in ("defaults", "frontend", "unknown_address"):
        assert configuration.count((PROGRAM.parent / f"{name}.cfg").read_text()) == 1
