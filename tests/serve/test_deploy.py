"""The service as it is brought up, `serve run` and `serve deploy`, and changed while clients ask: its engines' number and their model."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from graft.inference.transcriber import open_transcriber
from jobs.common.local_service import free_port
from tests.support import tiny_models
from tests.support.faults import until
from tests.support.media import SHORTEST_FIRST
from tests.support.paths import ROOT
from tests.support.ray_service import Crowd, Running, own_ray, replica_logs, spoken

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

CLI = [sys.executable, "-m", "ray.serve.scripts"]


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    with own_ray(dashboard=True) as url:
        yield url


@pytest.fixture
def url(dashboard) -> Iterator[str]:
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 240})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("serve") / "tiny-graft")


def is_ready(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/readyz", timeout=60).status_code == 200
    return False


def test_serve_run_scales_ingress_and_engine_each_on_its_own(url, folder):
    import ray

    settings = {"max_replicas": 2, "max_ongoing_chunks": 4, "max_ingress_replicas": 2, "max_ongoing_requests": 8}
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 3}
    arguments = [f"{key}={value}" for key, value in ({"model": folder} | settings | delays).items()]
    address = ray.get_runtime_context().gcs_address
    command = [*CLI, "run", "--address", address, "--name", "service", "serve.app:build", *arguments]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: is_ready(url))
        service = Running(url)

        def count() -> tuple[int, int]:
            return len(service.replicas("Ingress")), len(service.replicas("Engine"))

        assert count() == (1, 1)
        long, short = spoken(300), SHORTEST_FIRST[0].read_bytes()
        texts = [service.ask(audio).json()["text"] for audio in (long, short)]

        def ask(audio: bytes, text: str) -> None:
            answer = service.ask(audio)
            assert (answer.status_code, answer.json().get("text")) == (200, text)

        crowd = Crowd([lambda _: ask(long, texts[0])] * 2)  # 8 chunks in hand, of 2 requests
        crowd.wait_until(lambda: count() == (1, 2))
        crowd.leave()
        until(lambda: count() == (1, 1))
        crowd = Crowd([lambda _: ask(short, texts[1])] * 7)
        crowd.wait_until(lambda: count()[0] == 2)
        crowd.leave()
        until(lambda: count() == (1, 1))
        ask(short, texts[1])
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(120)


def test_another_model_takes_over_without_a_dropped_request(url, folder, dashboard, tmp_path):
    other = tiny_models.save_tiny_graft(tmp_path / "other", seed=1)
    audio = SHORTEST_FIRST[0].read_bytes()
    texts = [transcribed(model, audio) for model in (folder, other)]
    assert texts[0] != texts[1]

    def deploy(**engine: Any) -> None:
        config = yaml.safe_load((ROOT / "serve" / "serve.yaml").read_text())
        config["http_options"]["port"] = int(url.rpartition(":")[2])
        config["applications"][0] |= {
            "name": "service",
            "deployments": [{"name": "Engine", **engine}] if engine else [],
        }
        config["applications"][0]["args"]["model"] = str(folder)
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        subprocess.run(
            [*CLI, "deploy", "--address", dashboard, str(tmp_path / "serve.yaml")],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    deploy()
    until(lambda: is_ready(url))
    service = Running(url)
    heard: list[str] = []

    def ask(_: int) -> None:
        answer = service.ask(audio)
        assert answer.status_code == 200, answer.text
        heard.append(answer.json()["text"])

    crowd = Crowd([ask] * 8)
    crowd.wait_for(16)
    pids = {process.pid for process in service.replicas("Engine") + service.replicas("Ingress")}
    deploy(user_config={"model": str(other)})
    crowd.wait_until(lambda: heard[-1] == texts[1])
    crowd.wait_for(24)
    assert set(heard) == set(texts)
    assert set(heard[-16:]) == {texts[1]}

    deploy(user_config={"model": str(tmp_path)})  # is no model
    crowd.wait_until(lambda: any("the model stays as it was" in record["message"] for record in replica_logs()))
    crowd.wait_for(24)
    crowd.leave()
    assert set(heard[-16:]) == {texts[1]}
    assert {process.pid for process in service.replicas("Engine") + service.replicas("Ingress")} == pids
    assert requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == "tiny-graft"


def transcribed(model: Path, audio: bytes) -> str:
    transcriber = open_transcriber(model)
    text = transcriber.transcribe(audio).text
    transcriber.close()
    return text
