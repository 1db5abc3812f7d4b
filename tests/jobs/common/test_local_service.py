"""Tests of servers in processes of their own: the wait for one, its end, and a request for the text of a file."""

import email
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import requests

from jobs.common.local_service import ServerFailed, post, running, serving

pytestmark = pytest.mark.processes

SLEEPER = [sys.executable, "-c", "import time; time.sleep(300)"]


class Upload(BaseHTTPRequestHandler):
    """Answers GET with 200, and POST with the form fields that it read."""

    def do_GET(self) -> None:
        self._answer({"path": self.path})

    def do_POST(self) -> None:
        if self.path.startswith("/nowhere"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers["content-length"]))
        form = email.message_from_bytes(f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode() + body)
        parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
        heard = {"name": parts["file"].get_filename(), "bytes": parts["file"].get_payload(decode=True).hex()}
        self._answer({"text": json.dumps({**heard, "path": self.path, "model": parts["model"].get_payload()})})

    def _answer(self, value: dict[str, str]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *ignored: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Upload)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_upload_arrives_whole(url: str, tmp_path: Path) -> None:
    content = os.urandom(5000) + b"\r\n--\r\n\x00\xff"
    (tmp_path / "a.flac").write_bytes(content)
    understood = json.loads(post(url, tmp_path / "a.flac", "merged"))
    assert understood == {
        "name": "a.flac",
        "bytes": content.hex(),
        "path": "/v1/audio/transcriptions",
        "model": "merged",
    }


def test_a_refusal_is_told(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(b"")
    with pytest.raises(requests.HTTPError):
        post(f"{url}/nowhere", tmp_path / "a.flac", "merged")


def test_a_server_runs_as_long_as_the_block(url: str, tmp_path: Path) -> None:
    with running(SLEEPER, url, tmp_path / "log"):
        (server,) = [child for child in psutil.Process().children() if child.cmdline() == SLEEPER]
        assert server.is_running()
    assert not server.is_running()


def test_a_server_that_does_not_come_up_is_told_with_its_last_line(tmp_path: Path) -> None:
    command = ["ls", str(tmp_path / "nothing")]
    with (
        pytest.raises(ServerFailed, match="No such file or directory"),
        running(command, "http://127.0.0.1:9", tmp_path / "log"),
    ):
        pass


def test_a_server_that_does_not_heed_an_interrupt_is_killed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.common.local_service.STOP_S", 0.5)
    deaf = "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    deaf += "; pathlib.Path(sys.argv[1]).touch(); time.sleep(300)"
    with running([sys.executable, "-c", deaf, str(tmp_path / "deaf")], url, tmp_path / "log"):
        (server,) = [child for child in psutil.Process().children() if str(tmp_path / "deaf") in child.cmdline()]
        while not (tmp_path / "deaf").exists():
            time.sleep(0.05)
    assert not server.is_running()


def test_an_application_that_can_not_be_built_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "jobs.common.local_service.STOP_S", 5
    )  # a shell's background jobs ignore interrupts, and so do those that they start
    says = "raised from:\ngraft.errors.ModelError: small is no graft: give a folder\n(controller) retrying"
    outlives = (
        f"import pathlib, sys, time; print({says!r}, flush=True); time.sleep(60); pathlib.Path(sys.argv[1]).touch()"
    )
    command = [sys.executable, "-c", outlives, str(tmp_path / "waited for")]
    with (
        pytest.raises(ServerFailed, match=r"small is no graft: give a folder$"),
        running(command, "http://127.0.0.1:9", tmp_path / "log"),
    ):
        pass
    assert not (tmp_path / "waited for").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_started")
def test_a_model_is_served_by_the_name_it_was_given(tmp_path: Path) -> None:
    refusal = "not answer: nowhere can't be read as a graft or whisper checkpoint"  # not a folder of that name here
    with pytest.raises(ServerFailed, match=refusal), serving("nowhere", tmp_path, app="wrong"):
        pass
