"""The jobs, unchanged, through the Jobs API on a real cluster of its own: a head node on loopback, with a token and without one."""

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
import tiny_s3
from tiny_media import PROMPTS
from tiny_speech import corpus, flac, row, save_tiny_whisper

from graft.transcriber import load

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
START_S, JOB_S = 240, 900


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
    with head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}) as running:
        yield running


@contextlib.contextmanager
def head(authentication: dict[str, str]) -> Iterator[Cluster]:
    """Run a head node of four CPUs on private ports until the block ends."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: Ray's socket files lie below it
    gcs, dashboard, *agent = free_ports(6)
    names = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    ports = {"port": gcs, "dashboard-port": dashboard, **dict(zip(names, agent, strict=True))}
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", f"--object-store-memory={256 * 2**20}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**inherited, **authentication, "HF_HUB_OFFLINE": "1", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_S)}
    with open(Path(folder, "head.log"), "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(url, authentication.get("RAY_AUTH_TOKEN", ""), process, Path(folder, "head.log"))
        yield Cluster(url, environment)
    finally:
        stop(process)
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


def submit(cluster: Cluster, *arguments: str, env: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run a job by jobs.submit, from a folder that is not the checkout; returns the exit code and what was printed."""
    variables = [f"--env={one}" for one in ("HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=2", *env)]
    command = [sys.executable, "-m", "jobs.submit", "--address", cluster.dashboard, *variables, *arguments]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=JOB_S)
    return result.returncode, result.stdout + result.stderr


def done(cluster: Cluster, *arguments: str, env: tuple[str, ...] = ()) -> str:
    code, output = submit(cluster, *arguments, env=env)
    assert code == 0, output
    assert "Traceback" not in output
    return output


def jobs_of(cluster: Cluster) -> list[dict]:
    """What the cluster knows of all its jobs."""
    headers = {"Authorization": f"Bearer {cluster.environment.get('RAY_AUTH_TOKEN', '')}"}
    with urllib.request.urlopen(urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers=headers), timeout=60) as response:
        return json.load(response)


def test_a_submitted_job_does_the_same_as_a_local_one(cluster: Cluster, tmp_path: Path) -> None:
    graft = tiny.save_tiny_graft(tmp_path / "graft")
    audio = tmp_path / "audio"
    audio.mkdir()
    for seed in range(3):
        shutil.copy(PROMPTS[seed], audio / f"{seed}.flac")
    (audio / "broken.flac").write_bytes(b"no audio")
    good = ["transcribe", f"model={graft}", f"audio={audio}", f"out={tmp_path / 'out'}", "strict=true"]
    bad = ["transcribe", f"model={tmp_path / 'nothing'}", f"audio={audio}", f"out={tmp_path / 'bad'}"]
    with ThreadPoolExecutor(2) as pool:
        (code, output), (bad_code, bad_output) = pool.map(lambda arguments: submit(cluster, *arguments), [good, bad])

    assert code == 3, output  # one recording failed
    transcriber = load(graft)
    texts = {seed: transcriber.transcribe(audio / f"{seed}.flac").text for seed in range(3)}
    transcriber.close()
    for seed, text in texts.items():
        assert (tmp_path / "out" / "files" / f"{seed}.txt").read_bytes().decode() == text + "\n"
    assert "3 recordings done, 1 failed" in output

    assert bad_code == 2, bad_output
    assert re.search(r"^graft: error: .*nothing can't be read as a graft checkpoint", bad_output, re.MULTILINE)
    assert "Traceback" not in bad_output
    assert not (tmp_path / "bad").exists()
    for job in jobs_of(cluster):
        assert str(ROOT) not in json.dumps([job["entrypoint"], job["runtime_env"]])


