"""Nodes of a cluster die and others join during training, transcription and service; only time is lost.

The cluster has a CPU node for features and device nodes for trainers; a custom resource stands for the device. A
table of the faults and of what was lost is printed at the end.
"""

import itertools
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import requests

from jobs import stage1, stage2, transcribe
from jobs.common.cluster import connect
from jobs.common.local_service import free_port
from tests.support import media, tiny_models
from tests.support.faults import (
    LOADING,
    TRAINING,
    Folder,
    Machines,
    is_as,
    machines,
    meanwhile,
    processes,
    resumption,
    until,
)
from tests.support.ray_service import APP, REQUEST_TIMEOUT_S, speech_flac
from tests.support.speech_corpus import corpus, row

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200), pytest.mark.ray]

CLIPS, RECORDINGS, REQUESTS = 33, 60, 40

Faults = list[tuple[str, str, str]]
"""Each fault, the job during which it happened, and what was lost."""


@pytest.fixture(scope="module")
def faults(pytestconfig: pytest.Config) -> Iterator[Faults]:
    injected: Faults = []
    yield injected
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for fault, under, lost in [("fault", "under", "lost"), *injected]:
            print(f"{fault:48}{under:16}{lost}")


@dataclass(frozen=True)
class Nodes:
    """A cluster with a node for features and two nodes with one device each."""

    machines: Machines
    features: Any

    def add_device(self) -> Any:
        return self.machines.add(cpus=1, device=1)

    def running(self, title: str) -> list[Any]:
        """Return the nodes on which processes with a title run."""
        return [self.machines.node_of(process) for process in processes(title)]

    def replace(self, title: str) -> None:
        """Kill the node of a process, and add another."""
        until(lambda: bool(processes(title)))
        self.machines.kill(self.running(title)[0])
        self.add_device()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with machines(0) as own:
        nodes = Nodes(own, own.add(cpus=4, features=100))
        for _ in range(2):
            nodes.add_device()
        yield nodes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    corpus(folder / "train.parquet", [row(f"t{seed}", seed) for seed in range(CLIPS)])
    tiny_models.save_tiny_graft(folder / "graft")
    return folder


def recipe(kind: type, home: Path, out: str, **changed: Any) -> Any:
    settings = {
        "model": str(home / "graft"),
        "data": [str(home / "train.parquet")],
        "out": str(home / out),
        "epochs": 12,
    }
    settings |= {
        "token_budget": 250,
        "step_batches": 4,
        "dtype": "fp32",
        "backend": "torch",
        "workers": 2,
        "data_workers": 1,
    }
    settings |= {"log_every": 1, "checkpoint_every": 4, "device_resource": "device", "data_resource": "features"}
    return kind.model_validate(settings | changed)


STAGES = {"stage 1": (stage1, stage1.Stage1Recipe, {}), "stage 2": (stage2, stage2.Stage2Recipe, {"quantize": "none"})}


@pytest.mark.parametrize("stage", STAGES)
def test_a_device_node_dies_while_training_and_another_takes_over(
    stage: str, nodes: Nodes, home: Path, faults: Faults
) -> None:
    verb, kind, more = STAGES[stage]
    verb.run(recipe(kind, home, f"{stage} whole", **more))
    used_nodes: list[list[Any]] = []

    def note_and_kill() -> None:
        used_nodes.append([nodes.running(TRAINING), nodes.running(LOADING)])
        nodes.replace(TRAINING)

    folder, whole = Folder(home / stage), Folder(home / f"{stage} whole")
    with (
        meanwhile(lambda: folder.progress.step >= 4 and bool(processes(LOADING)), note_and_kill),
        meanwhile(
            lambda: "going on" in log_of(folder) and len(processes(TRAINING)) == 2,
            lambda: used_nodes.append([nodes.running(TRAINING)]),
        ),
    ):
        verb.run(recipe(kind, home, stage, **more))
    (trainers, loaders), (later,) = used_nodes
    assert set(loaders) == {nodes.features}
    assert nodes.features not in trainers
    assert len({id(node) for node in trainers}) == 2
    assert nodes.machines.nodes[-1] in later  # the node that was added
    is_as(folder, whole)
    resumed_at = resumption(folder).step
    faults.append(
        (
            "a device node killed, another added",
            stage,
            f"nothing; resumed at step {resumed_at} of {whole.result['steps']}",
        )
    )


