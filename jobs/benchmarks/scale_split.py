"""One stream of batches split over many workers, as Ray Train splits it; the workers are stand-ins whose step sleeps.

batches -> planned_dataset's loaders -> Ray's split coordinator -> Consumers
Nothing here imports torch, which 64 processes would each hold.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graft.errors import GraftError

from ..common.cluster import connect
from ..training.ray_dataset import iter_blocks, planned_dataset
from ..training.ray_entry import ordered_data_config
from .scale_usage import DRIVER, Usage, cpu_s, peak_mb, usage

Block = dict[str, np.ndarray]
POLL_S = 0.5
DATA_WORKERS = 2
FEWEST_BATCHES = 4
"""That a worker takes at least: at the first and the last one nothing is measured."""


@dataclass(frozen=True)
class Stream:
    """Batches to send through a split, and how quickly a worker takes them."""

    name: str
    consumers: int
    positions: Sequence[int]
    """What each batch says of its place in the plan."""
    delivery: Any
    """A jobs.training.loader.Delivery, or the one block that MadeBatches sends again and again."""
    rate: float
    """Seconds of audio that a worker takes a second; inf where it does not sleep."""
    is_made: bool = False


@dataclass(frozen=True)
class Passed:
    """What came of a stream: of the time in which all workers were busy, but for the memory."""

    name: str
    workers: int
    seconds: float
    batches: int
    asked_per_s: float
    """Batches that the workers would take if none were ever waited for."""
    audio_s: float
    batch_mb: float
    waited: float
    """Share of their time that the workers waited for batches."""
    cpu_ms: dict[str, float] = field(default_factory=dict)
    """A batch, by kind of process."""
    coordinator_mb: float = 0.0
    driver_mb: float = 0.0

    @property
    def batches_per_s(self) -> float:
        return self.batches / self.seconds


class Consumer:
    """Takes its batches, copies each as to a device, and sleeps as long as a step takes."""

    def ready(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def consume(self, shard: Any, rate: float) -> list[dict[str, float]]:
        """Take all; of each when it came, how long it was waited for, its place, and how much it holds."""
        taken, asked = [], time.monotonic()
        for block in iter_blocks(shard):
            size = sum(np.array(array[0]).nbytes for array in block.values())
            came = time.monotonic()
            seconds = float(block["audio_s"][0])
            taken.append(
                {
                    "at": came,
                    "waited": came - asked,
                    "position": int(block["position"][0]),
                    "audio_s": seconds,
                    "bytes": size,
                }
            )
            time.sleep(seconds / rate)
            asked = time.monotonic()
        return taken


class MadeBatches:
    """A loader that makes nothing: `delivery` refers to a block, which it sends with each number as its position."""

    def __init__(self, delivery: Any, first: int):
        import ray

        self.block: Block = ray.get(delivery)
        self.first = first

    def __call__(self, block: dict[str, Any]) -> Any:
        for number in block["id"]:
            yield {**self.block, "position": np.array([self.first + int(number)])}


def pass_through(streams: Sequence[Stream]) -> list[Passed]:
    """Send streams through splits of their own, one after the other, on a Ray of their own. Raises GraftError for too short a stream."""
    import ray

    connect(cpus=DATA_WORKERS)
    consumer: Any = ray.remote(num_cpus=0)(Consumer)
    consumers = [consumer.remote() for _ in range(max(stream.consumers for stream in streams))]
    (node,) = set(ray.get([consumer.ready.remote() for consumer in consumers]))
    passed = [_pass(stream, consumers[: stream.consumers], node) for stream in streams]
    ray.shutdown()
    return passed


def _pass(stream: Stream, consumers: Sequence[Any], node: str) -> Passed:
    import ray

    loader = MadeBatches if stream.is_made else None
    dataset = planned_dataset(
        ray.put(stream.delivery), 0, len(stream.positions), data_workers=DATA_WORKERS, loader=loader
    )
    nodes = [node] * len(consumers)
    shards = ordered_data_config().configure(
        {"train": dataset}, world_size=len(consumers), worker_handles=None, worker_node_ids=nodes
    )
    working = [
        consumer.consume.remote(shard["train"], stream.rate) for consumer, shard in zip(consumers, shards, strict=True)
    ]
    looks: list[tuple[float, Usage]] = []
    while ray.wait(working, num_returns=len(working), timeout=POLL_S)[1]:
        looks.append((time.monotonic(), usage(os.getpid())))
    taken = ray.get(working)
    for rank, mine in enumerate(taken):
        if [batch["position"] for batch in mine] != list(stream.positions[rank :: len(consumers)]):
            raise RuntimeError(f"worker {rank} of {len(consumers)} did not get its own batches in order")
    return measured(stream, taken, looks)


def measured(
    stream: Stream, taken: Sequence[Sequence[dict[str, float]]], looks: Sequence[tuple[float, Usage]]
) -> Passed:
    """Take the figures between the first and the last look at which all workers had a batch, and more to come."""
    begin, end = max(mine[0]["at"] for mine in taken), min(mine[-1]["at"] for mine in taken)
    inside = [look for look in looks if begin <= look[0] <= end]
    (begin, before), (end, after) = (inside[0], inside[-1]) if inside else (looks[0], looks[0])
    batches = [batch for mine in taken for batch in mine if begin < batch["at"] <= end]
    if not batches:
        raise GraftError(f"{stream.name}, {stream.consumers} workers: too short to measure: give more --seconds")
    audio_s = sum(batch["audio_s"] for batch in batches)
    spent = cpu_s(before, after)
    peaks = {kind: max(peak_mb(seen, kind) for _, seen in looks) for kind in ("coordinator", DRIVER)}
    return Passed(
        stream.name,
        stream.consumers,
        seconds=end - begin,
        batches=len(batches),
        asked_per_s=stream.consumers * stream.rate * len(batches) / audio_s,
        audio_s=audio_s,
        batch_mb=statistics.mean(batch["bytes"] for batch in batches) / 1e6,
        waited=sum(min(batch["waited"], batch["at"] - begin) for batch in batches) / (end - begin) / stream.consumers,
        cpu_ms={kind: 1000 * seconds / len(batches) for kind, seconds in spent.items()},
        coordinator_mb=peaks["coordinator"],
        driver_mb=peaks[DRIVER],
    )
