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


def series(
    url: str, panel: dict[str, Any], start: float, end: float
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Evaluate the queries of a panel; yields the name of each series, and its seconds and values."""
    for target in panel["targets"]:
        query = target["expr"].replace("$application", ".*").replace("$__rate_interval", f"{10 * SCRAPE_S}s")
        asked = {"query": query, "start": start, "end": end, "step": STEP_S}
        answer = requests.get(f"{url}/api/v1/query_range", params=asked, timeout=60)
        answer.raise_for_status()
        for result in answer.json()["data"]["result"]:
            name = target["legendFormat"]
            for label in re.findall(r"{{(\w+)}}", name):
                name = name.replace(f"{{{{{label}}}}}", result["metric"].get(label, ""))
            points = [(at - start, float(value)) for at, value in result["values"]]
            yield name, [(second, value) for second, value in points if value == value]  # not NaN


def main(argv: Sequence[str] | None = None) -> None:
    """Run the service and the load, and write the table."""
    parser = argparse.ArgumentParser(description="Record what the panels of cluster/dashboard.json show under load.")
    parser.add_argument("--prometheus", default="prometheus", metavar="FILE", help="the program (default: %(default)s)")
    parser.add_argument("--machine", required=True, help="name of this machine, for the table")
    arguments = parser.parse_args(argv)
    board = json.loads(DASHBOARD.read_text())
    with (
        tempfile.TemporaryDirectory() as folder,
        service("small", **SCALING) as (url, _),
        prometheus(arguments.prometheus, Path(folder)) as monitor,
        TABLE.open("w", newline="") as file,
    ):
        start = time.time()
        for clients, seconds in LOADS:
            ask(url, clients, seconds)
        end = time.time()
        file.write(ABOUT.format(machine=arguments.machine, date=time.strftime("%Y-%m-%d")))
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("panel", "series", "second", "value"))
        replicas: dict[str, str] = {}
        for panel in board["panels"]:
            for name, points in series(monitor, panel, start, end):
                kind = name.partition("#")[0] if "#" in name else ""
                if kind:
                    count = sum(short.startswith(kind) for short in replicas.values())
                    name = replicas.setdefault(name, f"{kind} {count + 1}")
                table.writerows((panel["title"], name, round(second), f"{value:.4g}") for second, value in points)


if __name__ == "__main__":
    main()
