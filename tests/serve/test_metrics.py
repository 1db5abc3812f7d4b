"""Metrics that Prometheus scrapes, the Grafana dashboard of them, and log records."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from serve.metrics import EngineMetrics, RequestMetrics
from serve.service import ReplicaModel
from tests.support.faults import until
from tests.support.media import SHORTEST_FIRST
from tests.support.paths import ROOT
from tests.support.ray_service import replica_log_records, scrape_metrics, speech_flac

pytestmark = pytest.mark.xdist_group("serve")

DASHBOARD = ROOT / "cluster" / "dashboard.json"
ALERTS = ROOT / "cluster" / "monitoring" / "alerts.yaml"
NAMES = re.compile(r"ray_\w+")
SERVE_LABELS = {"application", "deployment", "replica"}
SETTLE_S = 3
"""Seconds after which the metrics of earlier requests have been exported."""


def exported_labels() -> dict[str, set[str]]:
    """Return the labels of each series that the service exports, by the name that Ray gives it."""
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
    board, alerts = json.loads(DASHBOARD.read_text()), yaml.safe_load(ALERTS.read_text())
    drawn = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return drawn + [rule["expr"] for group in alerts["spec"]["groups"] for rule in group["rules"]]


def test_the_dashboard_and_the_alerts_query_exported_metrics():
    series = exported_labels()
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
        "ray_graft_model_info",
        "ray_graft_model_change_failed",
    }


def test_panels_of_the_dashboard_do_not_overlap():
    board = json.loads(DASHBOARD.read_text())
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = {
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    }
    assert len(cells) == sum(at["w"] * at["h"] for at in places)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in board["panels"])


def test_the_model_before_is_no_longer_the_served_one(monkeypatch):
    """Ray cannot remove a series, so that the former model's gets 0."""
    metrics = EngineMetrics()
    set_to: list[tuple[float, dict[str, str]]] = []
    monkeypatch.setattr(metrics._model, "set", lambda value, tags: set_to.append((value, tags)))
    for name, digest in (("m", "a"), ("m", "a"), ("m", "b")):
        metrics.sample_model(ReplicaModel("replica", name, digest))
    assert [(value, tags["digest"]) for value, tags in set_to] == [(1, "a"), (1, "a"), (0, "a"), (1, "b")]


@pytest.mark.slow
def test_every_metric_is_scraped_while_requests_run(service):
    def total(metrics: dict[str, dict[str, float]], name: str, **labels: str) -> float:
        wanted = labels | {"application": service.app}
        return sum(value for at, value in metrics.get(name, {}).items() if wanted.items() <= json.loads(at).items())

    def increase(name: str, **labels: str) -> float:
        return total(scrape_metrics(), name, **labels) - total(before, name, **labels)

    time.sleep(SETTLE_S)
    before = scrape_metrics()
    audio = speech_flac(60)
    service.get("/nothing")
    with ThreadPoolExecutor(5) as clients:
        whole = [clients.submit(service.ask, audio) for _ in range(4)]
        streamed = clients.submit(list, service.stream(audio))
        until(lambda: any(value >= 2 for value in scrape_metrics().get("ray_graft_batch_size", {}).values()))
        # Two uploads have been decoded.
        until(lambda: any(value > 60 for value in scrape_metrics()["ray_graft_queue_seconds"].values()))
        assert [one.result().status_code for one in whole] == [200] * 4
        assert streamed.result()[-1]["type"] == "transcript.text.done"

    until(lambda: increase("ray_graft_audio_seconds_total") == pytest.approx(300))
    until(lambda: total(scrape_metrics(), "ray_graft_requests_in_hand") == 0)
    transcriptions = {"endpoint": "/v1/audio/transcriptions", "deployment": "Ingress"}
    until(lambda: increase("ray_graft_requests_total", status="200", **transcriptions) == 5)
    assert increase("ray_graft_requests_total", status="404", endpoint="other") == 1
    assert increase("ray_graft_request_seconds_count", **transcriptions) == 5
    assert increase("ray_graft_request_rtfx_count") == 5
    assert increase("ray_graft_first_text_seconds_count") == 1
    assert increase("ray_graft_heard_seconds_total", deployment="Engine") > 100
    assert increase("ray_graft_tokens_total") > increase("ray_graft_steps_total") > 0
    assert increase("ray_graft_busy_seconds_total") > 0
    found = scrape_metrics()
    for name, labels in exported_labels().items():
        assert name in found
        assert labels <= set(json.loads(next(iter(found[name])))), name


@pytest.mark.slow
def test_each_request_is_logged_with_its_id(service):
    named = service.ask(SHORTEST_FIRST[0].read_bytes(), headers={"X-Request-Id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    new_id = service.ask(b"no audio").headers["x-request-id"]
    assert re.fullmatch(r"[\w-]{8,}", new_id)
    for hostile in (b"\xff", "\u2028INFO forged".encode(), b"x -- POST / 200"):
        answer = service.ask(b"no audio", headers={"X-Request-Id": hostile, "Serve-Multiplexed-Model-Id": b"\xff"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_audio")
        assert re.fullmatch(r"[\w-]{8,}", answer.headers["x-request-id"])

    def records(request_id: str, message: str) -> list[dict]:
        return [
            record
            for record in replica_log_records()
            if record.get("request_id") == request_id and record["message"].startswith(message)
        ]

    until(lambda: bool(records("mine-1", "POST") and records(new_id, "POST") and records("mine-1", "a chunk")))
    (first,), (second,) = records("mine-1", "POST"), records(new_id, "POST")
    (chunk,) = records("mine-1", "a chunk was transcribed")
    assert (first["status"], first["path"]) == (200, "/asr/v1/audio/transcriptions")
    assert first["deployment"] == f"{service.app}_Ingress"
    assert first["seconds"] > chunk["seconds"] > 0
    assert chunk["deployment"] == f"{service.app}_Engine"
    assert (second["status"], second["levelname"]) == (400, "INFO")
