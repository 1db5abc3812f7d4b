"""Test that training survives killed workers, loaders, drivers and nodes and SIGTERM, and stops where it should.

In every case the results equal those of an undisturbed run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from graft.config import recipe_yaml
from graft.processor import GraftProcessor
from graft.training.progress import Progress
from jobs import stage1
from jobs.common.cli import run_job
from jobs.training.batches import plan_run, remaining_batches
from jobs.training.driver import STOPPED
from tests.support import hub_server, tiny_models
from tests.support.faults import (
    DEADLINE_S,
    LOADING,
    READING,
    TRAINING,
    Folder,
    Machines,
    Served,
    is_as,
    machines,
    meanwhile,
    processes,
    resumption,
    until,
)
from tests.support.paths import ROOT
from tests.support.speech_corpus import BROKEN, corpus, row
from tests.support.training import batches_after

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow, pytest.mark.ray]

EPOCHS, CLIPS = 12, 41


@dataclass(frozen=True)
class Home:
    """Make a tiny graft and a corpus with one undecodable clip, on a server that records what is read."""

    folder: Path
    graft: str
    train: Served
    machines: Machines

    def recipe(self, out: str, **changed: Any) -> stage1.Stage1Recipe:
        settings = {
            "model": self.graft,
            "data": [self.train.url],
            "out": str(self.folder / out),
            "epochs": EPOCHS,
            "token_budget": 250,
            "window_clips": 8,
            "step_batches": 5,
            "learning_rate": 1e-3,
            "warmup_steps": 3,
            "dtype": "fp32",
            "backend": "torch",
            "workers": 2,
            "data_workers": 1,
            "log_every": 1,
            "checkpoint_every": 5,
        }
        return stage1.Stage1Recipe.model_validate({**settings, **changed})

    def command(self, recipe: stage1.Stage1Recipe) -> list[str]:
        """Return the command line of a recipe; it is equal for equal folders."""
        path = Path(f"{recipe.out}.yaml")
        path.write_text(recipe_yaml(recipe))
        return [sys.executable, "-m", "jobs.stage1", "--recipe", str(path)]

    def driver(self, recipe: stage1.Stage1Recipe) -> subprocess.Popen[str]:
        """Start the command in a process group of its own."""
        return subprocess.Popen(
            self.command(recipe),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("faults")
    corpus(folder / "train.parquet", [row(f"t{seed}", seed, **(BROKEN if seed == 9 else {})) for seed in range(CLIPS)])
    graft = tiny_models.save_tiny_graft(folder / "graft")
    with hub_server.serve(folder) as hub, machines(2) as own:
        yield Home(folder, str(graft), Served(hub, "train.parquet"), own)


@pytest.fixture(scope="module")
def undisturbed(home: Home) -> Folder:
    stage1.run(home.recipe("undisturbed"))
    return Folder(home.folder / "undisturbed")


def in_mid_epoch(folder: Folder, plan_epoch: int, *, step: int = 1) -> Callable[[], bool]:
    """Tell whether the newest checkpoint is inside an epoch, at `step` or later."""
    return lambda: folder.progress.step >= step and folder.progress.position % plan_epoch != 0


@pytest.fixture(scope="module")
def epoch_batches(home: Home) -> int:
    """Count the batches of each of the first epochs, which are equal."""
    recipe = home.recipe("planned")
    _, _, plan = plan_run(recipe, GraftProcessor.from_pretrained(home.graft))
    assert len({len(epoch) for epoch in plan.epochs}) == 1
    return len(plan.epochs[0])


def reads(home: Home, recipe: stage1.Stage1Recipe) -> list[int]:
    """List the row group of each window of a whole run, in order."""
    rows, _, plan = plan_run(recipe, GraftProcessor.from_pretrained(home.graft))
    batches = remaining_batches(plan, Progress(), recipe)[0]
    _, firsts = np.unique(batches.windows, return_index=True)
    return rows.row_group[batches.rows[batches.offsets[firsts]]].tolist()


def test_a_training_worker_is_killed(home: Home, undisturbed: Folder, epoch_batches: int) -> None:
    recipe, folder = home.recipe("worker"), Folder(home.folder / "worker")
    with meanwhile(in_mid_epoch(folder, epoch_batches), lambda: processes(TRAINING)[-1].kill()):
        stage1.run(recipe)
    is_as(folder, undisturbed)
    assert (
        0 < resumption(folder).step < undisturbed.result["steps"]
    )  # and nothing behind it was delivered again: each batch is trained


@pytest.mark.parametrize("killed", [LOADING, READING])
def test_a_loader_or_the_reader_is_killed(home: Home, undisturbed: Folder, epoch_batches: int, killed: str) -> None:
    recipe, folder = home.recipe(killed), Folder(home.folder / killed)

    def kill() -> None:
        (actor,) = processes(killed)
        actor.kill()
        actor.wait(DEADLINE_S)

    home.train.hub.sent.clear()
    with meanwhile(in_mid_epoch(folder, epoch_batches), kill):
        stage1.run(recipe)
    is_as(folder, undisturbed)
    assert "going on" not in folder.log  # the training workers did not notice
    whole, read = reads(home, recipe), home.train.groups_read()
    if killed == LOADING:
        assert read == whole  # Each window was fetched once, in order, for whatever loader.
    else:
        assert not Counter(whole) - Counter(read)


def test_a_driver_is_killed_and_its_run_goes_on_on_two_workers_and_on_three(
    home: Home, undisturbed: Folder, epoch_batches: int
) -> None:
    recipe, folder = home.recipe("driver"), Folder(home.folder / "driver")
    with home.driver(recipe) as driver:
        until(lambda: in_mid_epoch(folder, epoch_batches)() or driver.poll() is not None)
        assert driver.poll() is None, driver.communicate()[0]
        os.killpg(driver.pid, signal.SIGKILL)
    until(lambda: not processes(TRAINING))  # Ray ends what a driver leaves
    progress = folder.progress
    assert 0 < progress.step < undisturbed.result["steps"]
    assert progress.position % epoch_batches != 0
    assert not (folder.path / "result.json").exists()
    left = shutil.copytree(folder.path, home.folder / "left")
    for workers in (2, 3):
        shutil.rmtree(folder.path)
        shutil.copytree(left, folder.path)
        again = home.recipe("driver", workers=workers)
        every_row_is_trained_once_an_epoch(home, recipe, again, progress)
        stage1.run(again)
        assert resumption(folder).step == progress.step
        is_as(folder, undisturbed)


def every_row_is_trained_once_an_epoch(
    home: Home, before: stage1.Stage1Recipe, after: stage1.Stage1Recipe, progress: Progress
) -> None:
    """Check that the batches before and after `progress`, with other numbers of workers, add up to all epochs."""
    _, _, plan = plan_run(before, GraftProcessor.from_pretrained(home.graft))
    everything, _ = remaining_batches(plan, Progress(), before)
    left, _ = remaining_batches(plan, progress, after)
    trained = np.concatenate(
        [everything.rows[: len(everything.rows) - len(batches_after(everything, progress.position).rows)], left.rows]
    )
    for epoch in trained.reshape(EPOCHS, CLIPS):
        assert sorted(epoch) == list(range(CLIPS))


def test_sigterm_saves_and_a_second_one_ends_at_once(home: Home, undisturbed: Folder) -> None:
    recipe, folder = home.recipe("stopped"), Folder(home.folder / "stopped")
    with home.driver(recipe) as driver:
        until(lambda: folder.progress.step > 0 or driver.poll() is not None)
        driver.terminate()
        said, _ = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == STOPPED == 143, said
    progress = folder.progress
    stopped = f"stage 1: stopped at step {progress.step} and saved: give the same command again to go on"
    assert said.splitlines()[-1] == stopped
    assert "Traceback" not in said
    assert len(folder.metrics) == progress.step < undisturbed.result["steps"]

    with home.driver(recipe) as driver:
        until(lambda: folder.log.count("\nstep") > progress.step or driver.poll() is not None)
        driver.terminate()
        until(lambda: (folder.path / "stop").exists() or driver.poll() is not None)
        driver.terminate()
        said, _ = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode not in (0, STOPPED)
    assert "stopped at" not in said
    until(lambda: not processes(TRAINING))

    again = home.recipe("stopped", workers=1)
    every_row_is_trained_once_an_epoch(home, recipe, again, folder.progress)
    stage1.run(again)
    is_as(folder, undisturbed)


def test_workers_that_die_once_too_often_end_the_run(
    home: Home, undisturbed: Folder, epoch_batches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = home.recipe("spent", retries=0), Folder(home.folder / "spent")
    argv = home.command(recipe)[3:]
    with meanwhile(in_mid_epoch(folder, epoch_batches), lambda: processes(TRAINING)[0].kill()):
        assert run_job(stage1.Stage1Recipe, stage1.run, summary="", argv=argv) == 2
    error = "graft: error: a training worker died (killed, out of memory or crashed) and retries=0 are used up: "
    error += "give the same command again"
    assert capsys.readouterr().err.splitlines()[-1].startswith(error)
    assert run_job(stage1.Stage1Recipe, stage1.run, summary="", argv=argv) == 0
    assert resumption(folder).step > 0
    is_as(folder, undisturbed)


@pytest.fixture(scope="module")
def poisoned(home: Home) -> str:
    """Make a graft whose loss is not finite where a text has a "z"."""
    folder = Path(shutil.copytree(home.graft, home.folder / "poisoned"))
    weights = load_file(folder / "model.safetensors")
    (token,) = GraftProcessor.from_pretrained(folder).tokenizer.encode("z")
    weights["model.language_model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_loss_that_is_no_number_stops_the_run_and_its_batches_are_kept(
    home: Home, poisoned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = CLIPS - 1
    data = corpus(
        home.folder / "odd.parquet",
        [row(f"t{seed}", seed, **({"text": "one zoo"} if seed == odd else {})) for seed in range(CLIPS)],
    )
    recipe, folder = home.recipe("nan", model=poisoned, data=[data], seed=1), Folder(home.folder / "nan")
    _, _, plan = plan_run(recipe, GraftProcessor.from_pretrained(poisoned))
    batches = list(remaining_batches(plan, Progress(), recipe)[0])
    steps = [batches[start : start + 6] for start in range(0, len(batches), 6)]
    number = next(index for index, step in enumerate(steps, start=1) if any(odd in batch.rows for batch in step))
    assert number > 1
    capsys.readouterr()

    assert run_job(stage1.Stage1Recipe, stage1.run, summary="", argv=home.command(recipe)[3:]) == 2
    reason = f"the loss is nan at step {number}"
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("graft: ")]
    assert error == f"graft: error: {reason}: look at the saved batch, lower learning_rate, or train in bf16 or fp32"
    assert folder.log.count("preflight: ") == 1  # nobody tried again
    assert "going on" not in folder.log
    assert [line["step"] for line in folder.metrics] == list(range(1, number))
    for rank in range(2):
        kept = json.loads((folder.path / "fault" / f"worker-{rank}.json").read_text())
        own = steps[number - 1][rank::2]
        assert kept["reason"] == reason
        assert kept["batches"] == [
            {"position": batch.position, "ids": [f"t{one}" for one in batch.rows]} for batch in own
        ]
        tensors = load_file(folder.path / "fault" / f"worker-{rank}.safetensors")
        for index, batch in enumerate(own):
            assert len(tensors[f"{index}.input_ids"]) == len(tensors[f"{index}.labels"]) == max(1, len(batch.rows))


def test_a_loss_that_explodes_stops_the_run(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = home.recipe("exploding", max_loss=5.0, workers=1, retries=0), Folder(home.folder / "exploding")
    assert run_job(stage1.Stage1Recipe, stage1.run, summary="", argv=home.command(recipe)[3:]) == 2
    assert "graft: error: the loss exploded to 5.6 at step 1: look at the saved batch" in capsys.readouterr().err
    assert len(json.loads((folder.path / "fault" / "worker-0.json").read_text())["batches"]) == recipe.step_batches
    assert not (folder.path / "checkpoints").exists()


def test_a_node_goes_and_another_comes(home: Home, undisturbed: Folder, epoch_batches: int) -> None:
    folder = Folder(home.folder / "node")
    with home.driver(home.recipe("node")) as driver:
        until(lambda: in_mid_epoch(folder, epoch_batches)() or driver.poll() is not None)
        home.machines.kill(home.machines.node_of(processes(TRAINING)[0]))
        home.machines.add()
        said, _ = driver.communicate(timeout=2 * DEADLINE_S)
    assert driver.returncode == 0, said
    assert resumption(folder).step > 0
    is_as(folder, undisturbed)
