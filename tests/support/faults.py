"""Start a small Ray cluster whose processes can be killed while a job runs, and compare what its runs leave."""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from graft.training.progress import Progress, latest_checkpoint, read_progress
from jobs.training.observer import CHECKPOINTS
from tests.support.hub_server import Hub

DEADLINE_S = 240
TRAINING = "ray::RayTrainWorker"
READING, LOADING = "ReadWindows", "LoadBatches"


@dataclass
class Machines:
    """A Ray cluster: a head without CPUs, on which drivers and what steers them run, and nodes."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    def add(self, *, cpus: int = 2, **resources: float) -> Any:
        # Only the main thread may set the signal handlers by which a node ends with this process. The cluster's end
        # ends the node anyway.
        self.cluster._shutdown_at_exit = threading.current_thread() is threading.main_thread()
        self.nodes.append(self.cluster.add_node(num_cpus=cpus, resources=resources, object_store_memory=256 * 2**20))
        return self.nodes[-1]

    def node_of(self, process: psutil.Process) -> Any:
        """The node whose raylet started a process."""
        return next(node for node in self.nodes if node.all_processes["raylet"][0].process.pid == process.ppid())

    def kill(self, node: Any) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def machines(node_count: int) -> Iterator[Machines]:
    """Run a cluster until the block ends; jobs join it by RAY_ADDRESS."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # of a module before this one
    # Ray Train asks the dashboard whether its controller lives; without a dashboard it would ask another Ray on this
    # machine. With port None the dashboard takes a free port.
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": None, "object_store_memory": 256 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    own, before = Machines(cluster), os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        for _ in range(node_count):
            own.add()
        yield own
    finally:
        os.environ.pop("RAY_ADDRESS")
        os.environ |= {"RAY_ADDRESS": before} if before else {}
        ray.shutdown()
        cluster.shutdown()


def processes(title: str) -> list[psutil.Process]:
    """Return the processes with a title among those of the Rays that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def until(condition: Callable[[], bool], *, over: threading.Event | None = None) -> None:
    """Wait for a condition; it is an error if the run is over before."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        assert over is None or not over.is_set()
        time.sleep(0.02)


@contextlib.contextmanager
def meanwhile(condition: Callable[[], bool], act: Callable[[], Any]) -> Iterator[None]:
    """Wait for a condition and act, while the block runs; both must have happened before its end."""
    over = threading.Event()

    def run() -> None:
        until(condition, over=over)
        act()

    with ThreadPoolExecutor(max_workers=1) as pool:
        acting = pool.submit(run)
        try:
            yield
        finally:
            over.set()
            acting.result()


@dataclass(frozen=True)
class Folder:
    """A run's output folder."""

    path: Path

    @property
    def progress(self) -> Progress:
        """Return the position of the newest checkpoint."""
        while True:
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                return read_progress(latest_checkpoint(self.path / CHECKPOINTS))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.path / "result.json").read_text())

    @property
    def log(self) -> str:
        return (self.path / "log.txt").read_text()


@dataclass(frozen=True)
class Served:
    """A corpus file on a hub that remembers what was read of it."""

    hub: Hub
    name: str

    @property
    def url(self) -> str:
        return f"{self.hub.url}/files/{self.name}"

    def groups_read(self) -> list[int]:
        """The row groups of which audio was read, in order."""
        path = self.hub.folder / self.name
        metadata, size = pq.read_metadata(path), path.stat().st_size
        audio = []
        for group in range(metadata.num_row_groups):
            columns = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
            (column,) = (column for column in columns if column.path_in_schema == "wav.bytes")
            audio.append(column.dictionary_page_offset or column.data_page_offset)
        sent = [
            (start, end) for name, start, end in list(self.hub.sent) if name == self.name and end < size
        ]  # up to the end: its footer
        return [group for start, end in sent for group, offset in enumerate(audio) if start <= offset < end]


def resumption(folder: Folder) -> Progress:
    """Return the position at which the log says that the run resumed, which it did once."""
    ((step, position),) = re.findall(r"^going on at step (\d+), batch (\d+) of the plan$", folder.log, re.MULTILINE)
    return Progress(step=int(step), position=int(position))


def is_as(folder: Folder, expected: Folder) -> None:
    """The run has taken every step once, on the same clips, and ends with the same weights."""
    for key in ("step", "loss", "learning_rate", "grad_norm"):
        assert [line[key] for line in folder.metrics] == pytest.approx(
            [line[key] for line in expected.metrics], rel=1e-5, abs=1e-6
        ), key
    ends = [load_file(one.path / "projector.safetensors") for one in (folder, expected)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    for key in ("steps", "clips", "audio_s", "loss_first", "loss_last"):
        assert folder.result[key] == pytest.approx(expected.result[key], rel=1e-5), key
    assert not {"ray", "stop", "fault.json"} & {path.name for path in folder.path.iterdir()}
    kept = [sorted(path.name for path in (one.path / CHECKPOINTS).iterdir()) for one in (folder, expected)]
    assert kept[0] == kept[1], "other checkpoints stay, from which more epochs go on"
