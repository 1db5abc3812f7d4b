"""Test that the GPU tests run on a CPU, in a process without the packages that a bare PyTorch machine may lack."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import main as bench
from jobs.benchmarks.gpu import ceiling
from tests.support.paths import ROOT

LACKING = (
    *("ray", "deepspeed", "bitsandbytes", "flash_attn", "soundfile", "soxr", "jiwer", "wandb", "matplotlib"),
    *("fastapi", "pydantic", "pyarrow", "hypothesis", "psutil", "vllm", "torchaudio"),
)
SHARE = (
    "test_gpu_alignment.py",
    "test_gpu_attention.py",
    "test_gpu_engine.py",
    "test_gpu_memory.py",
    "test_gpu_model.py",
    "test_gpu_training.py::test_a_stage_learns_and_changes_only_what_it_trains",
    "test_gpu_training.py::test_states_from_the_cache_equal_those_of_the_encoder",
)


def lacking(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code where importing any of LACKING raises ModuleNotFoundError, and where pytest has no plugins."""
    block = f"import sys; sys.modules.update(dict.fromkeys({LACKING!r})); "
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", block + code]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_the_gpu_tests_pass_on_a_cpu_and_name_what_is_missing() -> None:
    arguments = ["-m", "gpu", "-rs", "-p", "no:cacheprovider", *(f"tests/gpu/{name}" for name in SHARE)]
    done = lacking(f"import pytest; sys.exit(pytest.main({arguments!r}))", GRAFT_TEST_DEVICE="cpu")
    assert done.returncode == 0, done.stdout
    assert "could not import 'bitsandbytes'" in done.stdout
    assert "could not import 'torchaudio'" in done.stdout
    assert "no CUDA device" in done.stdout
    assert "failed" not in done.stdout


def test_training_needs_none_of_what_a_bare_machine_lacks() -> None:
    modules = [
        "stages",
        "training.loop",
        "training.preflight",
        "training.encoder_cache",
        "training.estimate",
        "model.shapes",
    ]
    done = lacking("import " + ", ".join(f"graft.{module}" for module in modules))
    assert done.returncode == 0, done.stderr


def run_benchmark(tmp_path: Path, name: str, *options: str) -> tuple[list[list[str]], dict]:
    """Run a benchmark without all other packages; returns the rows that it printed, and its output."""
    file = tmp_path / "found.json"
    arguments = [name, "--shape", "tiny", "--dtype", "fp32", *options, "--json", str(file)]
    done = lacking(f"from jobs.bench import main; sys.exit(main({arguments!r}))")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["shape"], found["device"]) == ("tiny", "CPU")
    assert datetime.date.today() - datetime.date.fromisoformat(found["date"]) <= datetime.timedelta(days=1)
    return [line.split() for line in done.stdout.splitlines()], found


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    lines, found = run_benchmark(tmp_path, "gpu", "--clip-s", "1", "--seconds", "0.1", "--budgets", "50", "100")
    rows = [line for line in lines if line[0] in ("stage1", "stage2")]
    names = [(row[0], row[1]) for row in rows]
    assert names == [("stage1", "50"), ("stage1", "100"), ("stage2", "50"), ("stage2", "100")]
    for stage, budget, speed, *_, memory in rows:
        assert float(speed) == pytest.approx(found[f"{stage} {budget} samples/s"], abs=0.01)
        assert found[f"{stage} {budget} ms/step"] > 0
        assert memory == "-"


def test_the_benchmark_of_the_engine_runs_on_a_cpu(tmp_path: Path) -> None:
    lines, found = run_benchmark(tmp_path, "engine", "--clip-s", "1", "--batch-clips", "4", "--rounds", "3")
    (row,) = (line for line in lines if line[1:2] == ["s"])
    assert row[:5] == ["1", "s", "12", "41", "3"]
    assert float(row[5]) > 0
    assert row[6:8] == ["-", "-"]
    assert (found["1 s clips"], found["1 s RTFx"]) == (12, pytest.approx(float(row[5].replace(",", "")), abs=0.01))
    assert found["1 s ceiling"] is None


def test_a_ceiling_is_told_for_the_cards_that_it_was_computed_for() -> None:
    cards = [
        "NVIDIA H200",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GH200 480GB",
        "CPU",
    ]
    assert [ceiling("7b", card, 10.0) for card in cards] == [1629.0, 483.0, None, None, None, None]
    shapes = [("7b", 30.0), ("7b", 5.0), ("2b", 10.0)]
    assert [ceiling(shape, "NVIDIA H200", clip_s) for shape, clip_s in shapes] == [1660.0, None, None]


def test_a_file_that_can_not_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--dtype", "fp32", "--clip-s", "1", "--batch-clips", "1", "--rounds", "1"]
    assert bench(["engine", *options, "--json", str(tmp_path)]) == 2
    message = f"graft: error: {tmp_path} cannot be written: Is a directory: name another --json file\n"
    assert capsys.readouterr().err == message
