"""Record what the panels of cluster/dashboard.json show while the small graft's service is under load.

    python docs/record_dashboard.py --prometheus /usr/bin/prometheus

One client asks, then eight, then one again; one in ten uploads is no audio, and one client takes its text as a stream.
A Prometheus scrapes Ray's metrics; each panel's queries are evaluated over the run, and written to
docs/data/dashboard.csv, which docs/draw.py draws. Takes four minutes on two cores.
"""

import argparse
import contextlib
import csv
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import requests
import yaml

from jobs.benchmarks.service import SCALING, service
from jobs.benchmarks.speech import PROMPTS
from jobs.common.local_service import free_port, running

ROOT = Path(__file__).parents[1]
DASHBOARD, TABLE = ROOT / "cluster" / "dashboard.json", ROOT / "docs" / "data" / "dashboard.csv"
SCRAPE_S, STEP_S = 2, 5
Row = tuple[str, str, int, str]
"""Panel, series, second and value."""
LOADS = ((1, 40.0), (8, 90.0), (1, 80.0))
"""Clients, and for how many seconds they ask."""
ABOUT = """\
# what: the series of cluster/dashboard.json while one client, then eight, then one asked the small graft's service
# machine: {machine}
# date: {date}
# command: python docs/record_dashboard.py
"""


@contextlib.contextmanager
def prometheus(binary: str, folder: Path) -> Iterator[str]:
    """Run a Prometheus that scrapes all Ray nodes until the block ends; yields its URL."""
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    config = folder / "prometheus.yml"
    scrape = {"job_name": "ray", "scrape_interval": f"{SCRAPE_S}s", "static_configs": [{"targets": targets}]}
    config.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    address = f"127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with running([*command, f"--web.listen-address={address}"], f"http://{address}/-/ready", folder / "prometheus.log"):
        yield f"http://{address}"


def ask(url: str, clients: int, seconds: float) -> None:
    """Have clients transcribe the bundled prompts one after the other for some seconds."""
    uploads, end = sorted((PROMPTS / "audio").glob("*.flac")), time.monotonic() + seconds

    def send(client: int) -> None:
        number = client
        while time.monotonic() < end:
            upload = b"no audio" if number % 10 == 9 else uploads[number % len(uploads)].read_bytes()
            form = {"model": "small"} | ({"stream": "true"} if client == 0 else {})
            files = {"file": ("clip.flac", upload, "audio/flac")}
            _ = requests.post(f"{url}/v1/audio/transcriptions", files=files, data=form, timeout=600).content
            number += clients

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, range(clients)))


def panel_rows(url: str, panel: dict[str, Any], start: float, end: float, names: dict[str, str]) -> Iterator[Row]:
    """Evaluate the queries of a panel; `names` keeps the short names of replicas.

    A series of zeros is left out where there are others.
    """
    for target in panel["targets"]:
        query = target["expr"].replace("$application", ".*").replace("$__rate_interval", f"{10 * SCRAPE_S}s")
        asked = {"query": query, "start": start, "end": end, "step": STEP_S}
        answer = requests.get(f"{url}/api/v1/query_range", params=asked, timeout=60)
        answer.raise_for_status()
        found = answer.json()["data"]["result"]
        for result in found:
            points = [(round(at - start), float(value)) for at, value in result["values"]]
            if len(found) > 1 and not any(value for _, value in points):
                continue
            labels, name = result["metric"], target["legendFormat"]
            if "replica" in labels:
                kind = "Ingress" if panel["title"].startswith("Queue") else "Engine"
                count = sum(short.startswith(kind) for short in names.values())
                labels["replica"] = names.setdefault(labels["replica"], f"{kind} {count + 1}")
            for label in re.findall(r"{{(\w+)}}", name):
                name = name.replace(f"{{{{{label}}}}}", labels.get(label, ""))
            yield from ((panel["title"], name, at, f"{value:.4g}") for at, value in points if not math.isnan(value))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the service and the load, and write the table."""
    parser = argparse.ArgumentParser(description="Record what the panels of cluster/dashboard.json show under load.")
    parser.add_argument("--prometheus", default="prometheus", metavar="FILE", help="the program (default: %(default)s)")
    parser.add_argument("--machine", required=True, help="name of this machine, for the table")
    arguments = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory() as folder,
        service("small", **SCALING) as (url, _),
        prometheus(arguments.prometheus, Path(folder)) as monitor,
    ):
        start = time.time()
        for clients, seconds in LOADS:
            ask(url, clients, seconds)
        end, names = time.time(), dict[str, str]()
        panels = json.loads(DASHBOARD.read_text())["panels"]
        rows = [row for panel in panels for row in panel_rows(monitor, panel, start, end, names)]
    with TABLE.open("w", newline="") as file:
        file.write(ABOUT.format(machine=arguments.machine, date=time.strftime("%Y-%m-%d")))
        csv.writer(file, lineterminator="\n").writerows([("panel", "series", "second", "value"), *rows])


if __name__ == "__main__":
    main()
