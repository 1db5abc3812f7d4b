"""Start the application on Ray Serve, send requests to it, read its metrics and logs, and kill its replicas."""

import atexit
import contextlib
import functools
import io
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import soundfile
from ray.exceptions import RayActorError

from graft.inference.engines.protocol import EngineCounts
from jobs.common.local_service import free_port
from serve.config import ServeArgs
from serve.decode.decoder import DecodeArgs
from serve.http.middleware import KEYS_VARIABLE
from serve.proxy.variables import ray_variables
from tests.support.faults import processes, until
from tests.support.media import SHORTEST_FIRST

APP = "service"
REQUEST_TIMEOUT_S = 240

ENVIRONMENT_KEY, FILE_KEY = "sk-of-the-environment", "sk-of-the-file"
"""API keys of the shared application."""
MAX_UPLOAD_BYTES, MAX_DURATION_S = 3_000_000, 70
"""Limits of the shared application."""


@functools.cache
def service_variables() -> dict[str, str]:
    """Return what a Ray must be told when it starts, to run services as documented and to show their metrics soon."""
    variables = ray_variables()
    atexit.register(shutil.rmtree, variables["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"], ignore_errors=True)
    return {**variables, "RAY_metrics_report_interval_ms": "1000"}


@contextlib.contextmanager
def own_ray(cpus: int = 16) -> Iterator[None]:
    """Run a Ray apart from the one that tests share until the block ends; it counts CPUs that need not exist."""
    import ray

    ray.shutdown()  # the shared one, which the next module that needs it starts again
    before = dict(os.environ)
    os.environ.update(service_variables())
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=512 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class RunningService:
    """A running application; `key` is sent with each request."""

    url: str
    app: str = APP
    key: str | None = None

    def is_up(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/readyz", timeout=60).status_code == 200
        return False

    def get(self, path: str, *, key: str | None = None) -> requests.Response:
        return requests.get(f"{self.url}{path}", headers=self._headers(key=key), timeout=60)

    def ask(
        self, audio: bytes, *, headers: dict[str, str] | None = None, key: str | None = None, **form: str
    ) -> requests.Response:
        """Send an upload. With the form field stream="true", the body of the response is left to be read."""
        return requests.post(
            f"{self.url}/v1/audio/transcriptions",
            files={"file": ("a.flac", audio)},
            data={"model": "tiny-graft"} | form,
            headers=self._headers(key=key) | (headers or {}),
            timeout=REQUEST_TIMEOUT_S,
            stream=form.get("stream") == "true",
        )

    def _headers(self, *, key: str | None) -> dict[str, str]:
        key = self.key if key is None else key
        return {"Authorization": f"Bearer {key}"} if key else {}

    def stream(self, audio: bytes) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream as they arrive."""
        with self.ask(audio, stream="true") as response:
            assert response.status_code == 200, response.text
            for line in response.iter_lines(chunk_size=1):
                if line.startswith(b"data: "):  # others are blank or comments
                    yield json.loads(line.removeprefix(b"data: "))

    def counts(self) -> EngineCounts:
        """Return the counts of the only engine replica."""
        from ray import serve

        return serve.get_deployment_handle("Engine", self.app).counts.remote().result(timeout_s=REQUEST_TIMEOUT_S)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        return processes(f"ServeReplica:{self.app}:{deployment}")

    def kill(self, deployment: str) -> int:
        """Kill a replica; returns its process id."""
        until(lambda: bool(self.replicas(deployment)))
        process = self.replicas(deployment)[0]
        process.kill()
        return process.pid

    def chunks_in_engine(self) -> int:
        """Count the chunks that the engine decodes or that wait for it; 0 while it is dead."""
        with contextlib.suppress(RayActorError):
            counts = self.counts()
            return counts.running + counts.waiting
        return 0


class Clients:
    """Threads, each of which calls a function with increasing numbers until `stop`."""

    def __init__(self, clients: Sequence[Callable[[int], None]]) -> None:
        self.calls = 0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(clients))
        self._clients: list[Future[None]] = [
            self._pool.submit(self._repeat, client, number) for number, client in enumerate(clients)
        ]

    def _repeat(self, client: Callable[[int], None], first: int) -> None:
        for number in itertools.count(first):
            if self._stop.is_set():
                return
            client(number)
            self.calls += 1

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; raises the exception of a client that failed."""
        until(lambda: condition() or any(client.done() for client in self._clients))
        for client in self._clients:
            if client.done():
                client.result()

    def wait_for(self, calls: int) -> None:
        """Wait until so many more calls have ended."""
        wanted = self.calls + calls
        self.wait_until(lambda: self.calls >= wanted)

    def stop(self) -> None:
        """Wait for the calls that are under way; raises the exception of a client that failed."""
        self._stop.set()
        for client in self._clients:
            client.result()


def start_serve() -> str:
    """Start Ray Serve on the Ray that runs; returns the URL of its proxy. Applications that ran there are removed."""
    from ray import serve

    serve.shutdown()
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": REQUEST_TIMEOUT_S})
    return f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def serving(args: ServeArgs, *, key: str | None = None) -> Iterator[RunningService]:
    """Run an application on the Ray that runs until the block ends."""
    from ray import serve

    from serve.app import build

    url = start_serve()
    serve.run(build(args), name=APP)
    try:
        yield RunningService(url, key=key)
    finally:
        serve.shutdown()


def start_shared_service(graft: Path, folder: Path) -> RunningService:
    """Start the application that several files of tests share, on the Ray that runs.

    It has a route prefix, a key in the environment of the process that builds it, and another in a file that is named
    relative to that process's folder. Ray's workers know neither.
    """
    from ray import serve

    from serve.app import build

    url = start_serve()
    (folder / "keys").write_text(f"another\n{FILE_KEY}\n")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEYS_VARIABLE, ENVIRONMENT_KEY)
        decode = DecodeArgs(max_duration_s=MAX_DURATION_S)
        args = ServeArgs(model=str(graft), key_file="keys", max_upload_bytes=MAX_UPLOAD_BYTES, decode=decode)
        serve.run(build(args), name=APP, route_prefix="/asr")
    return RunningService(f"{url}/asr", key=FILE_KEY)


def speech_flac(seconds: float, *, first: int = 0) -> bytes:
    """Return a FLAC file of recorded prompts, joined from the `first` on and cut to a duration."""
    samples: list[np.ndarray] = []
    while sum(map(len, samples)) < seconds * 16_000:
        samples.append(soundfile.read(SHORTEST_FIRST[(first + len(samples)) % len(SHORTEST_FIRST)], dtype="float32")[0])
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(samples)[: int(seconds * 16_000)], 16_000, format="flac")
    return file.getvalue()


def scrape_metrics(prefix: str = "ray_graft") -> dict[str, dict[str, float]]:
    """Return the values on the metrics ports of all Ray nodes, by name and by labels (as JSON)."""
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[str, float]] = {}
    for node in ray.nodes():
        text = requests.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(prefix):
                    found.setdefault(sample.name, {})[json.dumps(sample.labels, sort_keys=True)] = sample.value
    return found


def replica_log_records() -> Iterator[dict[str, Any]]:
    """Yield the log records of all replicas since Ray was started."""
    import ray

    for file in sorted(Path(ray._private.worker._global_node.get_logs_dir_path(), "serve").glob("replica_*.log")):
        for line in file.read_text().splitlines():
            yield json.loads(line)
