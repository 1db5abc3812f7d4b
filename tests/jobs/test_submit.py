"""Tests of jobs.submit on a real cluster: exit codes, authentication, and results equal to those of a local run."""

import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from graft.inference.transcriber import open_transcriber
from tests.support import tiny_models
from tests.support.cluster import JOB_S, RAY, Checkout, Cluster, head
from tests.support.media import PROMPTS
from tests.support.speech_corpus import corpus, row

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}) as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout.copied(tmp_path_factory.mktemp("from") / "the submitter's checkout")


def test_a_submitted_job_does_the_same_as_a_local_one(cluster: Cluster, checkout: Checkout, tmp_path: Path) -> None:
    graft = tiny_models.save_tiny_graft(tmp_path / "graft")
    audio = tmp_path / "audio"
    audio.mkdir()
    for seed in range(3):
        shutil.copy(PROMPTS[seed], audio / f"{seed}.flac")
    (audio / "broken.flac").write_bytes(b"no audio")
    good = ["transcribe", f"model={graft}", f"audio={audio}", f"out={tmp_path / 'out'}", "strict=true"]
    bad = ["transcribe", f"model={tmp_path / 'nothing'}", f"audio={audio}", f"out={tmp_path / 'bad'}"]
    with ThreadPoolExecutor(2) as pool:
        (code, output), (bad_code, bad_output) = pool.map(
            lambda arguments: checkout.submit(cluster, *arguments), [good, bad]
        )

    assert code == 3, output  # one recording failed
    transcriber = open_transcriber(graft)
    texts = {seed: transcriber.transcribe(audio / f"{seed}.flac").text for seed in range(3)}
    transcriber.close()
    for seed, text in texts.items():
        assert (tmp_path / "out" / "files" / f"{seed}.flac.txt").read_bytes().decode() == text + "\n"
    assert "3 recordings done, 1 failed" in output

    assert bad_code == 2, bad_output
    assert re.search(r"^graft: error: no such file or folder: model=\S*nothing", bad_output, re.MULTILINE)
    assert "Traceback" not in bad_output
    assert not (tmp_path / "bad").exists()


def test_without_a_token_a_cluster_is_as_closed_as_with_a_wrong_one(cluster: Cluster, checkout: Checkout) -> None:
    before = len(cluster.jobs())
    without = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_TOKEN"}
    for changes in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}):
        stranger = replace(cluster, environment=without | changes)
        code, output = checkout.submit(stranger, "build", "out=nowhere")
        assert code == 2, output
        assert "Traceback" not in output
    assert len(cluster.jobs()) == before


def test_a_stopped_job_saves_first(cluster: Cluster, checkout: Checkout, tmp_path: Path) -> None:
    graft = tiny_models.save_tiny_graft(tmp_path / "graft")
    data = corpus(tmp_path / "train.parquet", [row(f"t{seed}", seed) for seed in range(24)])
    stage1 = [
        "stage1",
        f"model={graft}",
        f"data={data}",
        f"out={tmp_path / 'out'}",
        "epochs=200",
        "token_budget=300",
        "dtype=fp32",
    ]
    stage1 += ["backend=torch", "data_workers=1", "log_every=1", "checkpoint_every=1000"]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(checkout.submit, cluster, *stage1)
        metrics = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + JOB_S
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
            assert time.monotonic() < deadline
            assert not job.done(), job.result()
            time.sleep(0.2)
        (name,) = [one["submission_id"] for one in cluster.jobs() if one["status"] == "RUNNING"]
        subprocess.run(
            [RAY, "job", "stop", "--no-wait", "--address", cluster.dashboard, name], env=cluster.environment, check=True
        )
        code, output = job.result()
    assert code == 143, output
    assert list((tmp_path / "out" / "checkpoints").iterdir())


def test_without_authentication_jobs_run_too(checkout: Checkout, tmp_path: Path) -> None:
    bases = tiny_models.save_audio_base(tmp_path / "audio"), tiny_models.save_text_base(tmp_path / "text")
    with head({"RAY_AUTH_MODE": "disabled"}) as cluster:
        code, output = checkout.submit(
            cluster, "build", f"audio_base={bases[0]}", f"text_base={bases[1]}", f"out={tmp_path / 'graft'}"
        )
        assert code == 0, output
        assert checkout.submit(cluster, "stage1", "nonsense=1")[0] == 2
        code, output = checkout.ray_job_submit(cluster, "stage1", "nonsense=1")
        assert code == 1, output  # all that it knows
        assert sorted(job["driver_exit_code"] for job in cluster.jobs()) == [0, 2, 2]
