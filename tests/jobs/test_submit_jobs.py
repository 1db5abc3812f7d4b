"""Tests that every command can be sent to a cluster by `ray job submit`, as the documents do, on tiny bases.

Three rows of jobs share the cluster at once. What they leave lies on a shared path, some of what they read in a bucket.
"""

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from graft.checkpoints.loading import open_graft, write_stage
from jobs import COMMANDS, build, export
from tests.support import s3, tiny_models
from tests.support.adapters import save_projector
from tests.support.cluster import Checkout, Cluster, head
from tests.support.media import PROMPTS
from tests.support.speech_corpus import corpus, flac, row, save_tiny_whisper

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

TRAIN = {"epochs": 1, "token_budget": 300, "dtype": "fp32", "backend": "torch", "data_workers": 1, "log_every": 1}
KEYS = ("AWS_ACCESS_KEY_ID=key", "AWS_SECRET_ACCESS_KEY=secret", "AWS_EC2_METADATA_DISABLED=true")
PROGRESS_BAR = re.compile(r"\d+%\|")


def verbs() -> set[str]:
    """Name the commands that work on a cluster: all but the service and two that stay here."""
    return {command for group in COMMANDS.values() for command in group} - {"serve", "submit", "schema"}


@dataclass(frozen=True)
class Sender:
    """Sends jobs by `ray job submit`; each must end with 0, leave a file and print a summary."""

    cluster: Cluster
    checkout: Checkout
    home: Path

    def __call__(self, verb: str, *arguments: str, leaves: str, says: str) -> None:
        code, output = self.checkout.ray_job_submit(self.cluster, verb, *arguments, env=KEYS)
        assert code == 0, output
        assert says in output, output
        assert "Traceback" not in output
        assert not PROGRESS_BAR.search(output), output
        assert (self.home / leaves).exists(), leaves


@pytest.fixture(scope="module")
def send(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    checkout = Checkout.copied(tmp_path_factory.mktemp("from") / "the submitter's checkout")
    with head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}) as cluster:
        yield Sender(cluster, checkout, tmp_path_factory.mktemp("shared"))


@pytest.mark.bundled
def test_every_job_can_be_sent_to_a_cluster(send: Sender) -> None:
    home = send.home
    bases = {
        "audio_base": tiny_models.save_audio_base(home / "whisper"),
        "text_base": tiny_models.save_text_base(home / "qwen"),
    }
    # The demonstration compares with NF4, as save_tiny_graft says.
    pretrained = save_pretrained(
        home / "shown", bases | {"text_base": tiny_models.save_text_base(home / "wide", width=64)}
    )
    (home / "bucket" / "calls").mkdir(parents=True)
    for path in PROMPTS[:3]:
        shutil.copy(path, home / "bucket" / "calls")
    corpus(home / "bucket" / "train.parquet", [row(f"t{seed}", seed) for seed in range(16)])
    with s3.serve(home / "bucket", "bucket/folder") as address, ThreadPoolExecutor(3) as pool:
        uri = f"s3://bucket/folder/{{}}?scheme=http&endpoint_override={address}&region=us-east-1"
        working = [
            pool.submit(train_and_score, send, bases, uri.format("train.parquet")),
            pool.submit(work_with_what_is_there, send, bases, uri.format("calls")),
            pool.submit(show, send, pretrained),
        ]
        for one in working:
            one.result()

    jobs = send.cluster.jobs()
    assert {re.sub(r".*-m jobs\.(\w+).*", r"\1", job["entrypoint"]) for job in jobs} == verbs()
    assert str(send.checkout.folder) not in json.dumps(jobs)
    assert send.checkout.is_named_in(home) == []
    assert send.checkout.is_named_in(send.cluster.logs) == []


def save_pretrained(folder: Path, bases: dict[str, str]) -> Path:
    """Write the trained part of a tiny graft, which names its bases by path: a shorter name would mean a hub id."""
    build.run(build.BuildRecipe(**bases, out=str(folder / "graft"), audio_pool=4))
    (folder / "stage1").mkdir()
    save_projector(open_graft(folder / "graft")[0], folder / "stage1")
    write_stage(folder / "stage1", stage=1, graft=folder / "graft", words=None)
    export.run(export.ExportRecipe(model=str(folder / "stage1"), out=str(folder / "exported")))
    settings = folder / "exported" / "pretrained.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | bases))
    return folder / "exported"


