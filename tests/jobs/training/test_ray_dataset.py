"""Test streaming through Ray: every batch once, in order, and each worker receives its own."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from graft.data.dataset import read_rows
from graft.processor import GraftProcessor
from graft.training.plan import PlanSettings
from jobs.common.cluster import SERVE_VARIABLES, WORKER_VARIABLES
from jobs.training.loader import BatchLoader, LoaderSpec
from jobs.training.ray_dataset import (
    SCHEDULING_S,
    DataStep,
    LoadBatches,
    ReadWindows,
    SchedulerThrottle,
    planned_dataset,
)
from jobs.training.samples import plan_training
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, row

pytestmark = pytest.mark.usefixtures("ray_started")


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> LoaderSpec:
    folder = tmp_path_factory.mktemp("remote")
    graft = tiny_models.save_tiny_graft(folder / "graft")
    rows = read_rows(corpus(folder / "a.parquet", [row(f"clip{index}", index) for index in range(24)]))
    plan = plan_training(rows, GraftProcessor.from_pretrained(graft), PlanSettings(max_batch_clips=2, window_clips=8))
    return LoaderSpec(rows, plan.batches(position=0, step_batches=2), str(graft))


def steps(spec: LoaderSpec) -> tuple[DataStep, DataStep]:
    import ray

    return DataStep(ReadWindows, ray.put(spec.reader)), DataStep(LoadBatches, ray.put(spec.without_rows()))


@pytest.mark.parametrize(
    ("first", "most_tasks"),
    [
        pytest.param(0, 2, id="several windows a task", marks=pytest.mark.slow),
        pytest.param(2, 100, id="one, from its middle"),
    ],
)
def test_each_worker_gets_its_own_batches_in_order_with_no_cpu_to_spare(spec, first, most_tasks):
    import ray

    count = len(spec.batches) - first
    windows = range(int(spec.batches.windows[first]), int(spec.batches.windows[-1]) + 1)
    assert len(windows) > 2
    spare = ray.cluster_resources()["CPU"] - 2  # what the two loaders leave, as training workers do
    held = ray.util.placement_group([{"CPU": 1}] * int(spare)) if spare else None
    dataset = planned_dataset(*steps(spec), windows, first=first, data_workers=2, most_tasks=most_tasks)
    dataset.context.execution_options.preserve_order = True

    def blocks(shard: Any) -> list[dict[str, np.ndarray]]:
        return list(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))

    with ThreadPoolExecutor(max_workers=2) as pool:
        shares = list(pool.map(blocks, dataset.streaming_split(2, equal=True)))
    if held:
        ray.util.remove_placement_group(held)
    expected_blocks = list(BatchLoader(spec).blocks(range(len(spec.batches))))
    for rank, share in enumerate(shares):
        assert len(share) == count // 2
        for index, block in enumerate(share):
            expected = expected_blocks[first + 2 * index + rank]
            assert block.keys() == expected.keys()
            assert all(np.array_equal(block[name], expected[name]) for name in block)


def test_loaders_share_the_spec_in_memory(spec):
    import ray

    shared = ray.get(ray.put(spec))
    columns = (
        shared.batches.rows,
        shared.batches.sample_seeds,
        shared.batches.offsets,
        shared.rows.duration_s,
        shared.rows.row,
    )
    assert all(not column.flags.owndata and not column.flags.writeable for column in columns)
    assert (shared.rows.id(5), shared.batches[3]) == (spec.rows.id(5), spec.batches[3])


def test_workers_have_the_clusters_environment():
    import os

    import ray

    environment = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    assert int(environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    assert environment.items() >= WORKER_VARIABLES.items() | SERVE_VARIABLES.items()


def test_the_scheduling_loop_is_throttled(spec):

    dataset = planned_dataset(*steps(spec), range(1), data_workers=1)
    assert SchedulerThrottle in dataset.context.execution_callback_classes
    callback, start = SchedulerThrottle(), time.monotonic()
    for _ in range(5):
        callback.on_execution_step(None)
    assert time.monotonic() - start >= 5 * SCHEDULING_S
