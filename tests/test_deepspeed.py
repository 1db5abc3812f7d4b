"""DeepSpeed ZeRO trains to the same weights as plain torch, and its state goes on in another process or backend."""

from pathlib import Path

import pytest
import tiny
import torch
from tiny_training import furthest
from tiny_workers import Case, in_processes, train_share

pytest.importorskip("deepspeed")

ZERO2 = ("zero2",)
MOVED = ("zero2", "zero2", "torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny.save_tiny_graft(tmp_path_factory.mktemp("deepspeed") / "graft"))


def same(one: dict, other: dict, tolerance: float) -> None:
    assert furthest(one["weights"], other["weights"]) <= tolerance
    assert one["losses"] == pytest.approx(other["losses"], abs=1e-4)
    for name, entry in other["state"].items():
        assert furthest(one["state"][name], entry) <= tolerance, name


def test_two_processes_of_zero2_equal_torch(folder: str, tmp_path: Path) -> None:
    """Two batches accumulated on each, and a state that moves to new processes' models and to torch's DDP."""
    cases = [Case(folder, "stage1", ZERO2), Case(folder, "stage2", ZERO2), Case(folder, "stage2", MOVED)]
    for case, together in zip(cases, in_processes(2, cases, tmp_path), strict=True):
        alone = train_share(Case(folder, case.stage, ("torch",)))
        for shared in together:
            same(shared, alone, 1e-5)


def test_one_process_of_any_stage_equals_torch_and_resumes_exactly(folder: str, tmp_path: Path) -> None:
    zero = [("zero1",), ZERO2]
    bf16 = [Case(folder, "stage1", one * legs, torch.bfloat16) for one in zero for legs in (1, 3)]
    results = [case[0] for case in in_processes(1, [*(Case(folder, "stage1", one) for one in zero), *bf16], tmp_path)]
    alone = train_share(Case(folder, "stage1", ("torch",)))
    for result in results[:2]:
        same(result, alone, 1e-5)
    for whole, resumed in (results[2:4], results[4:]):
        same(resumed, whole, 0)
        assert {tensor.dtype for entry in whole["state"].values() for tensor in entry.values()} == {torch.float32}
