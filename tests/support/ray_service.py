"""A service on a Ray of its own that tests ask, watch and hurt, and what its clients say."""

import contextlib
import io
import itertools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
import soundfile
from ray.exceptions import RayActorError

from graft.inference.engines.protocol import EngineCounts
from jobs.common.cluster import SERVE_VARIABLES
from jobs.common.local_service import free_port
from serve.config import ServeArgs
from tests.support.faults import processes, until
from tests.support.media import SHORTEST_FIRST

APP = "service"
PATIENCE_S = 240
ENVIRONMENT = {
    **SERVE_VARIABLES,
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.http.proxy_middleware:middlewares",
    "RAY_metrics_report_interval_ms": "1000",
}


@contextlib.contextmanager
def own_ray(*, cpus: int = 16, dashboard: bool = False) -> Iterator[str]:
    """The address of the dashboard of a Ray whose proxies and metrics are as tests want them; CPUs are not taken, only counted."""
    import ray

    ray.shutdown()  # of a module before this one
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        context = ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=512 * 2**20,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Running:
    """A service that runs."""

    url: str
    app: str = APP

    def ask(
        self, audio: bytes, *, session: Any = requests, headers: dict[str, str] | None = None, **form: str
    ) -> requests.Response:
        return session.post(
            f"{self.url}/v1/audio/transcriptions",
            files={"file": ("a.flac", audio)},
            data={"model": "tiny-graft"} | form,
            headers=headers,
            timeout=PATIENCE_S,
        )

    def stream(self, audio: bytes) -> Iterator[dict[str, Any]]:
        """The events of a stream, as they come."""
        with requests.post(
            f"{self.url}/v1/audio/transcriptions",
            files={"file": ("a.flac", audio)},
            data={"model": "tiny-graft", "stream": "true"},
            timeout=PATIENCE_S,
            stream=True,
        ) as response:
            assert response.status_code == 200, response.text
            for line in response.iter_lines(chunk_size=1):
                if line:
                    yield json.loads(line.removeprefix(b"data: "))

    def counts(self) -> EngineCounts:
        """Of the one engine."""
        from ray import serve

        return serve.get_deployment_handle("Engine", self.app).counts.remote().result(timeout_s=PATIENCE_S)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        return processes(f"ServeReplica:{self.app}:{deployment}")

    def kill(self, deployment: str) -> int:
        """End a replica at once; returns its pid."""
        until(lambda: bool(self.replicas(deployment)))
        process = self.replicas(deployment)[0]
        process.kill()
        return process.pid

    def in_hand(self) -> int:
        """The chunks that the engine decodes or is to decode; 0 while it is dead."""
        with contextlib.suppress(RayActorError):
            counts = self.counts()
            return counts.running + counts.waiting
        return 0


class Crowd:
    """Clients that do something again and again, until they are told to stop; each turn has a number."""

    def __init__(self, clients: Sequence[Callable[[int], None]]) -> None:
        self.turns = 0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(clients))
        self._clients: list[Future[None]] = [
            self._pool.submit(self._insist, client, number) for number, client in enumerate(clients)
        ]

    def _insist(self, client: Callable[[int], None], number: int) -> None:
        for turn in itertools.count(number):
            if self._stop.is_set():
                return
            client(turn)
            self.turns += 1

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; raises what went wrong for a client."""
        until(lambda: condition() or any(client.done() for client in self._clients))
        for client in self._clients:
            if client.done():
                client.result()

    def wait_for(self, turns: int) -> None:
        """Wait until so many more turns are over."""
        wanted = self.turns + turns
        self.wait_until(lambda: self.turns >= wanted)

    def leave(self) -> None:
        """Have the clients stop; raises what went wrong for one."""
        self._stop.set()
        for client in self._clients:
            client.result()


@contextlib.contextmanager
def serving(args: ServeArgs) -> Iterator[Running]:
    """Run a service until the block ends."""
    from ray import serve

    from serve.app import build

    with own_ray():
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": PATIENCE_S})
        serve.run(build(args), name=APP)
        yield Running(f"http://127.0.0.1:{port}")
        serve.shutdown()


def spoken(seconds: float, *, first: int = 0) -> bytes:
    """A FLAC file of the prompts, one after the other, up to a length."""
    samples: list[np.ndarray] = []
    while sum(map(len, samples)) < seconds * 16_000:
        samples.append(soundfile.read(SHORTEST_FIRST[(first + len(samples)) % len(SHORTEST_FIRST)], dtype="float32")[0])
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(samples)[: int(seconds * 16_000)], 16_000, format="flac")
    return file.getvalue()


def scraped(kind: str = "ray_graft") -> dict[str, dict[str, float]]:
    """What Ray's own metrics ports tell now: by metric and labels."""
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[str, float]] = {}
    for node in ray.nodes():
        text = requests.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(kind):
                    found.setdefault(sample.name, {})[json.dumps(sample.labels, sort_keys=True)] = sample.value
    return found


def replica_logs() -> Iterator[dict[str, Any]]:
    """The records that replicas of this Ray's session have written."""
    import ray

    for file in sorted(Path(ray._private.worker._global_node.get_logs_dir_path(), "serve").glob("replica_*.log")):
        for line in file.read_text().splitlines():
            yield json.loads(line)
