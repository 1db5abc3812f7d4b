"""The service seen from outside: what Prometheus scrapes, what Grafana draws of it, and what stands in the logs."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from serve.config import ServeArgs
from serve.metrics import EngineMetrics, RequestMetrics
from tests.support import tiny_models
from tests.support.faults import until
from tests.support.media import SHORTEST_FIRST
from tests.support.paths import ROOT
from tests.support.ray_service import Running, replica_logs, scraped, serving, spoken

DASHBOARD = ROOT / "cluster" / "dashboard.json"
NAMES = re.compile(r"ray_\w+")
SERVE_LABELS = {"application", "deployment", "replica"}


def exported() -> dict[str, set[str]]:
    """The labels of each series that the service has on a metrics port, as Ray names it."""
    found = {}
    for metric in [*vars(RequestMetrics()).values(), *vars(EngineMetrics()).values()]:
        if not hasattr(metric, "info"):
            continue
        name, labels = f"ray_{metric.info['name']}", SERVE_LABELS | set(metric.info["tag_keys"])
        match type(metric).__name__:
            case "Counter":
                found[f"{name}_total"] = labels
            case "Histogram":
                found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
            case _:
                found[name] = labels
    return found


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_what_is_exported():
    series = exported()
    for query in queries():
        names = NAMES.findall(query)
        assert names, query
        for name in names:
            assert name in series, f"{name} in {query}"
        labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        labels |= set(re.findall(r"(\w+)=~?\"", query))
        assert labels <= set.union(*(series[name] for name in names)), query
    assert {name for query in queries() for name in NAMES.findall(query)} >= {
        "ray_graft_requests_total",
        "ray_graft_audio_seconds_total",
        "ray_graft_queue_seconds",
        "ray_graft_batch_size",
        "ray_graft_request_rtfx_bucket",
        "ray_graft_first_text_seconds_bucket",
        "ray_graft_request_seconds_bucket",
    }


def test_panels_of_the_dashboard_stand_side_by_side():
    board = json.loads(DASHBOARD.read_text())
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = {
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    }
    assert len(cells) == sum(at["w"] * at["h"] for at in places)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in board["panels"])


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Running]:
    with serving(
        ServeArgs(model=str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("serve") / "tiny-graft")))
    ) as running:
        yield running


@pytest.mark.slow
def test_every_metric_is_scraped_while_requests_run(service):
    audio = spoken(60)
    requests.get(f"{service.url}/nothing", timeout=30)
    with ThreadPoolExecutor(5) as clients:
        asked = [clients.submit(service.ask, audio) for _ in range(4)]
        streamed = clients.submit(list, service.stream(audio))
        until(lambda: any(value >= 2 for value in scraped().get("ray_graft_batch_size", {}).values()))
        until(lambda: any(value > 60 for value in scraped()["ray_graft_queue_seconds"].values()))  # two are decoded
        assert [one.result().status_code for one in asked] == [200] * 4
        assert streamed.result()[-1]["type"] == "transcript.text.done"

    def total(name: str, **labels: str) -> float:
        return sum(value for at, value in scraped().get(name, {}).items() if labels.items() <= json.loads(at).items())

    until(lambda: total("ray_graft_audio_seconds_total") == pytest.approx(300))
    until(lambda: total("ray_graft_requests_in_hand") == 0)
    transcriptions = {"endpoint": "/v1/audio/transcriptions", "application": service.app, "deployment": "Ingress"}
    until(lambda: total("ray_graft_requests_total", status="200", **transcriptions) == 5)
    assert total("ray_graft_requests_total", status="404", endpoint="other") == 1
    assert total("ray_graft_request_seconds_count", **transcriptions) == 5
    assert total("ray_graft_request_rtfx_count") == 5
    assert total("ray_graft_first_text_seconds_count") == 1
    assert total("ray_graft_heard_seconds_total", deployment="Engine") > 100
    assert total("ray_graft_tokens_total") > total("ray_graft_steps_total") > 0
    assert total("ray_graft_busy_seconds_total") > 0
    found = scraped()
    for name, labels in exported().items():
        assert name in found
        assert labels <= set(json.loads(next(iter(found[name])))), name


@pytest.mark.slow
def test_logs_tell_of_each_request_by_its_id(service):
    audio = SHORTEST_FIRST[0].read_bytes()
    named = service.ask(audio, headers={"X-Request-Id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    made = service.ask(b"no audio")
    id = made.headers["x-request-id"]
    assert re.fullmatch(r"[\w-]{8,}", id)

    def told(id: str, message: str) -> list[dict]:
        return [
            record
            for record in replica_logs()
            if record.get("request_id") == id and record["message"].startswith(message)
        ]

    until(lambda: bool(told("mine-1", "POST") and told(id, "POST") and told("mine-1", "a chunk")))
    (first,), (second,), (heard,) = told("mine-1", "POST"), told(id, "POST"), told("mine-1", "a chunk")
    assert (first["status"], first["path"], first["deployment"]) == (
        200,
        "/v1/audio/transcriptions",
        f"{service.app}_Ingress",
    )
    assert first["seconds"] > heard["seconds"] > 0
    assert heard["deployment"] == f"{service.app}_Engine"
    assert (second["status"], second["levelname"]) == (400, "INFO")
