"""A RayJob's submitter ends well where a job fails and badly where its head dies, and Kubernetes repeats it only then.

KubeRay makes the submitter's commands. This is what `backoffLimit: 0` and `submitterConfig` of the RayJobs rest on.
"""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping

import psutil
import pytest

from tests.support.cluster import RAY, Cluster, head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SUBMITTER = """
if ! ray job status --address $ADDRESS {name} >/dev/null 2>&1
then ray job submit --address $ADDRESS --no-wait --submission-id {name} -- {entrypoint} ; fi ;
ray job logs --address $ADDRESS --follow {name}
"""
STARTED_S = 120
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}


def submitter(cluster: Cluster, name: str, entrypoint: str) -> subprocess.Popen[str]:
    """Start what KubeRay runs in the submitter's pod."""
    path = f"{os.path.dirname(RAY)}{os.pathsep}{os.environ['PATH']}"
    environment: Mapping[str, str] = {**cluster.environment, "ADDRESS": cluster.dashboard, "PATH": path}
    script = SUBMITTER.format(name=name, entrypoint=entrypoint)
    return subprocess.Popen(["bash", "-ec", script], stdout=subprocess.PIPE, text=True, env=environment)


def outcome(cluster: Cluster, name: str) -> tuple[str, int | None]:
    (job,) = (one for one in cluster.jobs() if one["submission_id"] == name)
    return job["status"], job["driver_exit_code"]


def kill_node(cluster: Cluster) -> None:
    """Kill a head with all its processes, as a lost machine does."""
    (started,) = (one for one in psutil.Process().children() if f"--temp-dir={cluster.folder}" in one.cmdline())
    for process in [started, *started.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)


def test_a_mistake_is_submitted_once_and_a_lost_head_is_followed_by_another() -> None:
    with head(TOKEN) as cluster:
        mistaken = submitter(cluster, "mistake", 'bash -ec "echo one; exit 2; echo two"')
        output, _ = mistaken.communicate(timeout=STARTED_S)
        assert mistaken.returncode == 0
        assert "one\n" in output
        assert "two\n" not in output
        assert outcome(cluster, "mistake") == ("FAILED", 2)

        following = submitter(cluster, "long", 'bash -ec "echo began; sleep 600"')
        deadline = time.monotonic() + STARTED_S
        assert following.stdout
        while "began" not in following.stdout.readline():
            assert time.monotonic() < deadline
        kill_node(cluster)
        following.communicate(timeout=STARTED_S)
        assert following.returncode == 1
    with head(TOKEN) as cluster:
        again = submitter(cluster, "long", 'bash -ec "echo began again"')
        output, _ = again.communicate(timeout=STARTED_S)
        assert again.returncode == 0
        assert "began again" in output
        assert outcome(cluster, "long") == ("SUCCEEDED", 0)
