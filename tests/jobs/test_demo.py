"""Tests of the demo's own work: the folder that it empties, its recipes, and the numbers of its summary."""

import time
from pathlib import Path

import pytest

from jobs import demo as demo_job
from jobs.common.cli import run_job
from jobs.common.outputs import claim_output
from jobs.demo import DemoRecipe
from jobs.stage1 import Stage1Recipe


def test_only_a_demos_own_folder_is_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert run_job(DemoRecipe, demo_job.run, summary="", argv=[f"out={out}"]) == 2
    fault = capsys.readouterr().err
    assert fault.startswith(f"graft: error: {out} holds something else")
    assert fault.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]

    stage = tmp_path / "stage1"
    claim_output(str(stage), Stage1Recipe(model="m", data="d", out=str(stage)))
    (stage / "projector.safetensors").write_text("days of training")
    assert run_job(DemoRecipe, demo_job.run, summary="", argv=[f"out={stage}"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (stage / "projector.safetensors").is_file()

    ours = DemoRecipe(out=str(tmp_path / "demo"))
    demo_job._empty_folder(ours)
    (tmp_path / "demo" / "summary.json").write_text("old")
    demo_job._empty_folder(ours.model_copy(update={"stage1_epochs": 9}))
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["recipe.yaml"]


def test_both_stages_read_what_the_steps_before_them_wrote(tmp_path: Path) -> None:
    recipe = DemoRecipe(out=str(tmp_path), stage1_epochs=4, stage2_epochs=5, workers=3)
    recipes = demo_job.step_recipes(recipe)
    assert recipes.keys() == {name for name, _, _ in demo_job.STEPS}
    first, second, score = (recipes[name] for name in ("stage1", "stage2", "evaluate merged"))
    before = recipes["evaluate graft"]
    assert (first.epochs, second.epochs, first.workers, second.workers) == (4, 5, 3, 3)
    assert first.backend == "deepspeed"
    assert second.quantize == recipe.quantize
    assert second.projector == first.out
    assert first.data == second.data == [score.data["trained"]]
    assert score.checks > 0
    assert score.limit is not None
    assert score.limit <= len(demo_job._manifest("train"))
    sources = recipes["prepare"].long_sources()
    assert [(source.split, Path(source.manifest).is_file()) for source in sources] == [
        ("train", True),
        ("unseen", True),
    ]
    assert {Path(path).name for path in (*first.data, *score.data.values())} == {source.split for source in sources}
    assert before.model == first.model == second.model != score.model
    assert before.data == {"unseen": score.data["unseen"]}


def test_every_step_has_an_estimate_that_grows_with_its_work() -> None:
    recipe = DemoRecipe()
    reference = demo_job.estimated_seconds(recipe, fp32=1.0, training=1.0)
    assert list(reference) == [name for name, _, _ in demo_job.STEPS]
    assert sum(reference.values()) < 480  # what the demo promises on the reference machine
    slow = demo_job.estimated_seconds(recipe, fp32=2.0, training=1.0)
    longer = {name for name in reference if slow[name] > reference[name]}
    assert longer == {name for name in reference if name.partition(" ")[0] in ("transcribe", "evaluate", "check")}
    more = demo_job.estimated_seconds(recipe.model_copy(update={"stage2_epochs": 9}), fp32=1.0, training=1.0)
    assert {name for name in reference if more[name] > reference[name]} == {"stage2"}


def test_the_summary_has_the_keys_that_others_read(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [("prepare", lambda recipe: 7, "rows")]
    steps += [(f"evaluate {model}", lambda recipe: time.sleep(0.06), "scores") for model in ("graft", "merged")]
    names = [name for name, _, _ in steps]
    results, seconds = demo_job._run_steps(steps, dict.fromkeys(names, DemoRecipe()), dict.fromkeys(names, 30.0))
    assert results["prepare"] == 7
    assert capsys.readouterr().out.splitlines()[1::2] == [
        "== step 1 of 3: prepare, about 30 s: rows",
        "== step 2 of 3: evaluate, about 30 s: scores",
        "== step 3 of 3: evaluate, about 30 s: scores",
    ]
    scores = {
        name: {"systems": {"graft": {"wer": place, "clips": 20}, "whisper": {"wer": place / 2}}}
        for place, name in enumerate(["trained", "unseen"])
    }
    checks = [{"name": "swapped_audio", "numbers": {"wer_swapped": 2}}]
    report = {"sets": scores, "honesty": {"checks": checks}, "rtfx": {"graft": 3.0}}
    stage = {"loss_first": 6.0, "loss_last": 1.0, "steps": 9, "seconds": 5.0}
    before = {"sets": {"unseen": {"systems": {"graft": {"wer": 3}}}}}
    results = {"stage1": stage, "stage2": stage, "evaluate graft": before, "evaluate merged": report}
    summary = demo_job._summarize(results, seconds)
    assert summary["stage1"] == summary["stage2"] == {"loss_first": 6.0, "loss_last": 1.0, "seconds": 5.0}
    assert summary["wer"] == {
        "trained": 0,
        "unseen": 1,
        "swapped": 2,
        "whisper_trained": 0,
        "whisper_unseen": 0.5,
        "unseen_as_it_comes": 3,
    }
    assert summary["clips"] == {"trained": 64, "unseen": 20, "scored": 20}
    assert summary["seconds"]["total"] == pytest.approx(summary["seconds"]["prepare"] + summary["seconds"]["evaluate"])
    assert summary["seconds"]["evaluate"] >= 0.1  # of both times
    assert summary["rtfx"] == 3.0
