"""Test that DeepSpeed ZeRO trains to the same weights as plain torch, and that other backends resume its state."""

from pathlib import Path

import pytest
import torch

from tests.support import tiny_models
from tests.support.training import furthest
from tests.support.workers import Case, in_processes, train_share

pytest.importorskip("deepspeed")

ZERO1, ZERO2, ZERO3 = ("zero1",), ("zero2",), ("zero3",)
MOVED = ("zero2", "zero3", "torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("deepspeed") / "graft"))


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict]:
    """Train each stage with plain torch in one process."""
    return {stage: train_share(Case(folder, stage, ("torch",))) for stage in ("stage1", "stage2", "qlora")}


def check_same(one: dict, other: dict, *, tolerance: float = 1e-5) -> None:
    assert one["losses"] == pytest.approx(other["losses"], abs=1e-4)
    for name, entry in other["state"].items():
        assert furthest(one["state"][name], entry) <= tolerance, name


def test_two_processes_of_zero_equal_torch(folder: str, alone: dict[str, dict], tmp_path: Path) -> None:
    """Accumulate two batches on each process, and move the state to a new model's ZeRO-2, ZeRO-3 and DDP."""
    cases = [
        Case(folder, "stage1", ZERO2),
        Case(folder, "stage2", ZERO2),
        Case(folder, "stage1", ZERO3),
        Case(folder, "stage2", ZERO3),
    ]
    results = in_processes(2, [*cases, Case(folder, "stage2", MOVED)], tmp_path)
    for case, together in zip([*cases, Case(folder, "stage2", MOVED)], results, strict=True):
        for shared in together:
            check_same(shared, alone[case.stage])
    for whole, sharded in ((results[0], results[2]), (results[1], results[3])):
        assert all(one["resident"] <= 0.55 * other["resident"] for one, other in zip(sharded, whole, strict=True))


@pytest.mark.slow
def test_a_checkpoint_of_three_processes_goes_on_in_two(folder: str, alone: dict[str, dict], tmp_path: Path) -> None:
    """Resume ZeRO-3 of three processes as ZeRO-3 and ZeRO-2 of two, with four batches per step.

    Three processes do not divide the sizes of the weights.
    """
    (begun,) = in_processes(3, [Case(folder, "stage2", ZERO3, end=1)], tmp_path)
    assert all(
        furthest(begun[0]["state"][name], entry) == 0 for one in begun[1:] for name, entry in one["state"].items()
    )
    cases = [Case(folder, "stage2", backend, first=1, begin=begun[0]["state"]) for backend in (ZERO2, ZERO3)]
    for together in in_processes(2, cases, tmp_path):
        for shared in together:
            check_same({**shared, "losses": begun[0]["losses"] + shared["losses"]}, alone["stage2"])


def test_one_process_equals_torch_and_resumes_exactly(folder: str, alone: dict[str, dict], tmp_path: Path) -> None:
    fp32 = [Case(folder, "stage1", ZERO1), Case(folder, "stage1", ZERO2), Case(folder, "qlora", ZERO2)]
    bf16 = [Case(folder, "stage1", one * legs, "bf16") for one in (ZERO1, ZERO2) for legs in (1, 3)]
    results = [result for (result,) in in_processes(1, fp32 + bf16, tmp_path)]
    for case, result in zip(fp32, results, strict=False):
        check_same(result, alone[case.stage])
    for whole, resumed in (results[3:5], results[5:]):
        check_same(resumed, whole, tolerance=0)
        assert {tensor.dtype for entry in whole["state"].values() for tensor in entry.values()} == {torch.float32}
