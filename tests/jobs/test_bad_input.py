"""Tests that faulty input to training, merging, checking and scoring ends as one line and leaves nothing behind."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graft.checkpoints.loading import open_graft, write_stage
from graft.checkpoints.projector_file import PROJECTOR_FILE
from graft.config import Recipe, recipe_yaml
from graft.errors import install_command
from jobs import check, evaluate, merge, stage1, stage2
from jobs.common.cli import run_job
from tests.support import tiny_models
from tests.support.adapters import save_projector
from tests.support.paths import ROOT
from tests.support.speech_corpus import BROKEN, corpus, row

JOBS: dict[str, tuple[type[Recipe], Any]] = {
    "stage1": (stage1.Stage1Recipe, stage1.run),
    "stage2": (stage2.Stage2Recipe, stage2.run),
    "merge": (merge.MergeRecipe, merge.run),
    "check": (check.CheckRecipe, check.run),
    "evaluate": (evaluate.EvaluateRecipe, evaluate.run),
}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make good and bad models and corpora; returns their paths by name."""
    folder = tmp_path_factory.mktemp("things")
    digests = {"audio": "sha256:a", "text": "sha256:b"}
    graft = tiny_models.save_tiny_graft(folder / "graft", base_digests=digests)
    tiny_models.qwen2vl_model().save_pretrained(folder / "qwen2vl")
    made = {"graft": graft, "qwen2vl": folder / "qwen2vl", "good_stage": _stage(folder / "good_stage", graft)}
    made["other_bases"] = _stage(
        folder / "other_bases",
        tiny_models.save_tiny_graft(folder / "graft2", base_digests={**digests, "text": "sha256:c"}),
    )
    made["truncated"] = tiny_models.save_tiny_graft(folder / "truncated")
    weights = made["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    made["zeros"] = _stage(folder / "zeros", graft)
    made["cut_short"] = _stage(folder / "cut_short", graft)
    (folder / "cut_short" / PROJECTOR_FILE).write_bytes(b"half")
    path = folder / "zeros" / PROJECTOR_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path, metadata)
    good = [row(f"r{seed}", seed) for seed in range(3)]
    rows = {
        "good": good,
        "no_text": [*good, row("silent", 3, text=" "), row("mute", 4, text=None)],
        "useless": [row("silent", 3, text=" "), row("long", 3, duration=30.5)],
        "broken": [row("broken", 3, **BROKEN), *good],
        "all_broken": [row("broken", 3, **BROKEN)],
    }
    return {
        **{name: str(path) for name, path in made.items()},
        **{f"{name}.parquet": corpus(folder / f"{name}.parquet", some) for name, some in rows.items()},
        "nothing": str(folder / "nothing"),
    }


def _stage(folder: Path, graft: Path) -> Path:
    """Write an output folder as stage 1 leaves it."""
    folder.mkdir()
    save_projector(open_graft(graft)[0], folder)
    write_stage(folder, stage=1, graft=graft)
    return folder


@dataclass(frozen=True)
class Fault:
    """A command with one fault, and words of the line that it must end with."""

    job: str
    arguments: str
    words: tuple[str, ...]


