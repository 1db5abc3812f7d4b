"""`serve run` and `serve deploy`: replicas are added and removed, and the model is replaced, under load."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft.checkpoints.loading import model_digest
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
    scrape_metrics,
    speech_flac,
    start_serve,
)

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow, pytest.mark.ray]

CLI = [sys.executable, "-m", "ray.serve.scripts"]
AUDIO = SHORTEST_FIRST[0].read_bytes()


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


@dataclass(frozen=True)
class Deployed:
    """An application that `serve deploy` has started, and starts again with other settings."""

    service: RunningService
    folder: Path

    def deploy(self, model: Path, *, to: Path | None = None, **args: Any) -> None:
        """Deploy serve/serve.yaml with a model, and another to replace it."""
        import ray

        config = yaml.safe_load((ROOT / "serve" / "serve.yaml").read_text())
        config["http_options"]["port"] = int(self.service.url.rpartition(":")[2])
        (application,) = config["applications"]
        change = [{"name": "Engine", "user_config": {"model": str(to)}}] if to else []
        application |= {"name": APP, "deployments": change}
        application["args"] |= {"model": str(model)} | args
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        dashboard = f"http://{ray._private.worker._global_node.webui_url}"
        subprocess.run([*CLI, "deploy", "--address", dashboard, file], check=True, stdout=subprocess.DEVNULL)

    def replicas(self) -> list[dict[str, Any]]:
        """Return what /v1/models says of each engine replica; nothing while it answers with an error."""
        response = self.service.get("/v1/models")
        return response.json()["data"][0]["replicas"] if response.status_code == 200 else []


@pytest.fixture
def deployed(service: RunningService, tmp_path: Path) -> Deployed:
    return Deployed(service, tmp_path)


@pytest.fixture
def other_graft(tmp_path: Path) -> Path:
    return tiny_models.save_tiny_graft(tmp_path / "other", seed=1)


def text_of(model: Path) -> str:
    transcriber = open_transcriber(model)
    text = transcriber.transcribe(AUDIO).text
    transcriber.close()
    return text


def test_another_model_takes_over_without_a_failed_request(deployed, graft_folder, other_graft, tmp_path):
    service = deployed.service
    texts = [text_of(model) for model in (graft_folder, other_graft)]
    assert texts[0] != texts[1]
    deployed.deploy(graft_folder)
    until(service.is_up)
    received: list[str] = []

    def ask(_: int) -> None:
        response = service.ask(AUDIO)
        assert response.status_code == 200, response.text
        received.append(response.json()["text"])

    clients = Clients([ask] * 8)
    clients.wait_for(16)
    pids = replica_pids(service)
    deployed.deploy(graft_folder, to=other_graft)
    clients.wait_until(lambda: received[-1] == texts[1])
    clients.wait_for(24)
    assert set(received) == set(texts)
    assert set(received[-16:]) == {texts[1]}

    deployed.deploy(graft_folder, to=tmp_path)  # this folder holds no model
    clients.wait_until(
        lambda: any(
            "the new model" in one["message"] and "cannot be" in one["message"] for one in replica_log_records()
        )
    )
    clients.wait_for(24)
    clients.stop()
    assert set(received[-16:]) == {texts[1]}
    assert replica_pids(service) == pids
    assert service.get("/v1/models").json()["data"][0]["id"] == "tiny-graft"


def test_an_engine_that_starts_after_a_failed_change_opens_the_last_good_model(
    deployed, graft_folder, other_graft, tmp_path
):
    """The engine is killed, and then another one is added; the last good model is not that of the arguments."""
    service, failed = deployed.service, {"model": "broken", "error": "ModelError"}
    broken = tmp_path / "broken"
    broken.mkdir()
    deployed.deploy(graft_folder)
    until(service.is_up)
    deployed.deploy(graft_folder, to=other_graft)
    until(lambda: [one["model"] for one in deployed.replicas()] == ["other"])
    deployed.deploy(graft_folder, to=broken)
    until(lambda: [one["failed_change"] for one in deployed.replicas()] == [failed])
    (before,) = deployed.replicas()
    assert (before["model"], before["digest"], before["state"]) == ("other", model_digest(other_graft), "ready")
    until(lambda: changes_failed([before]) == {1})

    service.kill("Engine")
    until(lambda: [one["replica"] != before["replica"] for one in deployed.replicas()] == [True])
    (after,) = deployed.replicas()
    assert {**after, "replica": ""} == {**before, "replica": ""}
    assert service.ask(AUDIO).json()["text"] == text_of(other_graft)

    deployed.deploy(graft_folder, to=broken, min_replicas=2, max_replicas=2)
    until(lambda: [(one["model"], one["failed_change"]) for one in deployed.replicas()] == [("other", failed)] * 2)
    deployed.deploy(graft_folder, to=other_graft, min_replicas=2, max_replicas=2)
    until(lambda: [one["failed_change"] for one in deployed.replicas()] == [None] * 2)
    until(lambda: changes_failed(deployed.replicas()) == {0})


def changes_failed(replicas: list[dict[str, Any]]) -> set[float]:
    """Return the values that the replicas' metric of failed changes has."""
    ids = {replica["replica"] for replica in replicas}
    series = scrape_metrics("ray_graft_model_change_failed").get("ray_graft_model_change_failed", {})
    return {value for labels, value in series.items() if json.loads(labels)["replica"] in ids}


def replica_pids(service: RunningService) -> set[int]:
    return {process.pid for process in service.replicas("Engine") + service.replicas("Ingress")}
