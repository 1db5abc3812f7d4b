"""Test --plan: it prints what the run would do, from shapes or from real data, and starts nothing."""

import re
import subprocess
import sys

import pytest

from graft.config import read_recipe
from graft.processor import GraftProcessor
from jobs import stage1, stage2
from jobs.common.cli import run_job
from jobs.training.batches import plan_run
from tests.support import tiny_models
from tests.support.paths import ROOT
from tests.support.plans import never, number
from tests.support.speech_corpus import corpus, row

RECIPES = ROOT / "jobs" / "recipes"


def plan_of(*arguments: str, stage: int = 1) -> int:
    if stage == 1:
        return run_job(stage1.Stage1Recipe, never, summary="", plan=stage1.plan, argv=[*arguments, "--plan"])
    return run_job(stage2.Stage2Recipe, never, summary="", plan=stage2.plan, argv=[*arguments, "--plan"])


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("plan") / "graft"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpus(tmp_path_factory.mktemp("plan") / "train.parquet", [row(f"t{seed}", seed) for seed in range(24)])


def test_a_known_pair_is_planned_without_its_weights(capsys):
    recipe = str(RECIPES / "fast-7b-stage1.yaml")
    assert (
        plan_of("--recipe", recipe, "model=fast-7b", "--hours", "250", "--price", "3.5", "--device", "NVIDIA H200") == 0
    )
    text = capsys.readouterr().out
    assert number(text, r"projector # M") == 4.6
    assert number(text, r"# M without adapters") == 8932.9
    assert number(text, r"data +# clips") == 90_000
    # 33 samples/s were computed with the encoder's whole window and 20 more text tokens.
    assert number(text, r"speed +# samples/s") == pytest.approx(41, rel=0.02)
    hours = 90_000 / number(text, r"speed +# samples/s") / 3600
    assert number(text, r"time +# h") == pytest.approx(hours, rel=0.01)
    assert number(text, r"device hours, # at 3.5") == pytest.approx(hours * 3.5, rel=0.01)
    assert number(text, r"zero 2 +#") == pytest.approx(17.88, rel=0.01)
    assert re.search(r"zero 2 .*<- this recipe", text)
    assert text.count("this recipe") == 1


def test_the_plan_of_several_workers_tells_what_their_network_costs(capsys):
    recipe = ["--recipe", str(RECIPES / "fast-7b-stage1.yaml"), "model=fast-7b", "workers=8", "--hours", "250"]
    assert plan_of(*recipe, "--device", "h100") == 0
    network = capsys.readouterr().out.partition("network ")[2]
    assert re.search(r"GB +NVLink +25 Gbit/s +100 Gbit/s +400 Gbit/s\n", network)
    assert re.search(r"zero 2 +0\.024 .*<- this recipe", network)
    # An L40S has no NVLink, and ZeRO-3 then sends 27 GB through the network of 10 Gbit/s.
    assert plan_of(*recipe, "--device", "l40s", "--network_gbit", "10") == 0
    network = capsys.readouterr().out.partition("network ")[2]
    assert re.search(r"GB +10 Gbit/s\n", network)
    assert number(network, r"zero 3 +26\.839 +#") == pytest.approx(26.839 * 8 / 10, rel=1e-3)
    assert plan_of(*recipe, "--network_gbit", "0") == 2
    assert "network_gbit" in capsys.readouterr().err


@pytest.mark.processes
def test_a_plan_neither_imports_ray_nor_writes(tmp_path):
    code = "import sys; from jobs import stage1\nsys.exit(stage1.main(argv=sys.argv[1:]) or 'ray' in sys.modules)"
    command = [sys.executable, "-c", code, "model=small", "out=results", "--plan"]
    result = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "<- this recipe" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_worker_and_no_more_is_counted(capsys):
    def rate(*arguments: str) -> float:
        assert plan_of("model=fast-2b", *arguments) == 0
        return number(capsys.readouterr().out, r"speed +# samples/s")

    one = rate("workers=1")
    assert rate("workers=8") == pytest.approx(8 * one, rel=0.01)
    assert rate("workers=8", "step_batches=16") == pytest.approx(8 * one, rel=0.01)
    assert rate("workers=8", "step_batches=4") == pytest.approx(4 * one, rel=0.01)
    assert rate("--share", "0.9") == pytest.approx(2 * one, rel=0.01)
    assert rate("gradient_checkpointing=true") < 0.8 * one
    assert rate("epochs=10", "encoder_cache=c") > rate("epochs=2", "encoder_cache=c") > one