STAGE1 = "model={graft} data=[{good.parquet}]"
STAGE2 = "model={graft} data=[{good.parquet}] projector={good_stage}"
SCORE = "model={graft} data.test={good.parquet} baseline=null"
FAULTS = {
    "no row to train on": Fault(
        "stage1", f"{STAGE1} data=[{{useless.parquet}}]", ("none of 2 rows", "(1 no words, 1 over 30 s)")
    ),
    "token budget too small": Fault("stage1", f"{STAGE1} token_budget=10", ("more than token_budget=10", "raise it")),
    "data missing": Fault("stage1", f"{STAGE1} data=[{{nothing}}]", ("no such file or folder: data=",)),
    "unknown key": Fault("stage1", f"{STAGE1} learning_rte=1", ("learning_rte=1", "did you mean 'learning_rate'")),
    "wrong value": Fault("stage1", f"{STAGE1} workers=0", ("workers=0: give an integer of at least 1",)),
    "wrong choice": Fault("stage2", f"{STAGE2} quantize=int3", ("quantize=int3: give nf4 or none",)),
    "model missing": Fault("stage1", f"{STAGE1} model={{nothing}}", ("no such file or folder: model=",)),
    "hub id that does not answer": Fault(
        "stage1", f"{STAGE1} model=no/graft", ("can't be read as a graft checkpoint",)
    ),
    "plain Qwen2-VL to train": Fault("stage1", f"{STAGE1} model={{qwen2vl}}", ("is a qwen2_vl checkpoint, not graft",)),
    "no projector": Fault("stage2", f"{STAGE2} projector={{nothing}}", ("no such file or folder: projector=",)),
    "projector of zeros": Fault("stage2", f"{STAGE2} projector={{zeros}}", ("all zeros", "train stage 1")),
    "projector of other bases": Fault(
        "stage2", f"{STAGE2} projector={{other_bases}}", ("was trained with base_digests", "sha256:c")
    ),
    "projector of zeros to check": Fault(
        "check", "model={zeros} data=[{good.parquet}]", ("all zeros, so audio has no effect",)
    ),
    "no readable clip to check": Fault(
        "check",
        "model={graft} data=[{all_broken.parquet}]",
        ("none of the first 1 clips can be read", "broken.flac: not readable as audio"),
    ),
    "truncated weights": Fault(
        "check", "model={truncated} data=[{good.parquet}]", ("the weights in", "truncated", "can't be read")
    ),
    "truncated projector": Fault(
        "stage2", f"{STAGE2} projector={{cut_short}}", ("projector.safetensors can't be read",)
    ),
    "no stage to merge": Fault("merge", "model={graft}", ("is no stage's output", "give the folder of")),
    "row without text to score": Fault(
        "evaluate", f"{SCORE} data.test={{no_text.parquet}}", ("2 rows of", "silent first", "`graft prepare`")
    ),
    "model to score missing": Fault("evaluate", f"{SCORE} model={{nothing}}", ("no such file or folder: model=",)),
    "model to score deaf": Fault("evaluate", f"{SCORE} model={{zeros}}", ("all zeros, so audio has no effect",)),
    "baseline is no Whisper": Fault(
        "evaluate", f"{SCORE} baseline={{qwen2vl}}", ("is a qwen2_vl checkpoint, not graft or whisper",)
    ),
}


def filled(arguments: str, things: dict[str, str]) -> list[str]:
    """Replace names by their paths; of a key given twice the last counts."""
    for name, path in things.items():
        arguments = arguments.replace(f"{{{name}}}", path)
    return arguments.split()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_one_line_and_leaves_nothing(
    fault: Fault,
    things: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: pytest.fail("the fault is found only after a cluster starts"))
    arguments = filled(fault.arguments, things) + ([] if fault.job == "check" else ["out=out"])
    recipe_class, main = JOBS[fault.job]
    assert run_job(recipe_class, main, summary="", argv=arguments) == 2
    assert_one_line(capsys.readouterr().err, *fault.words)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_cannot_be_read_is_left_out_of_a_check_and_named(
    things: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = filled("model={graft} data=[{broken.parquet}]", things)
    assert run_job(check.CheckRecipe, check.run, summary="", argv=arguments) == 0
    said = capsys.readouterr().out
    assert "check: clip broken is left out: broken.flac: not readable as audio" in said
    assert "hears: " in said


def assert_one_line(errors: str, *words: str) -> None:
    assert errors.startswith("graft: error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors


def test_a_folder_of_another_recipe_is_refused_untouched(
    things: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text(
        recipe_yaml(stage1.Stage1Recipe(model=things["graft"], data=["d"], out=str(out), seed=7))
    )
    for job, arguments, words in [
        ("stage1", f"{STAGE1} seed=8", ("holds another recipe's results", "choose another out= or remove the folder")),
        ("merge", "model={good_stage}", ("holds another recipe's results", "choose another out= or remove the folder")),
        ("evaluate", SCORE, ("holds another recipe's results", "choose another out= or remove the folder")),
    ]:
        recipe_class, main = JOBS[job]
        assert run_job(recipe_class, main, summary="", argv=[*filled(arguments, things), f"out={out}"]) == 2
        assert_one_line(capsys.readouterr().err, str(out), *words)
    assert [path.name for path in out.iterdir()] == ["recipe.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# An installation without an extra: the import system does not find its package.
WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.processes
def test_real_commands_say_one_line_too(things: dict[str, str], tmp_path: Path) -> None:
    commands = [
        (["-m", "jobs.evaluate", *filled(f"{SCORE} data.test={{nothing}}", things)], ("no such file or folder",)),
        (
            ["-c", WITHOUT.format(package="ray", module="jobs.stage1"), *filled(STAGE1, things)],
            (install_command("train"), "ray"),
        ),
    ]

    def ended(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments, f"out={tmp_path / 'out'}"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    with ThreadPoolExecutor(2) as pool:
        for (_, words), result in zip(commands, pool.map(ended, [arguments for arguments, _ in commands]), strict=True):
            assert result.returncode == 2, result.stderr
            assert_one_line(result.stderr, *words)
    assert list(tmp_path.iterdir()) == []
