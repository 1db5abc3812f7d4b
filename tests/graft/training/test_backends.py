"""Test that several processes, and DeepSpeed ZeRO in one or several, train to the weights of plain torch in one."""

import sys
from pathlib import Path

import pytest
import torch

from graft.model.configuration import GraftConfig
from graft.training.estimate import count_parameters, network_bytes
from tests.support import tiny_models
from tests.support.training import furthest
from tests.support.workers import LORA, STEP_BATCHES, STEPS, Case, in_processes, train_share

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.processes

ZERO1, ZERO2, ZERO3 = ("zero1",), ("zero2",), ("zero3",)
MOVED = ("zero2", "zero3", "torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("deepspeed") / "graft"))


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict]:
    """Train each stage with plain torch in one process."""
    return {stage: train_share(Case(folder, stage, ("torch",))) for stage in ("stage1", "stage2", "qlora")}


@pytest.fixture(scope="module")
def cases(folder: str) -> dict[int, list[Case]]:
    """List what the processes of this file train, by their number."""
    both = [Case(folder, stage, ("torch",)) for stage in ("stage1", "stage2")]
    fp32 = [Case(folder, "stage1", ZERO1), Case(folder, "stage1", ZERO2), Case(folder, "qlora", ZERO2)]
    bf16 = [Case(folder, "stage1", one * legs, "bf16") for one in (ZERO1, ZERO2) for legs in (1, 3)]
    sharded = [Case(folder, stage, zero) for zero in (ZERO2, ZERO3) for stage in ("stage1", "stage2")]
    return {
        1: [*fp32, *bf16, Case(folder, "stage1", ZERO3, "bf16")],
        2: [*both, *sharded, Case(folder, "stage2", MOVED)],
        4: both,
    }


@pytest.fixture(scope="module")
def trained(cases: dict[int, list[Case]], tmp_path_factory) -> dict[int, list[list[dict]]]:
    """Train the cases; the processes start once for all tests, since they import for seconds."""
    return in_processes(cases, tmp_path_factory.mktemp("trained"))


def check_same(one: dict, other: dict, *, tolerance: float = 1e-5) -> None:
    assert one["losses"] == pytest.approx(other["losses"], abs=1e-4)
    for name, entry in other["state"].items():
        assert furthest(one["state"][name], entry) <= tolerance, name


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_equal_one(count: int, cases, trained, alone) -> None:
    """Train 1 x 4 batches, 2 x 2 and 4 x 1, uneven and one of them empty, with dropout, on gloo."""
    for case, together in zip(cases[count][:2], trained[count], strict=False):
        assert case.backends == ("torch",)
        for shared in together:
            assert furthest(shared["weights"], alone[case.stage]["weights"]) < 1e-6
            assert shared["losses"] == pytest.approx(alone[case.stage]["losses"], abs=1e-6)


def test_two_processes_of_zero_equal_torch(cases, trained, alone) -> None:
    """Accumulate two batches on each process, and move the state to a new model's ZeRO-2, ZeRO-3 and DDP."""
    results = trained[2][2:]
    for case, together in zip(cases[2][2:], results, strict=True):
        for shared in together:
            check_same(shared, alone[case.stage])
    for whole, sharded in ((results[0], results[2]), (results[1], results[3])):
        assert all(one["resident"] <= 0.55 * other["resident"] for one, other in zip(sharded, whole, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the bytes that a socket sends")
def test_two_workers_send_as_many_bytes_as_a_plan_says(folder: str, cases, trained) -> None:
    """Gloo's headers and the losses add to them: at most a tenth, and 3 kB a batch.

    ZeRO-3 is left out: weights as small as these it keeps on each worker between the batches of a step.
    """
    config = GraftConfig.from_pretrained(folder)
    layouts = {("torch",): "ddp", ZERO2: "zero 2"}
    seen = []
    for case, together in zip(cases[2], trained[2], strict=True):
        if not (layout := layouts.get(case.backends)):
            continue
        parameters = count_parameters(config, lora_rank=None if case.stage == "stage1" else LORA.rank)
        batches = STEP_BATCHES // 2
        planned = STEPS * network_bytes(
            config, parameters, layout=layout, workers=2, accumulation=batches, dtype_bytes=4
        )
        for result in together:
            assert planned <= result["sent"] <= 1.1 * planned + 3000 * STEPS * batches, case
        seen.append((layout, case.stage))
    assert sorted(seen) == [("ddp", "stage1"), ("ddp", "stage2"), ("zero 2", "stage1"), ("zero 2", "stage2")]


def test_one_process_of_zero_equals_torch_and_resumes_exactly(cases, trained, alone) -> None:
    results = [result for (result,) in trained[1]]
    for case, result in zip(cases[1][:3], results, strict=False):
        check_same(result, alone[case.stage])
    for whole, resumed in (results[3:5], results[5:7]):
        check_same(resumed, whole, tolerance=0)
        assert {tensor.dtype for entry in whole["state"].values() for tensor in entry.values()} == {torch.float32}


def test_rotary_positions_keep_their_frequencies_in_bf16(cases, trained, alone) -> None:
    exact = alone["stage1"]["buffers"]
    assert any("inv_freq" in name for name in exact)
    results = [
        (case, result)
        for count in trained
        for case, each in zip(cases[count], trained[count], strict=True)
        for result in each
    ]
    assert {"zero2", "zero3"} <= {case.backends[0] for case, _ in results if case.dtype == "bf16"}
    for case, result in results:
        if case.stage == "stage1":
            assert furthest(result["buffers"], exact) == 0, case
    zero2, zero3 = (result for case, result in results if case.dtype == "bf16" and case.backends in (ZERO2, ZERO3))
    assert zero3["losses"] == pytest.approx(zero2["losses"], abs=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_three_processes_goes_on_in_two(folder: str, alone: dict[str, dict], tmp_path: Path) -> None:
    """Resume ZeRO-3 of three processes as ZeRO-3 and ZeRO-2 of two, with four batches per step.

    Three processes do not divide the sizes of the weights.
    """
    (begun,) = in_processes({3: [Case(folder, "stage2", ZERO3, end=1)]}, tmp_path)[3]
    assert all(
        furthest(begun[0]["state"][name], entry) == 0 for one in begun[1:] for name, entry in one["state"].items()
    )
    cases = [Case(folder, "stage2", backend, first=1, begin=begun[0]["state"]) for backend in (ZERO2, ZERO3)]
    for together in in_processes({2: cases}, tmp_path)[2]:
        for shared in together:
            check_same({**shared, "losses": begun[0]["losses"] + shared["losses"]}, alone["stage2"])


@pytest.mark.slow
def test_learning_rates_of_parts_are_the_same_in_every_layout_and_after_resuming(folder: str, tmp_path: Path) -> None:
    scales = {"projector": 10.0, "encoder": 0.1}
    alone = train_share(Case(folder, "encoder", ("torch",), lr_scales=scales))
    plain = train_share(Case(folder, "encoder", ("torch",)))
    changed = [name for name, entry in plain["state"].items() if furthest(entry, alone["state"][name]) > 1e-5]
    assert {name.split(".")[0] for name in changed} >= {"audio_projector", "audio_tower"}
    cases = [Case(folder, "encoder", backends, lr_scales=scales) for backends in (ZERO1, ZERO2, ZERO3, MOVED)]
    results = in_processes({1: cases, 2: cases}, tmp_path)
    for count in results:
        for together in results[count]:
            for shared in together:
                check_same(shared, alone)
