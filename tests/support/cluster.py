"""A Ray cluster of one node on private ports, and jobs sent to it from a checkout of their own by the Jobs API."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
START_S, JOB_S = 240, 900
CPUS = 8
"""Counted, not there: two trainings at a time must find room for their loaders."""


@dataclass(frozen=True)
class Cluster:
    """The address of a cluster's dashboard, the environment that its clients need, and its folder."""

    dashboard: str
    environment: dict[str, str]
    folder: Path

    @property
    def logs(self) -> Path:
        """Return the logs of drivers, workers and Ray's own processes."""
        return (self.folder / "session_latest").resolve() / "logs"

    def jobs(self) -> list[dict]:
        """Return what the cluster reports of all its jobs."""
        with urllib.request.urlopen(self._asked(), timeout=60) as response:
            return json.load(response)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self._asked(), timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _asked(self) -> urllib.request.Request:
        token = self.environment.get("RAY_AUTH_TOKEN", "")
        return urllib.request.Request(f"{self.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})


@contextlib.contextmanager
def head(authentication: dict[str, str]) -> Iterator[Cluster]:
    """Run a head node on private ports until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's socket files lie below it
    gcs, dashboard, *agent = free_ports(6)
    names = (
        "ray-client-server-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
    )
    ports = {"port": gcs, "dashboard-port": dashboard, **dict(zip(names, agent, strict=True))}
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        f"--num-cpus={CPUS}",
        f"--object-store-memory={256 * 2**20}",
    ]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **inherited,
        **authentication,
        "HF_HUB_OFFLINE": "1",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_S),
    }
    cluster = Cluster(f"http://127.0.0.1:{dashboard}", environment, folder)
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    try:
        deadline = time.monotonic() + START_S
        while not cluster.answers():
            if time.monotonic() > deadline or process.poll() is not None:
                pytest.fail(f"the cluster did not start: {(folder / 'head.log').read_text()}")
            time.sleep(0.3)
        yield cluster
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


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


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the head's own processes: `ray stop` would end every Ray of this machine."""
    head.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=30)


@dataclass(frozen=True)
class Checkout:
    """The code of this one in a folder whose name gives away whatever carries it along."""

    folder: Path

    @classmethod
    def copied(cls, folder: Path) -> "Checkout":
        folder.mkdir()
        for name in ("graft", "jobs", "serve"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        return cls(folder)

    def submit(self, cluster: Cluster, *arguments: str, env: Sequence[str] = ()) -> tuple[int, str]:
        """Run a job by jobs.submit from another folder than the checkout; returns the exit code and the output."""
        variables = [f"--env={one}" for one in env]
        command = [sys.executable, "-m", "jobs.submit", "--address", cluster.dashboard, *variables, *arguments]
        return _run(command, cwd="/", environment={**cluster.environment, "PYTHONPATH": str(self.folder)})

    def ray_job_submit(self, cluster: Cluster, verb: str, *arguments: str, env: Sequence[str] = ()) -> tuple[int, str]:
        """Run a job as the documents say, in the checkout."""
        variables = json.dumps({"env_vars": dict(one.split("=", 1) for one in env)})
        command = [
            RAY,
            "job",
            "submit",
            "--address",
            cluster.dashboard,
            "--runtime-env-json",
            variables,
            "--working-dir",
            ".",
            "--",
        ]
        return _run(
            [*command, "python", "-m", f"jobs.{verb}", *arguments], cwd=self.folder, environment=cluster.environment
        )

    def is_named_in(self, folder: Path) -> list[str]:
        """The files below a folder that name this one."""
        files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        return [str(path) for path in files if str(self.folder).encode() in path.read_bytes()]


def _run(command: list[str], *, cwd: str | Path, environment: dict[str, str]) -> tuple[int, str]:
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=JOB_S)
    return result.returncode, result.stdout + result.stderr
