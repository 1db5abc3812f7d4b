"""The service as it is run, by `serve run`, in a process of its own on this process's Ray, until a block ends; likewise other servers."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import yaml

from graft.checkpoints.names import absolute_checkpoint
from graft.errors import GraftError

CONFIG_FILE, LOG_FILE = "serve.yaml", "serve.log"
START_S = 300
"""How long a server may take; one whose application can't be built says so earlier."""
STOP_S = 60
"""How long it may take to end when it is interrupted; then it is killed."""
_REFUSAL = re.compile(r"\bgraft\.errors\.\w+: (.+)")


class ServerFailed(GraftError):
    """A server did not come up."""


@contextlib.contextmanager
def serving(
    model: str, folder: Path, *, app: str, request_timeout_s: float | None = None, **settings: Any
) -> Iterator[str]:
    """Serve a model, with other keys of the service's arguments; yields the URL. Its configuration and log lie in the folder.

    Raises ServerFailed.
    """
    import ray

    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": request_timeout_s},
        "applications": [
            {
                "name": app,
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": {"model": absolute_checkpoint(model)} | settings,
            }
        ],
    }
    path = folder / CONFIG_FILE
    path.write_text(yaml.safe_dump(config))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(path)]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/readyz", folder / LOG_FILE):
        yield url


@contextlib.contextmanager
def running(command: list[str], ready_url: str, log: Path) -> Iterator[None]:
    """Run a server until the block ends; it begins when the address answers. Raises ServerFailed."""
    with log.open("w") as written:
        server = subprocess.Popen(command, stdout=written, stderr=written)
        try:
            _wait(server, ready_url, log)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def post(url: str, file: Path, model: str) -> str:
    """Ask a service at this URL for a file's text. Raises requests.RequestException."""
    with file.open("rb") as audio:
        answer = requests.post(
            f"{url}/v1/audio/transcriptions", files={"file": (file.name, audio)}, data={"model": model}, timeout=60
        )
    answer.raise_for_status()
    return str(answer.json()["text"])


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None and not _REFUSAL.search(log.read_text()):
        with contextlib.suppress(requests.RequestException):
            if requests.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    said = log.read_text()
    refusal = _REFUSAL.search(said)
    told = refusal[1] if refusal else (said.strip().splitlines() or ["it said nothing"])[-1]
    raise ServerFailed(f"{url} does not answer: {told}")
