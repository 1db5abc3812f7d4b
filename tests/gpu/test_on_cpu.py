"""The tests for a GPU keep running: here on the CPU, in a process that lacks every package which a bare PyTorch machine may lack."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.benchmarks.engine import ceiling
from jobs.benchmarks.engine import main as bench_engine
from tests.support.paths import ROOT

LACKING = (
    *("ray", "deepspeed", "bitsandbytes", "flash_attn", "soundfile", "soxr", "jiwer", "wandb", "matplotlib"),
    *("fastapi", "pydantic", "pyarrow", "hypothesis", "psutil", "vllm"),
)
SHARE = (
    "test_gpu_attention.py",
    "test_gpu_engine.py",
    "test_gpu_memory.py",
    "test_gpu_model.py",
    "test_gpu_training.py::test_a_stage_learns_and_changes_only_what_it_trains",
    "test_gpu_training.py::test_states_from_the_cache_equal_those_of_the_encoder",
)


def lacking(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code where importing any of LACKING raises ModuleNotFoundError, as where it is not installed, and pytest has no plugins."""
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


def written(file: Path) -> list[dict]:
    """The rows that a benchmark wrote, of this device and day."""
    found = json.loads(file.read_text())
    assert (found["shape"], found["device"]) == ("tiny", "CPU")
    assert datetime.date.today() - datetime.date.fromisoformat(found["date"]) <= datetime.timedelta(days=1)
    return found["rows"]


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--dtype", "fp32", "--clip-s", "1", "--seconds", "0.1", "--budgets", "50", "100"]
    options += ["--json", str(tmp_path / "found.json")]
    done = lacking(f"from jobs.benchmarks.gpu import main; sys.exit(main({options!r}))")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("stage1", "stage2"))]
    assert [(row[0], row[1]) for row in rows] == [
        ("stage1", "50"),
        ("stage1", "100"),
        ("stage2", "50"),
        ("stage2", "100"),
    ]
    assert all(float(row[2]) > 0 for row in rows)
    assert [(row["stage"], row["token_budget"]) for row in written(tmp_path / "found.json")] == [
        (1, 50),
        (1, 100),
        (2, 50),
        (2, 100),
    ]


def test_the_benchmark_of_the_engine_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--dtype", "fp32", "--clip-s", "1", "--batch-clips", "4", "--rounds", "3"]
    options += ["--json", str(tmp_path / "found.json")]
    done = lacking(f"from jobs.benchmarks.engine import main; sys.exit(main({options!r}))")
    assert done.returncode == 0, done.stderr
    (row,) = (line.split() for line in done.stdout.splitlines()[2:])
    assert row[:4] == ["1", "12", "41", "3"]
    assert float(row[4]) > 0
    assert row[5:7] == ["-", "-"]
    (found,) = written(tmp_path / "found.json")
    assert (found["clips"], found["rtfx"], found["ceiling"]) == (12, pytest.approx(float(row[4]), abs=0.06), None)


def test_what_is_possible_is_told_of_the_cards_that_it_was_computed_for() -> None:
    cards = [
        "NVIDIA H200",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GH200 480GB",
        "CPU",
    ]
    assert [ceiling("7b", card, 10.0) for card in cards] == [1629.0, 483.0, None, None, None, None]
    assert [ceiling(shape, "NVIDIA H200", clip_s) for shape, clip_s in [("7b", 30.0), ("7b", 5.0), ("2b", 10.0)]] == [
        1660.0,
        None,
        None,
    ]


def test_a_file_that_can_not_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--shape",
        "tiny",
        "--dtype",
        "fp32",
        "--clip-s",
        "1",
        "--batch-clips",
        "1",
        "--rounds",
        "1",
        "--json",
        str(tmp_path),
    ]
    assert bench_engine(options) == 2
    assert (
        capsys.readouterr().err
        == f"graft: error: {tmp_path} cannot be written: Is a directory: name another --json file\n"
    )


@pytest.mark.parametrize("count", ["0", "many"])
def test_a_count_that_is_none_is_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_engine(["--shape", "tiny", "--batch-clips", count])
    assert f"argument --batch-clips: {'0 is less than one' if count == '0' else 'invalid'}" in capsys.readouterr().err