def train_and_score(send: Sender, bases: dict[str, str], in_a_bucket: str) -> None:
    home = send.home
    rows = []
    for seed in range(24):
        (home / f"{seed}.flac").write_bytes(flac(1 + seed % 3 / 4, seed))
        rows.append({"id": f"c{seed}", "audio": f"{seed}.flac", "text": f"said {seed}", "speaker": f"s{seed % 6}"})
    (home / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    train = [f"model={home}/graft", *(f"{key}={value}" for key, value in TRAIN.items())]

    parts = "splits={train: 0.5, dev: 0.5}"
    send(
        "prepare",
        f"sources=[{home}/rows.jsonl]",
        f"out={home}/data",
        parts,
        leaves="data/train",
        says="dropped rows in",
    )
    send(
        "build",
        *(f"{key}={value}" for key, value in bases.items()),
        f"out={home}/graft",
        leaves="graft/config.json",
        says="build: ",
    )
    send(
        "stage1",
        *train,
        f"data={in_a_bucket}",
        "workers=2",
        f"out={home}/stage1",
        leaves="stage1/result.json",
        says="stage 1: loss",
    )
    second = [f"projector={home}/stage1", f"data={home}/data/train", "quantize=none"]
    send("stage2", *train, *second, f"out={home}/stage2", leaves="stage2/result.json", says="stage 2: loss")
    send("check", f"model={home}/stage2", f"data={home}/data/dev", "clips=2", leaves="stage2", says="stage2 hears")
    send("merge", f"model={home}/stage2", f"out={home}/merged", leaves="merged/model.safetensors", says="merge: ")
    scored = [f"model={home}/merged", f"data.dev={home}/data/dev", "baseline=", "limit=3"]
    send("evaluate", *scored, f"out={home}/evaluation", leaves="evaluation/report.json", says="WER")
    send("export", f"model={home}/stage2", f"out={home}/exported", leaves="exported/pretrained.json", says="export: ")


def work_with_what_is_there(send: Sender, bases: dict[str, str], in_a_bucket: str) -> None:
    home, graft, whisper = (
        send.home,
        tiny_models.save_tiny_graft(send.home / "tiny"),
        save_tiny_whisper(send.home / "listener"),
    )
    data = corpus(
        home / "clips.parquet", [row(f"t{seed}", seed, text="" if seed % 2 else "ONE TWO") for seed in range(8)]
    )
    audio = [f"audio={in_a_bucket}", f"out={home}/transcripts", f"model={graft}"]
    send("transcribe", *audio, leaves="transcripts/recordings", says="3 recordings done")
    hears = [f"data={data}", f"model={whisper}"]
    send("label", *hears, f"out={home}/labels", leaves="labels/texts.parquet", says="label: ")
    send("format", *hears, f"out={home}/formatted", leaves="formatted/texts.parquet", says="format: ")
    send("bench", "features", "--seconds", "5", "--json", f"{home}/features.json", leaves="features.json", says="graft")

    clips = corpus(home / "ablated.parquet", [row(f"a{seed}", seed) for seed in range(8)])
    training = TRAIN | {"token_budget": 4000, "max_batch_clips": 4}
    base = {"build": bases, "stage1": training, "stage2": training | {"quantize": "none"}}
    (home / "ablation.yaml").write_text(
        yaml.safe_dump({"base": base, "scoring": {"limit": 2}, "evaluate": {"test": clips}})
    )
    ablation = ["--recipe", f"{home}/ablation.yaml", f"data={clips}", f"out={home}/ablation"]
    send("ablate", *ablation, leaves="ablation/ablation.md", says="| base-0 | - |")


def show(send: Sender, pretrained: Path) -> None:
    """The demo runs on the trained part of a tiny graft."""
    trained = [f"pretrained={pretrained}", "stage1_epochs=1", "stage2_epochs=1", "workers=1", "scored_clips=1"]
    send("demo", *trained, f"out={send.home}/demo", leaves="demo/summary.json", says="== results")