def test_without_a_token_a_cluster_is_as_closed_as_with_a_wrong_one(cluster: Cluster) -> None:
    before = len(jobs_of(cluster))
    for token in ("", "another"):
        stranger = Cluster(cluster.dashboard, {**cluster.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
        if not token:
            del stranger.environment["RAY_AUTH_TOKEN"]
            stranger.environment["RAY_AUTH_MODE"] = "disabled"
        code, output = submit(stranger, "build", "out=nowhere")
        assert code == 2, output
        assert "Traceback" not in output
    assert len(jobs_of(cluster)) == before


def test_a_stopped_job_saves_first(cluster: Cluster, tmp_path: Path) -> None:
    graft, data = (
        tiny.save_tiny_graft(tmp_path / "graft"),
        corpus(tmp_path / "train.parquet", [row(f"t{seed}", seed) for seed in range(24)]),
    )
    stage1 = ["stage1", f"model={graft}", f"data={data}", f"out={tmp_path / 'out'}", "epochs=200", "token_budget=300", "dtype=fp32"]
    stage1 += ["backend=torch", "data_workers=1", "log_every=1", "checkpoint_every=1000"]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(submit, cluster, *stage1)
        metrics = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + JOB_S
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
            assert time.monotonic() < deadline
            assert not job.done(), job.result()
            time.sleep(0.2)
        (name,) = [one["submission_id"] for one in jobs_of(cluster) if one["status"] == "RUNNING"]
        subprocess.run([RAY, "job", "stop", "--no-wait", "--address", cluster.dashboard, name], env=cluster.environment, check=True)
        code, output = job.result()
    assert code == 143, output
    assert list((tmp_path / "out" / "checkpoints").iterdir())


def test_without_authentication_jobs_run_too(tmp_path: Path) -> None:
    bases = tiny.save_audio_base(tmp_path / "audio"), tiny.save_text_base(tmp_path / "text")
    with head({"RAY_AUTH_MODE": "disabled"}) as cluster:
        done(cluster, "build", f"audio_base={bases[0]}", f"text_base={bases[1]}", f"out={tmp_path / 'graft'}")
        assert submit(cluster, "stage1", "nonsense=1")[0] == 2
        plain = [
            RAY,
            "job",
            "submit",
            "--address",
            cluster.dashboard,
            "--working-dir",
            ".",
            "--",
            "python",
            "-m",
            "jobs.stage1",
            "nonsense=1",
        ]
        ended = subprocess.run(plain, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False, timeout=JOB_S)
        assert ended.returncode == 1, ended.stdout
        assert sorted(job["driver_exit_code"] for job in jobs_of(cluster)) == [0, 2, 2]


def test_jobs_follow_one_another_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "shared"
    home.mkdir()
    rows = []
    for seed in range(24):
        (home / f"{seed}.flac").write_bytes(flac(1 + seed % 3 / 4, seed))
        rows.append({"id": f"c{seed}", "audio": f"{seed}.flac", "text": f"said {seed}", "speaker": f"s{seed % 6}"})
    (home / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    graft, whisper = tiny.save_tiny_graft(home / "graft"), save_tiny_whisper(home / "whisper")
    train = ["epochs=1", "token_budget=300", "dtype=fp32", "backend=torch", "data_workers=1", "log_every=1", "learning_rate=1e-3"]

    done(cluster, "prepare", f"sources=[{home}/rows.jsonl]", f"out={home}/data", "splits={train: 0.5, dev: 0.5}")
    data = f"{home}/data/train"
    with tiny_s3.serve(home / "data" / "train", "clips/train") as address:  # the data of stage 1 come from a bucket
        keys = ("AWS_ACCESS_KEY_ID=key", "AWS_SECRET_ACCESS_KEY=secret", "AWS_EC2_METADATA_DISABLED=true")
        bucket = f"s3://clips/train?scheme=http&endpoint_override={address}&region=us-east-1"
        done(cluster, "stage1", f"model={graft}", f"data='{bucket}'", f"out={home}/stage1", "workers=2", *train, env=keys)
    done(cluster, "stage2", f"model={graft}", f"projector={home}/stage1", f"data={data}", f"out={home}/stage2", "quantize=none", *train)
    done(cluster, "check", f"model={home}/stage2", f"data={home}/data/dev", "clips=2")
    done(cluster, "merge", f"model={home}/stage2", f"out={home}/merged")
    done(cluster, "evaluate", f"model={home}/merged", f"data.dev={home}/data/dev", f"out={home}/evaluation", "baseline=", "limit=3")
    done(cluster, "export", f"model={home}/stage2", f"out={home}/exported")
    done(cluster, "label", f"data={data}", f"out={home}/labels", f"model={whisper}")
    done(cluster, "bench", "features", "--seconds", "5")
    for name in ("stage1/result.json", "stage2/result.json", "merged/model.safetensors", "evaluation", "exported", "labels/texts.parquet"):
        assert (home / name).exists(), name
