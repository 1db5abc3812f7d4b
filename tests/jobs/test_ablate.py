"""Tests that jobs.ablate trains what variants share once, continues after a fault, and tabulates scores."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from graft.config import read_recipe
from graft.errors import RecipeError
from jobs.ablate import AblateRecipe, run, table, trials
from jobs.common.cli import run_job
from tests.support import tiny_models
from tests.support.paths import ROOT
from tests.support.speech_corpus import corpus, row

SMALL = ROOT / "jobs" / "recipes" / "small-ablation.yaml"
TRAINING = {
    "token_budget": 4000,
    "max_batch_clips": 4,
    "dtype": "fp32",
    "backend": "torch",
    "data_workers": 1,
    "log_every": 1,
}
CLIPS = 12


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base = {
        "build": {
            "audio_base": tiny_models.save_audio_base(tmp_path / "whisper"),
            "text_base": tiny_models.save_text_base(tmp_path / "qwen"),
            "audio_pool": 2,
        },
        "stage1": TRAINING,
        "stage2": {**TRAINING, "quantize": "none", "lora": {"rank": 4, "alpha": 4}},
    }
    settings = {
        "data": corpus(tmp_path / "train.parquet", [row(f"t{seed}", seed) for seed in range(CLIPS)]),
        "evaluate": {"test": corpus(tmp_path / "test.parquet", [row(f"u{seed}", 100 + seed) for seed in range(4)])},
        "scoring": {"batch_clips": 4},
        "base": base,
        "variants": {"rank": {"stage2": {"lora": {"rank": 2}}}},
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_started")
def test_variants_share_a_stage_and_go_on_after_a_fault(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def ablate(*arguments: str) -> int:
        return run_job(AblateRecipe, run, summary="", argv=["--recipe", str(recipe), f"out={out}", *arguments])

    assert ablate("last_stage=1", "variants={}") == 0
    assert {path.name for path in (out / "base-0").iterdir()} == {"graft", "stage1", "stage1-scored"}
    assert "stage 2" not in (out / "ablation.md").read_text()

    blocked = out / "rank-0" / "stage2"
    blocked.mkdir(parents=True)
    (blocked / "recipe.yaml").write_text("seed: 7\n")
    assert ablate() == 2
    assert "holds another recipe's results" in capsys.readouterr().err
    (done,) = json.loads((out / "ablation.json").read_text())
    assert (done["variant"], done["change"]) == ("base", "-")
    before = times(out / "base-0")

    shutil.rmtree(blocked)
    assert ablate() == 0
    assert times(out / "base-0") == before
    folders = {name: {path.name for path in (out / name).iterdir()} for name in ("base-0", "rank-0")}
    assert folders["rank-0"] == {"stage2", "stage2-scored"}
    assert folders["base-0"] == {"graft", "stage1", "stage1-scored", *folders["rank-0"]}
    adapters = json.loads((out / "rank-0" / "stage2" / "adapter_config.json").read_text())
    assert (adapters["r"], adapters["lora_alpha"]) == (2, 4)
    assert len(list((out / "encoded").rglob("*.safetensors"))) == CLIPS  # heard once for four stages

    results = json.loads((out / "ablation.json").read_text())
    assert results[0] == done
    assert [line["change"] for line in results] == ["-", "rank 2 instead of 4"]
    for line in results:
        assert line["audio_tokens_per_s"] == pytest.approx(25, abs=0.6)
        for stage, folder in (("stage1", out / "base-0"), ("stage2", out / f"{line['variant']}-0")):
            report = json.loads((folder / f"{stage}-scored" / "report.json").read_text())
            assert report["model"] == str(folder / stage)
            trained = json.loads((folder / stage / "result.json").read_text())
            assert line[stage] == {**trained, "scores": {"test": report["sets"]["test"]["systems"]["graft"]}}
            assert (trained["steps"], trained["clips"]) == (CLIPS / 4, CLIPS)

    rows = [line.strip("| ").split(" | ") for line in (out / "ablation.md").read_text().splitlines()]
    assert rows[0][:4] == ["variant", "change", "WER test, stage 2", "WER test, stage 1"]
    ordered = sorted(results, key=lambda line: line["stage2"]["scores"]["test"]["wer"])
    assert [cells[:2] for cells in rows[2:]] == [[f"{line['variant']}-0", line["change"]] for line in ordered]
    for cells, line in zip(rows[2:], ordered, strict=True):
        scores = [line[stage]["scores"]["test"] for stage in ("stage2", "stage1")]
        assert cells[2:4] == [f"{s['wer']:.1%} [{s['wer_low']:.1%}, {s['wer_high']:.1%}]" for s in scores]
        assert cells[6] == "3 / 3"
    assert capsys.readouterr().out.endswith((out / "ablation.md").read_text())

    everything = times(out)
    assert ablate() == 0  # nothing is left to do
    assert times(out).keys() == everything.keys()
    assert {name for name, time in times(out).items() if time != everything[name]} == {
        "ablation.json",
        "ablation.md",
        "recipe.yaml",
    }
    assert json.loads((out / "ablation.json").read_text()) == results


def test_ctc_prealignment_is_listed_with_its_character_error_rate() -> None:
    counts = {"loss_last": 1.5, "validation_loss": 2.0, "steps": 7, "audio_s": 9.0, "seconds": 3.0}
    rates = {"test": {"wer": 0.25, "wer_low": 0.2, "wer_high": 0.3, "cer": 0.125}}
    line = {
        "variant": "base",
        "seed": 0,
        "change": "-",
        "audio_tokens_per_s": 25.0,
        "stage1": counts | {"spelled": rates},
    }
    by_ctc = "25.0% [20.0%, 30.0%], CER 12.5%, by CTC"
    assert f"| base-0 | - | {by_ctc} | 1.5 | 2 |" in table([line])
    both = line | {"stage2": counts | {"scores": rates}}
    assert f"| base-0 | - | 25.0% [20.0%, 30.0%] | {by_ctc} | 1.5 / 1.5 | 2 / 2 |" in table([both])


def test_the_small_recipe_changes_one_thing_at_a_time() -> None:
    recipe = read_recipe(AblateRecipe, str(SMALL), ["data=d", "validation=v", "out=o"])
    base, *others = trials(recipe)
    assert {trial.variant for trial in others} == {"base", *recipe.variants}
    assert [(trial.variant, trial.seed) for trial in others if trial.seed] == [("base", 1), ("pool-1", 1)]
    builders = [trial for trial in others if trial.stage1.out.startswith(f"o/{trial.variant}-")]
    assert {trial.variant for trial in others} - {trial.variant for trial in builders} == {"rank-16", "rank-64"}
    for trial in others:
        steps = [
            (stage.epochs, stage.max_batch_clips, stage.token_budget, stage.data)
            for stage in (trial.stage1, trial.stage2)
        ]
        assert steps == [(3, 4, 8000, "d"), (1, 4, 8000, "d")]
        assert trial.stage1.objective == "ctc"
        assert trial.stage1.encoder_cache == trial.stage2.encoder_cache == "o/encoded"
        assert trial.stage2.validation is not None
        assert trial.stage2.validation.data == "v"
        assert {trial.build.seed, trial.stage1.seed, trial.stage2.seed} == {trial.seed}
        own = [base.build.model_dump(), base.stage2.lora.model_dump()]
        changed = [trial.build.model_dump(), trial.stage2.lora.model_dump()]
        different = {key for was, now in zip(own, changed, strict=True) for key in was if was[key] != now[key]} - {
            "out",
            "seed",
        }
        assert len(different - {"alpha"}) == (trial.variant != "base")


def test_what_can_not_be_compared_is_refused_at_once(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--recipe", str(recipe), f"out={tmp_path / 'out'}"]
    for argument, words in [
        ("variants.late.stage1.epoch=2", "late.stage1: recipe: unknown key epoch=2 (did you mean 'epochs'?"),
        ("variants.late.stage3.epochs=2", "variants.late.stage3"),
        ("variants.late.stage2.model=m", "late.stage2.model is for `graft ablate` to give: leave it out"),
        ("variants.base.build.audio_pool=4", "variants.base: that name is the unchanged recipe's"),
        ("seeds.other=[1]", "seeds.other: there is no such variant: give base, rank"),
        ("evaluate={}", "there is nothing to score: give evaluate.NAME=DATA, or validation=DATA"),
        ("scoring.workers=0", "scoring: recipe: workers=0"),
    ]:
        assert run_job(AblateRecipe, run, summary="", argv=[*given, argument]) == 2
        errors = capsys.readouterr().err
        assert words in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="encoder_cache needs unchanged clips"):
        run(read_recipe(AblateRecipe, str(recipe), [f"out={tmp_path / 'out'}", "base.stage1.augment.speed=[1.1]"]))
