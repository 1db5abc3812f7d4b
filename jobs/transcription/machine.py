"""Choose the processes of a run, where its recipe says `auto`, by what the machine or the cluster has.

GPUs     one worker for each, and a reader on every CPU that is left
no GPUs  one worker and one reader on each machine; the worker has as many threads as other CPUs are left
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Literal

from graft.checkpoints.names import INT8

from ..common.cluster import connect
from . import Auto
from .pipeline import Workers

MOST_THREADS = 16
"""Most threads that are chosen for a worker: more hardly make it faster."""
RAYS_CPUS = 2
"""CPUs of a cluster that are left to Ray's own tasks: reading the plan and writing results."""


@dataclass(frozen=True)
class Machine:
    """What there is to run on: the CPUs of each node, and all GPUs together."""

    node_cpus: tuple[int, ...]
    gpus: float = 0.0

    def __str__(self) -> str:
        counts = [(sum(self.node_cpus), "CPU"), (round(self.gpus), "GPU"), (len(self.node_cpus), "machine")]
        return ", ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts if count)


@dataclass(frozen=True)
class AskedWorkers:
    """The processes that a recipe asks for; `auto` leaves a number to `choose`."""

    readers: int | Auto
    transcribers: int | Auto
    threads: int | Auto
    gpus: float | Auto
    """GPUs of a worker."""
    items_per_batch: int
    dtype: str | None = None
    """Precision of the model's weights, which may be for CPUs alone."""

    def check(self, *, engine: Literal["transformers", "vllm"] = "transformers") -> None:
        """Raise ModelError where the precision does not go with a GPU or with the engine."""
        if self.dtype == INT8:
            from graft.inference.int8 import check_int8

            check_int8("cpu" if self.gpus in (0, "auto") else "cuda", engine=engine)

    def choose(self, machine: Machine) -> Workers:
        """Return the processes on a machine or cluster; numbers that the recipe gives stay as they are."""
        there = 0 if self.dtype == INT8 else machine.gpus
        gpus = self._gpu_share(there) if self.gpus == "auto" else float(self.gpus)
        # Without GPUs, nodes that are much smaller than others, such as a head, have no worker.
        nodes = [cpus for cpus in machine.node_cpus if 2 * cpus >= max(machine.node_cpus)]
        if self.transcribers != "auto":
            transcribers = self.transcribers
        elif gpus:
            transcribers = max(1, math.floor(machine.gpus / gpus + 1e-6))
        else:
            transcribers = sum(max(1, math.ceil((cpus - 1) / MOST_THREADS)) for cpus in nodes)
        if self.threads != "auto":
            threads = self.threads
        elif gpus:
            threads = 1
        else:
            readers_of_node = 1 if self.readers == "auto" else math.ceil(self.readers / len(nodes))
            free = (min(nodes) - readers_of_node) // math.ceil(transcribers / len(nodes))
            threads = max(1, min(MOST_THREADS, free))
        left = sum(machine.node_cpus) - transcribers * threads
        readers = self.readers if self.readers != "auto" else max(1, left)
        return Workers(readers, transcribers, threads, gpus, self.items_per_batch)

    def _gpu_share(self, gpus: float) -> float:
        """Return the GPUs of a worker: one, a part of one where there are more workers than GPUs, or none."""
        if not gpus:
            return 0
        return 1 if self.transcribers == "auto" else 1 / math.ceil(self.transcribers / gpus)


def connect_workers(asked: AskedWorkers, *, trains: bool = True) -> Workers:
    """Join the Ray cluster, or start a local Ray, choose the processes by what it has, and print the choice.

    `trains` says whether this process may train later.
    """
    # A local Ray must count as many CPUs as all that is chosen takes.
    connect(cpus=max(asked.choose(this_machine(gpus=gpus)).cpus for gpus in (0, 1)) + RAYS_CPUS, trains=trains)
    machine, cpus = cluster_machine(), cluster_cpus()
    workers = leave_room(asked.choose(machine), cpus, may_wait=asked.transcribers != "auto")
    print(f"graft: {describe(workers, machine)}", flush=True)
    if workers.cpus * workers.logical_cpu > cpus - 1 + 1e-6:
        print(
            f"graft: the cluster has {cpus:g} CPUs, and these processes and Ray's own tasks take {workers.cpus + 1}: "
            "the run may wait for more",
            flush=True,
        )
    return workers


def leave_room(workers: Workers, cpus: float, *, may_wait: bool) -> Workers:
    """Return the processes of a cluster with so many CPUs such that one is left to Ray's own tasks, which take turns.

    Where they would take it, all reserve less. Where they `may_wait`, more than there are now stay as they are: a
    cluster may grow.
    """
    takes_all = cpus - 1 < workers.cpus <= (cpus if may_wait else math.inf)
    return replace(workers, logical_cpu=(cpus - 1) / workers.cpus) if takes_all and cpus > 1 else workers


def this_machine(*, gpus: int | None = None) -> Machine:
    """Return what this process may use; `gpus` is the number of GPUs where torch is not to be asked for it."""
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    return Machine((_own_cpus(),), gpus)


def cluster_machine() -> Machine:
    """Return what the Ray cluster has that this process is connected to."""
    import ray

    own, here = _own_cpus(), ray.util.get_node_ip_address()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    # A local Ray counts more CPUs than this machine has, for tasks that mostly wait.
    cpus = sorted(
        min(int(node["Resources"]["CPU"]), own if node["NodeManagerAddress"] == here else 2**20) for node in nodes
    ) or [1]
    unreal = sum(int(node["Resources"]["CPU"]) for node in nodes) - sum(cpus)
    cpus[-1] = max(1, cpus[-1] - max(0, RAYS_CPUS - unreal))
    return Machine(tuple(cpus), sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]))


def cluster_cpus() -> float:
    """Count the CPUs that the cluster's nodes have by their own account."""
    import ray

    return float(sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))


def _own_cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(workers: Workers, machine: Machine) -> str:
    """Say in one line which processes a run has."""
    device = f"gpus_per_worker={workers.gpus_per_transcriber:g}" if workers.gpus_per_transcriber else "on the CPU"
    counts = f"workers={workers.transcribers} threads={workers.cpus_per_transcriber} readers={workers.readers}"
    return f"{counts}, {device} (of {machine})"


def describe_one(workers: Workers) -> str:
    """Say on what a single worker runs."""
    threads = workers.cpus_per_transcriber
    return "on a GPU" if workers.gpus_per_transcriber else f"on the CPU with {threads} thread{'s' * (threads != 1)}"
