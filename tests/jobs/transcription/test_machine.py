"""Numbers of processes that a recipe leaves open are chosen by what there is; those that it gives stay."""

from dataclasses import replace
from typing import Any

import pytest

from jobs.transcription.machine import AskedWorkers, Machine, describe, describe_one, leave_room, this_machine
from jobs.transcription.pipeline import Workers


def asked(**numbers: Any) -> AskedWorkers:
    return AskedWorkers(
        **{"readers": "auto", "transcribers": "auto", "threads": "auto", "gpus": "auto"} | numbers, items_per_batch=16
    )


@pytest.mark.parametrize(
    ("machine", "given", "readers", "transcribers", "threads", "gpus"),
    [
        (Machine((2,)), {}, 1, 1, 1, 0),
        (Machine((1,)), {}, 1, 1, 1, 0),
        (Machine((16,)), {}, 1, 1, 15, 0),
        (Machine((64,)), {}, 4, 4, 15, 0),
        (Machine((16,)), {"transcribers": 4}, 4, 4, 3, 0),
        (Machine((16,)), {"readers": 6}, 6, 1, 10, 0),
        (Machine((16,)), {"threads": 2}, 14, 1, 2, 0),
        (Machine((2, 16, 16)), {}, 4, 2, 15, 0),  # a head, and two nodes that work
        (Machine((16,), 1), {}, 15, 1, 1, 1),
        (Machine((32, 32), 8), {}, 56, 8, 1, 1),
        (Machine((16,), 1), {"gpus": 0}, 1, 1, 15, 0),
        (Machine((16,), 1), {"gpus": False}, 1, 1, 15, 0),
        (Machine((16,), 1), {"dtype": "int8"}, 1, 1, 15, 0),
        (Machine((16,), 2), {"gpus": True}, 14, 2, 1, 1),
        (Machine((16,), 2), {"gpus": 0.5}, 12, 4, 1, 0.5),
        (Machine((16,), 2), {"transcribers": 3}, 13, 3, 1, 0.5),  # two share a GPU
        (Machine((4,)), {"readers": 48, "transcribers": 8, "threads": 2, "gpus": 1}, 48, 8, 2, 1),
    ],
)
def test_what_is_left_open_is_chosen_by_the_machine(
    machine: Machine, given: dict[str, Any], readers: int, transcribers: int, threads: int, gpus: float
) -> None:
    workers = asked(**given).choose(machine)
    assert workers == Workers(readers, transcribers, threads, gpus, 16)


def test_the_choice_is_told_in_one_line() -> None:
    machine = Machine((16, 16), 2)
    assert describe(asked().choose(machine), machine) == (
        "workers=2 threads=1 readers=30, gpus_per_worker=1 (of 32 CPUs, 2 GPUs, 2 machines)"
    )
    assert describe_one(asked().choose(machine)) == "on a GPU"
    assert describe_one(asked().choose(Machine((2,)))) == "on the CPU with 1 thread"
    here = this_machine(gpus=0)
    assert describe(asked().choose(here), here).endswith(f", on the CPU (of {here})")


@pytest.mark.parametrize(
    ("workers", "cpus", "may_wait", "share"),
    [
        (Workers(1, 1, 1, 0, 16), 2, True, 0.5),  # a reader and a worker take both CPUs
        (Workers(1, 1, 1, 0, 16), 2, False, 0.5),
        (Workers(1, 1, 1, 0, 16), 3, True, 1),
        (Workers(2, 2, 1, 0, 16), 4, True, 0.75),
        (Workers(2, 4, 1, 0, 16), 4, True, 1),  # they wait for a cluster that grows
        (Workers(2, 4, 1, 0, 16), 4, False, 0.5),
        (Workers(1, 1, 1, 0, 16), 1, False, 1),
    ],
)
def test_a_cpu_is_left_to_rays_own_tasks(workers: Workers, cpus: float, may_wait: bool, share: float) -> None:
    assert leave_room(workers, cpus, may_wait=may_wait).logical_cpu == share


def test_processes_reserve_whole_cpus_or_a_part_of_one() -> None:
    workers = Workers(2, 1, 4, 0, 16)
    assert (workers.cpus, workers.reserved_cpus(1), workers.reserved_cpus(4)) == (6, 1, 4)
    assert replace(workers, logical_cpu=0.7).reserved_cpus(4) == 2  # not 2.8, which Ray refuses
    assert replace(workers, logical_cpu=0.7).reserved_cpus(1) == 0.7
