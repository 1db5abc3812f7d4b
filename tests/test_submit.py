"""A job, unchanged, through `ray job submit` on a real cluster of its own: a head node with token authentication, on loopback."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from tiny_media import PROMPTS

from graft.transcriber import load

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
START_S = 90


@dataclass(frozen=True)
class Cluster:
    """Where the cluster's dashboard answers, and the environment that its clients need."""

    dashboard: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray")  # short: Ray's socket files lie below it
    gcs, dashboard, *agent = free_ports(6)
    names = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    ports = {"port": gcs, "dashboard-port": dashboard, **dict(zip(names, agent, strict=True))}
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", f"--object-store-memory={256 * 2**20}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**inherited, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "HF_HUB_OFFLINE": "1"}
    with open(Path(folder, "head.log"), "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(url, environment["RAY_AUTH_TOKEN"], head, Path(folder, "head.log"))
        yield Cluster(url, environment)
    finally:
        stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"the cluster did not start: {log.read_text()}")


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the head's own processes: `ray stop` would end every Ray of this machine."""
    head.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=30)


def submit(cluster: Cluster, arguments: list[str]) -> tuple[int, str, dict[str, object]]:
    """Submit a job and wait for it: exit status of `ray job submit`, what was printed, and the cluster's record of the job."""
    name = f"graft-{secrets.token_hex(4)}"
    runtime = json.dumps({"env_vars": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}})
    command = [RAY, "job", "submit", "--address", cluster.dashboard, "--submission-id", name, "--working-dir", "."]
    command += ["--runtime-env-json", runtime, "--", "python", "-m", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=240)
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(f"{cluster.dashboard}/api/jobs/{name}", headers=headers), timeout=30) as response:
        return result.returncode, result.stdout + result.stderr, json.load(response)


@pytest.mark.timeout(600)
def test_a_submitted_job_does_the_same_as_a_local_one(cluster: Cluster, tmp_path: Path) -> None:
    graft = tiny.save_tiny_graft(tmp_path / "graft")
    audio = tmp_path / "audio"
    audio.mkdir()
    for seed in range(3):
        shutil.copy(PROMPTS[seed], audio / f"{seed}.flac")
    good = ["jobs.transcribe", f"model={graft}", f"audio={audio}", f"out={tmp_path / 'out'}"]
    bad = ["jobs.transcribe", f"model={tmp_path / 'nothing'}", f"audio={audio}", f"out={tmp_path / 'bad'}"]
    with ThreadPoolExecutor(2) as pool:
        (code, output, details), (bad_code, bad_output, bad_details) = pool.map(lambda a: submit(cluster, a), [good, bad])

    assert (code, details["status"], details["driver_exit_code"]) == (0, "SUCCEEDED", 0), output
    transcriber = load(graft)
    texts = {seed: transcriber.transcribe(audio / f"{seed}.flac").text for seed in range(3)}
    transcriber.close()
    for seed, text in texts.items():
        assert (tmp_path / "out" / "files" / f"{seed}.txt").read_bytes().decode() == text + "\n"
    assert "3 recordings done, 0 failed" in output
    assert not (tmp_path / "out" / "errors.jsonl").read_text()

    assert (bad_code, bad_details["status"], bad_details["driver_exit_code"]) == (1, "FAILED", 2), bad_output
    assert re.search(r"^graft: error: .*nothing can't be read as a graft checkpoint", bad_output, re.MULTILINE)
    assert "Traceback" not in bad_output
    assert not (tmp_path / "bad").exists()