def test_ctc_prealignment_needs_no_language_model(capsys):
    recipe = str(RECIPES / "fast-7b-stage1.yaml")
    assert plan_of("--recipe", recipe, "model=fast-7b", "objective=ctc") == 0
    text = capsys.readouterr().out
    assert number(text, r"ddp +#") < 2
    assert number(text, r"work +# TFLOP") < 1
    assert "99% of it the encoder's" in text or "100% of it the encoder's" in text
    assert "zero 3" not in text
    assert plan_of("--recipe", recipe, "model=fast-7b", "objective=ctc", "token_noise=0.2") == 2
    assert "objective=ctc does not use it" in capsys.readouterr().err


def test_stage_2_counts_its_adapters(capsys):
    recipe = str(RECIPES / "fast-7b-stage2.yaml")
    assert plan_of("--recipe", recipe, "model=fast-7b", stage=2) == 0
    text = capsys.readouterr().out
    assert number(text, r"lora # M") == 161.5
    assert number(text, r"# M trained") == 166.1
    assert number(text, r"ddp +#") == pytest.approx(8.84, rel=0.01)
    assert "zero 3" not in text
    assert plan_of("--recipe", recipe, "model=fast-7b", "quantize=none", "lora.encoder=true", stage=2) == 0
    text = capsys.readouterr().out
    assert number(text, r"lora # M") > 161.5
    assert number(text, r"ddp +#") > 17
    assert "zero 3" in text


@pytest.mark.parametrize(
    "settings", [["epochs=3", "token_budget=400", "step_batches=2"], ["no_speech=0.5", "augment.speed=[0.8, 1.2]"]]
)
def test_data_is_planned_as_it_is_trained(graft, data, capsys, settings):
    assert plan_of(f"model={graft}", f"data={data}", *settings) == 0
    text = capsys.readouterr().out
    recipe = read_recipe(stage1.Stage1Recipe, None, [f"model={graft}", f"data={data}", "out=o", *settings])
    plan = plan_run(recipe, GraftProcessor.from_pretrained(graft))[-1]
    assert number(text, r"data +# clips") == sum(len(epoch.rows) for epoch in plan.epochs)
    assert number(text, r"steps +#,") == plan.step_count(recipe.step_batches or 1)
    assert number(text, r"padding #%") == pytest.approx(100 * plan.padding_waste(), abs=0.06)
    assert number(text, r"# of them labels") == sum(epoch.label_counts.sum() for epoch in plan.epochs)
    assert "as planned" in text
    assert number(text, r"reading +a window: up to # clips and") == 24
    assert number(text, r"memory: about # GB for the one reader") == pytest.approx(0.6, abs=0.1)
    assert number(text, r"texts, # GB for each loader") == pytest.approx(0.6, abs=0.1)
    assert "lower window_clips" not in text
    assert plan_of(f"model={graft}", f"data={data}", *settings, "max_steps=1") == 0
    assert number(capsys.readouterr().out, r"steps +#,") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=small", "--device", "abacus"], "--device abacus is not known: give one of b200, gh200, h200"),
        (["model=small", "--price", "free"], "price=free: give a number of at least 0 or null"),
        (["model=small", "token_budget=10"], "a clip makes 299 tokens, more than token_budget=10"),
        (["model=medium-9b"], "medium-9b can't be read as a graft checkpoint"),
        (["data=d"], "key model is required"),
    ],
)
def test_wrong_arguments_end_in_one_line(capsys, arguments, words):
    assert plan_of(*arguments) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_data_is_not_read_before_the_graft_is_built(capsys):
    assert plan_of("--recipe", str(RECIPES / "quality-2b-stage1.yaml"), "model=quality-2b") == 0
    assert "assumed, as data is read once the graft is built" in capsys.readouterr().out
