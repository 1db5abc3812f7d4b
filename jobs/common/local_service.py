"""Run graft's service, or another server, in a process of its own until a block ends.

The service is run by `serve run`, as users run it, on the Ray of this process.
"""

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
"""Longest start of a server in seconds; an application that cannot be built is noticed earlier."""
STOP_S = 60
"""Time that an interrupted server has to end, in seconds; then it is killed."""
SERVICE = f"{__package__.removesuffix('jobs.common')}serve.app:build"
"""The service's import path; the packages lie inside graft in a wheel, and at the top of a checkout."""
_ERROR_LINE = re.compile(r"\bgraft\.errors\.\w+: (.+)")


class ServerFailed(GraftError):
    """A server did not come up."""


@contextlib.contextmanager
def serving(model: str, folder: Path, *, app: str, **settings: Any) -> Iterator[str]:
    """Serve a model until the block ends; yields the service's URL.

    `settings` are further arguments of the service. Its configuration and log go into the folder. Raises ServerFailed.
    """
    import ray

    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": app,
                "route_prefix": "/",
                "import_path": SERVICE,
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
    """Run a server until the block ends, which begins when the URL answers with 200.

    Raises ServerFailed with the last line, or graft's error, of the log.
    """
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            deadline, status = time.monotonic() + START_S, 0
            while time.monotonic() < deadline and server.poll() is None and not _ERROR_LINE.search(log.read_text()):
                with contextlib.suppress(requests.RequestException):
                    status = requests.get(ready_url, timeout=5).status_code
                if status == 200:
                    break
                time.sleep(0.5)
            else:
                text = log.read_text()
                error = _ERROR_LINE.search(text)
                reason = error[1] if error else (text.strip().splitlines() or ["it said nothing"])[-1]
                raise ServerFailed(f"{ready_url} does not answer: {reason}")
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    """Find a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def post(url: str, file: Path, model: str) -> str:
    """Have a service transcribe a file; returns the text. Raises requests.RequestException."""
    with file.open("rb") as audio:
        answer = requests.post(
            f"{url}/v1/audio/transcriptions", files={"file": (file.name, audio)}, data={"model": model}, timeout=60
        )
    answer.raise_for_status()
    return str(answer.json()["text"])