def log_of(folder: Folder) -> str:
    return folder.log if (folder.path / "log.txt").is_file() else ""


def test_a_node_dies_while_an_archive_is_transcribed(nodes: Nodes, home: Path, faults: Faults) -> None:
    (home / "calls").mkdir()
    for number, path in zip(
        range(RECORDINGS), itertools.cycle(sorted(media.PROMPTS, key=lambda one: one.stat().st_size)[20:40])
    ):
        shutil.copy(path, home / "calls" / f"{number:03}.flac")

    def run(out: str) -> list[dict[str, Any]]:
        settings = {
            "model": str(home / "graft"),
            "audio": str(home / "calls"),
            "out": str(home / out),
            "items_per_batch": 3,
        }
        assert transcribe.run(transcribe.TranscribeRecipe.model_validate(settings | {"workers": 2})) == 0
        parts = sorted((home / out / "recordings").glob("*.parquet"))
        return [row for part in parts for row in pq.read_table(part, partitioning=None).to_pylist()]

    whole = run("whole")

    def some_are_done() -> bool:
        return len(list((home / "disturbed" / "work" / "done").glob("*.parquet"))) >= 3 and bool(
            processes("ItemTranscriber")
        )

    with meanwhile(some_are_done, lambda: nodes.replace("ItemTranscriber")):
        rows = run("disturbed")
    results = [[(row["id"], row["text"], row["error"]) for row in result] for result in (whole, rows)]
    assert results[0] == results[1]
    assert len(rows) == RECORDINGS
    faults.append(
        (
            "a node with a transcriber killed, another added",
            "transcription",
            f"nothing; {RECORDINGS} recordings, each once, same texts",
        )
    )


def test_a_node_dies_while_the_service_answers(nodes: Nodes, home: Path, faults: Faults) -> None:
    from ray import serve

    from serve.app import build
    from serve.config import ServeArgs

    connect()
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": REQUEST_TIMEOUT_S})
    serve.run(build(ServeArgs(model=str(home / "graft"), name="tiny-graft")), name=APP)
    try:
        audio = [speech_flac(3, first=number) for number in range(4)]
        expected = [ask(port, one)[0] for one in audio]

        def client(number: int) -> int:
            text, tries = ask(port, audio[number % 4])
            assert text == expected[number % 4]
            return tries

        with ThreadPoolExecutor(4) as pool:
            sent = [pool.submit(client, number) for number in range(REQUESTS)]
            until(lambda: sum(one.done() for one in sent) >= 4)
            nodes.replace(f"ServeReplica:{APP}:Engine")
            tries = [one.result() for one in sent]
    finally:
        serve.shutdown()
    lost = f"nothing; {REQUESTS} responses as before, {sum(tries) - REQUESTS} sent again"
    faults.append(("the engine's node killed, another added", "service", lost))


def ask(port: int, audio: bytes) -> tuple[str, int]:
    """Return the text of an upload and the number of attempts: an upload that gets an error is sent again."""
    deadline = time.monotonic() + 2 * REQUEST_TIMEOUT_S
    for tries in itertools.count(1):
        try:
            url = f"http://127.0.0.1:{port}/v1/audio/transcriptions"
            answer = requests.post(
                url, files={"file": ("a.flac", audio)}, data={"model": "tiny-graft"}, timeout=REQUEST_TIMEOUT_S
            )
            if answer.status_code == 200:
                return answer.json()["text"], tries
            assert answer.status_code in (429, 500, 503), answer.text
        except requests.ConnectionError:
            pass
        assert time.monotonic() < deadline
        time.sleep(1)
    raise AssertionError
