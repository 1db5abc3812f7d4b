"""`serve run` and `serve deploy`: replicas are added and removed, and the model is replaced, under load."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from graft.inference.transcriber import open_transcriber
from tests.support import tiny_models
from tests.support.faults import until
from tests.support.media import SHORTEST_FIRST
from tests.support.paths import ROOT
from tests.support.ray_service import (
    APP,
    Clients,
    RunningService,
    replica_log_records,
    speech_flac,
    start_serve,
)

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow, pytest.mark.ray]

CLI = [sys.executable, "-m", "ray.serve.scripts"]


@pytest.fixture
def service(ray_started: None) -> Iterator[RunningService]:
    """An application that the test itself brings up."""
    from ray import serve

    yield RunningService(start_serve())
    serve.shutdown()


def test_serve_run_scales_ingress_and_engine_independently(service, graft_folder):
    import ray

    settings = {"max_replicas": 2, "max_ongoing_chunks": 4, "max_ingress_replicas": 2, "max_ongoing_requests": 8}
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 3}
    arguments = [f"{key}={value}" for key, value in ({"model": graft_folder} | settings | delays).items()]
    address = ray.get_runtime_context().gcs_address
    command = [*CLI, "run", "--address", address, "--name", APP, "serve.app:build", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(service.is_up)

        def replica_counts() -> tuple[int, int]:
            return len(service.replicas("Ingress")), len(service.replicas("Engine"))

        assert replica_counts() == (1, 1)
        long, short = speech_flac(300), SHORTEST_FIRST[0].read_bytes()
        texts = [service.ask(audio).json()["text"] for audio in (long, short)]

        def ask(audio: bytes, text: str) -> None:
            response = service.ask(audio)
            assert (response.status_code, response.json().get("text")) == (200, text)

        clients = Clients([lambda _: ask(long, texts[0])] * 2)  # 8 chunks of 2 requests
        clients.wait_until(lambda: replica_counts() == (1, 2))
        clients.stop()
        until(lambda: replica_counts() == (1, 1))
        clients = Clients([lambda _: ask(short, texts[1])] * 7)
        clients.wait_until(lambda: replica_counts()[0] == 2)
        clients.stop()
        until(lambda: replica_counts() == (1, 1))
        ask(short, texts[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def test_another_model_takes_over_without_a_failed_request(service, graft_folder, transcriber, tmp_path):
    import ray

    other = tiny_models.save_tiny_graft(tmp_path / "other", seed=1)
    audio = SHORTEST_FIRST[0].read_bytes()
    other_transcriber = open_transcriber(other)
    texts = [one.transcribe(audio).text for one in (transcriber, other_transcriber)]
    other_transcriber.close()
    assert texts[0] != texts[1]
    dashboard = f"http://{ray._private.worker._global_node.webui_url}"

    def deploy(**engine: Any) -> None:
        config = yaml.safe_load((ROOT / "serve" / "serve.yaml").read_text())
        config["http_options"]["port"] = int(service.url.rpartition(":")[2])
        config["applications"][0] |= {
            "name": APP,
            "deployments": [{"name": "Engine", **engine}] if engine else [],
        }
        config["applications"][0]["args"]["model"] = str(graft_folder)
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        command = [*CLI, "deploy", "--address", dashboard, str(tmp_path / "serve.yaml")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    deploy()
    until(service.is_up)
    received: list[str] = []

    def ask(_: int) -> None:
        response = service.ask(audio)
        assert response.status_code == 200, response.text
        received.append(response.json()["text"])

    clients = Clients([ask] * 8)
    clients.wait_for(16)
    pids = replica_pids(service)
    deploy(user_config={"model": str(other)})
    clients.wait_until(lambda: received[-1] == texts[1])
    clients.wait_for(24)
    assert set(received) == set(texts)
    assert set(received[-16:]) == {texts[1]}

    deploy(user_config={"model": str(tmp_path)})  # this folder holds no model
    clients.wait_until(
        lambda: any("the new model cannot be loaded" in record["message"] for record in replica_log_records())
    )
    clients.wait_for(24)
    clients.stop()
    assert set(received[-16:]) == {texts[1]}
    assert replica_pids(service) == pids
    assert service.get("/v1/models").json()["data"][0]["id"] == "tiny-graft"


def replica_pids(service: RunningService) -> set[int]:
    return {process.pid for process in service.replicas("Engine") + service.replicas("Ingress")}
