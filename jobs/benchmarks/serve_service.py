"""The service as it is run, by `serve run`, on a Ray of this benchmark's own; asked over HTTP, its engine's counts by Ray."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from graft.engines import EngineCounts
from graft.errors import GraftError
from jobs.cluster import connect

APP = "bench"
START_S = 300
MOST_REQUESTS = 10_000
"""That a service of a benchmark has in hand: here clients wait, and are not refused."""


class ServerFailed(GraftError):
    """A server of a benchmark did not come up."""


@dataclass(frozen=True)
class Service:
    """A service that runs."""

    url: str

    def counts(self) -> EngineCounts:
        """Of one of its engines."""
        from ray import serve

        return serve.get_deployment_handle("Engine", APP).counts.remote().result()

    def engines(self) -> int:
        """Engines that are up."""
        from ray import serve

        states = serve.status().applications[APP].deployments["Engine"].replica_states
        return sum(count for state, count in states.items() if state == "RUNNING")


@contextlib.contextmanager
def service(model: str, **settings: Any) -> Iterator[Service]:
    """Run the service until the block ends. Raises ServerFailed."""
    import ray

    connect(cpus=8)
    port = free_port()
    args = {"model": os.path.abspath(model), "max_ongoing_requests": MOST_REQUESTS} | settings
    config = {
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 600},
        "applications": [{"name": APP, "route_prefix": "/", "import_path": "serve.app:build", "args": args}],
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "serve.yaml").write_text(yaml.safe_dump(config))
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(Path(folder, "serve.yaml"))]
        with running(command, f"http://127.0.0.1:{port}/readyz"):
            yield Service(f"http://127.0.0.1:{port}")
    ray.shutdown()


@contextlib.contextmanager
def running(command: list[str], ready_url: str) -> Iterator[None]:
    """Run a server until the block ends; it begins when the address answers. Raises ServerFailed."""
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(server, ready_url, Path(log.name))
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    told = log.read_text().strip().splitlines()[-1:] or ["it said nothing"]
    raise ServerFailed(f"{url} does not answer: {told[0]}")
