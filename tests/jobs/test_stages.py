"""Tests of both stages and the commands after them with Ray Train, DeepSpeed and NF4, on a tiny graft and noise."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.audio.chunking import windows
from graft.audio.clip import read_audio
from graft.checkpoints.lora import LORA_TARGETS
from graft.config import recipe_yaml
from graft.errors import OutputError
from graft.inference.transcriber import open_transcriber
from graft.inference.transcript import Transcript
from graft.text.wer import score
from graft.training.stages import ComputeSettings, Stage, open_for_stage
from jobs import check, evaluate, merge, stage1, stage2
from jobs.evaluation.training_runs import training_runs
from tests.support import tiny_models
from tests.support.jobs import left_by_evaluate
from tests.support.paths import ROOT
from tests.support.speech_corpus import BROKEN, corpus, row, save_tiny_whisper

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("ray_started")]

CHECKPOINT_EVERY = 2
KILL_S = 120
LEFT_BY_A_STAGE = {
    "recipe.yaml",
    "log.txt",
    "metrics.jsonl",
    "curves.png",
    "plan.sha256",
    "checkpoints",
    "projector.safetensors",
    "stage.json",
    "result.json",
}


LANGUAGE_MODEL = ("attention of the language model", "MLPs of the language model")


@dataclass(frozen=True)
class Home:
    """Write a tiny graft, 25 training clips and 5 other clips; one clip of each set cannot be decoded."""

    folder: Path
    graft: str
    train: str
    other: str

    def out(self, name: str) -> str:
        return str(self.folder / name)

    def stage1_recipe(self, out: str, **changed: Any) -> stage1.Stage1Recipe:
        settings = {
            "model": self.graft,
            "data": [self.train],
            "out": self.out(out),
            "epochs": 20,
            "token_budget": 400,
            "max_masked": 0.25,
            "learning_rate": 2e-2,
            "warmup_steps": 3,
            "dtype": "fp32",
            "workers": 2,
            "data_workers": 1,
            "log_every": 1,
            "checkpoint_every": CHECKPOINT_EVERY,
        }
        return stage1.Stage1Recipe.model_validate({**settings, **changed})


@pytest.fixture(scope="module")
def address(ray_started: None) -> str:
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("stages")
    train = [*(row(f"t{seed}", seed) for seed in range(24)), row("broken", 24, **BROKEN)]
    other = [*(row(f"u{seed}", 100 + seed) for seed in range(4)), row("broken", 104, **BROKEN)]
    graft = tiny_models.save_tiny_graft(folder / "graft", base_digests={"audio": "sha256:a", "text": "sha256:b"})
    return Home(folder, str(graft), corpus(folder / "train.parquet", train), corpus(folder / "other.parquet", other))


@pytest.fixture(scope="module")
def first(home: Home) -> Path:
    """Run stage 1 without a disturbance."""
    recipe = home.stage1_recipe("stage1")
    result = stage1.run(recipe)
    assert result == json.loads(Path(recipe.out, "result.json").read_text())
    return Path(recipe.out)


@pytest.fixture(scope="module")
def resumed(home: Home, address: str) -> Path:
    """Run stage 1, kill its process group after a checkpoint, and run it again."""
    recipe = home.stage1_recipe("resumed")
    (home.folder / "resumed.yaml").write_text(recipe_yaml(recipe))
    command = [sys.executable, "-m", "jobs.stage1", "--recipe", str(home.folder / "resumed.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": address}
    with open(home.folder / "killed.log", "w") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + KILL_S
        while (
            not list(Path(recipe.out).glob("checkpoints/step-*"))
            and driver.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        assert driver.poll() is None, (home.folder / "killed.log").read_text()
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
    assert not Path(recipe.out, "result.json").exists()
    stage1.run(recipe)
    return Path(recipe.out)


@pytest.fixture(scope="module")
def second(home: Home, first: Path) -> Path:
    """Run stage 2 on stage 1's projector: QLoRA on one worker, cut short by max_steps, with validations."""
    validation = {"data": home.other, "every": 2, "transcripts": 5}
    changed = {
        "workers": 1,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "backend": "torch",
        "validation": validation,
    }
    shared = home.stage1_recipe("stage2", **changed).model_dump(exclude={"objective", "letters"})
    recipe = stage2.Stage2Recipe.model_validate({**shared, "projector": str(first), "lora": {"rank": 4, "alpha": 8}})
    assert recipe.quantize == "nf4"
    stage2.run(recipe)
    return Path(recipe.out)


@pytest.fixture(scope="module")
def merged(home: Home, second: Path) -> Path:
    merge.run(merge.MergeRecipe(model=str(second), out=home.out("merged")))
    return Path(home.out("merged"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage_of(folder: Path) -> dict[str, Any]:
    """Read a stage's stage.json without the rate of its texts' tokens, which must be there."""
    stage = json.loads((folder / "stage.json").read_text())
    assert stage.pop("tokens_per_s") >= 10
    return stage


def test_stage1_leaves_what_it_promises(home: Home, first: Path) -> None:
    assert {path.name for path in first.iterdir()} == LEFT_BY_A_STAGE | {"skipped.jsonl"}
    result, metrics = json.loads((first / "result.json").read_text()), lines(first / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, result["steps"] + 1))
    assert all(line["total_steps"] == result["steps"] > 4 * CHECKPOINT_EVERY for line in metrics)
    assert (result["loss_first"], result["loss_last"]) == (metrics[0]["loss"], metrics[-1]["loss"])
    assert result["loss_last"] < result["loss_first"] - 0.02
    assert all(line["samples_per_s"] > 0 and line["audio_s_per_s"] > 0 and line["grad_norm"] > 0 for line in metrics)
    assert metrics[-1]["left_s"] == 0
    assert (first / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert stage_of(first) == {"stage": 1, "graft": "../graft"}
    skipped = lines(first / "skipped.jsonl")
    assert [clip["id"] for clip in skipped] == ["broken"]  # once, whatever the epochs
    assert "broken.flac" in skipped[0]["reason"]
    log = (first / "log.txt").read_text()
    assert log.startswith("preflight: ")
    assert (
        len(re.findall(r"^step .* loss .* samples/s .* audio-s/s .* left \d+:\d\d$", log, re.MULTILINE))
        == result["steps"]
    )
    trained = load_file(first / "projector.safetensors")["linear.weight"]
    assert not torch.equal(trained, load_file(Path(home.graft, "model.safetensors"))["audio_projector.linear.weight"])


@pytest.fixture(scope="module")
def prealigned(home: Home) -> Path:
    validation = {"data": [home.other], "every": 10, "transcripts": 1, "wer_clips": 3}
    changed = {"max_steps": 30, "learning_rate": 5e-3, "validation": validation}
    recipe = home.stage1_recipe("ctc", objective="ctc", backend="torch", **changed)
    stage1.run(recipe)
    return Path(recipe.out)


@pytest.mark.slow
def test_ctc_prealignment_is_a_start_for_transcripts(home: Home, prealigned: Path) -> None:
    losses = [line["loss"] for line in lines(prealigned / "metrics.jsonl") if "loss" in line]
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]
    assert (prealigned / "log.txt").read_text().startswith("preflight: ")
    told = re.findall(
        r"^step 30  validation loss (.*)  WER (.*)% .* of 3 clips \(english\)\n(  .*\n)",
        (prealigned / "log.txt").read_text(),
        re.MULTILINE,
    )
    validations = [line for line in lines(prealigned / "metrics.jsonl") if "validation_wer" in line]
    assert [line["step"] for line in validations] == [10, 20, 30]
    assert float(told[0][1]) == pytest.approx(100 * validations[-1]["validation_wer"], abs=0.06)
    assert told[0][2].startswith("  u0: ")  # both workers write, and one clip is shown
    started, _ = open_for_stage(Stage(1, projector=str(prealigned)), home.graft, ComputeSettings("fp32"))
    expected = load_file(prealigned / "projector.safetensors")["linear.weight"]
    torch.testing.assert_close(started.audio_projector.linear.weight.data, expected)


@pytest.mark.slow
def test_stage1_starts_from_the_projector_of_its_recipe(home: Home, prealigned: Path) -> None:
    after = home.stage1_recipe("after-ctc", projector=str(prealigned), max_steps=1, learning_rate=1e-30)
    stage1.run(after)
    started, expected = (
        load_file(Path(folder, "projector.safetensors"))["linear.weight"] for folder in (after.out, prealigned)
    )
    torch.testing.assert_close(started, expected)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(first: Path, resumed: Path) -> None:
    metrics, expected = lines(resumed / "metrics.jsonl"), lines(first / "metrics.jsonl")
    (step,) = re.findall(
        r"^going on at step (\d+), batch \d+ of the plan$", (resumed / "log.txt").read_text(), re.MULTILINE
    )
    assert 0 < int(step) < len(expected)
    assert int(step) % CHECKPOINT_EVERY == 0
    assert {path.name for path in resumed.iterdir()} == LEFT_BY_A_STAGE | {"skipped.jsonl"}
    assert [clip["id"] for clip in lines(resumed / "skipped.jsonl")] == ["broken"]
    for key in ("step", "loss", "learning_rate", "grad_norm"):
        assert [line[key] for line in metrics] == pytest.approx([line[key] for line in expected], rel=1e-5, abs=1e-6), (
            key
        )
    torch.testing.assert_close(
        load_file(resumed / "projector.safetensors"), load_file(first / "projector.safetensors"), rtol=0, atol=1e-6
    )
    was, undisturbed = (json.loads((folder / "result.json").read_text()) for folder in (resumed, first))
    for key in ("steps", "clips", "audio_s", "loss_first", "loss_last"):
        assert was[key] == pytest.approx(undisturbed[key], rel=1e-5), key


def test_a_stage_that_is_done_is_left_alone(home: Home, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    again = stage1.run(home.stage1_recipe("stage1", log_every=5))  # how it runs may differ, what it computes may not
    assert again == json.loads((first / "result.json").read_text())
    assert "is done already" in capsys.readouterr().out
    with pytest.raises(
        OutputError, match=r"stage1 holds another recipe's results: learning_rate was 0.02 there and is 0.5 now"
    ):
        stage1.run(home.stage1_recipe("stage1", learning_rate=0.5))
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_stage2_stops_at_max_steps_and_leaves_adapters_too(second: Path) -> None:
    assert {path.name for path in second.iterdir()} - {"skipped.jsonl"} == LEFT_BY_A_STAGE | {
        "adapter_config.json",
        "adapter_model.safetensors",
        "transcripts.jsonl",
    }
    metrics = lines(second / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]
    result = json.loads((second / "result.json").read_text())
    validations = {line["step"]: line["validation_loss"] for line in metrics if "validation_loss" in line}
    assert list(validations) == [2, 4, 6]
    assert result["validation_loss"] == validations[result["best_step"]] == min(validations.values())
    heard = lines(second / "transcripts.jsonl")
    assert [(line["step"], line["id"]) for line in heard] == [
        (step, name) for step in (2, 4, 6) for name in ("u0", "u1", "u2", "u3")
    ]  # not the broken one
    assert (result["steps"], result["loss_last"] < result["loss_first"]) == (6, True)
    assert stage_of(second) == {"stage": 2, "graft": "../graft"}


@pytest.mark.slow
def test_zero_3_trains_as_zero_2_does(home: Home, first: Path) -> None:
    """ZeRO-3 over two workers is tested with validations, whose transcripts need all workers."""
    validation = {"data": home.other, "every": 8, "transcripts": 1}
    losses = {}
    for zero_stage in (2, 3):
        recipe = home.stage1_recipe(f"zero{zero_stage}", zero_stage=zero_stage, max_steps=8, validation=validation)
        stage1.run(recipe)
        losses[zero_stage] = [
            line.get("loss", line.get("validation_loss")) for line in lines(Path(recipe.out, "metrics.jsonl"))
        ]
    assert losses[3] == pytest.approx(losses[2], abs=1e-5)
    heard = [lines(Path(home.out(f"zero{zero_stage}"), "transcripts.jsonl")) for zero_stage in (2, 3)]
    assert heard[0] == heard[1]


@pytest.mark.slow
def test_stage2_goes_on_from_a_merged_grafts_own_projector(home: Home, merged: Path) -> None:
    changed = {
        "model": str(merged),
        "workers": 1,
        "max_steps": 1,
        "learning_rate": 1e-6,
        "warmup_steps": 0,
        "backend": "torch",
    }
    shared = home.stage1_recipe("further", **changed).model_dump(exclude={"objective", "letters"})
    recipe = stage2.Stage2Recipe.model_validate({**shared, "quantize": "none", "lora": {"rank": 4, "alpha": 8}})
    stage2.run(recipe)
    assert stage_of(Path(recipe.out)) == {"stage": 2, "graft": "../merged"}
    trained, own = (load_file(Path(folder, "projector.safetensors")) for folder in (recipe.out, merged / "adapter"))
    torch.testing.assert_close(trained, own, rtol=0, atol=1e-5)


def in_memory(name: str) -> str:
    """Map a parameter's name on disk to its name in the model."""
    return re.sub(r"^model\.layers", "model.language_model.layers", name)


def test_nothing_but_projector_and_adapted_matrices_changed(
    home: Home, first: Path, second: Path, merged: Path
) -> None:
    merge.run(merge.MergeRecipe(model=str(first), out=home.out("merged1")))
    untrained, after1, after2 = (
        load_file(Path(folder, "model.safetensors")) for folder in (home.graft, home.out("merged1"), merged)
    )
    projector = {name for name in untrained if name.startswith("audio_projector.")}
    adapted = {name for name in untrained if re.fullmatch(LORA_TARGETS, in_memory(name).removesuffix(".weight"))}
    assert len(adapted) == 2 * 7  # layers x matrices
    for after, trained in ((after1, projector), (after2, projector | adapted)):
        assert after.keys() == untrained.keys()
        assert all(after[name].dtype == untrained[name].dtype for name in untrained)
        assert {name for name in untrained if not torch.equal(after[name], untrained[name])} == trained
    for folder, after in ((first, after1), (second, after2)):
        for name, tensor in load_file(folder / "projector.safetensors").items():
            assert torch.equal(after[f"audio_projector.{name}"], tensor)
    adapters = load_file(merged / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * len(adapted)
    for name in adapted:
        a, b = (
            adapters[f"base_model.model.{in_memory(name).removesuffix('weight')}lora_{part}.weight"] for part in "AB"
        )
        torch.testing.assert_close(after2[name], untrained[name] + 8 / 4 * b @ a, rtol=0, atol=1e-6)


def test_every_checkpoint_hears(
    home: Home, first: Path, second: Path, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [
        check.run(check.CheckRecipe(model=str(folder), data=[home.train], clips=3))[0]
        for folder in (first, second, merged)
    ]
    assert changes[0] > 1e-6
    assert changes[1] == pytest.approx(changes[2], rel=1e-4)  # merged or not, the same model
    assert capsys.readouterr().out.count(" hears: other audio changes the answer's logits by ") == 3


def test_the_stages_that_led_to_a_model_are_described(merged: Path) -> None:
    first, second = training_runs(str(merged))
    for run, changed in ((first, {"projector"}), (second, {"projector", *LANGUAGE_MODEL})):
        parts = {one["part"]: one for one in run["weights"]}
        assert {part for part, one in parts.items() if one["changed"]} == changed
        assert all((one["relative_change"] > 0) == (part in changed) for part, one in parts.items())
        assert {"audio encoder", "text embeddings"} < parts.keys()
        steps = run["curves"]["step"]
        assert steps == sorted(steps)
        assert all(len(values) == len(steps) for values in run["curves"].values())
        assert run["curves"]["loss"][0] > run["curves"]["loss"][-1]


@pytest.fixture(scope="module")
def whisper(home: Home) -> str:
    return save_tiny_whisper(home.folder / "whisper")


@pytest.mark.slow
def test_evaluate_scores_what_was_heard(home: Home, merged: Path, whisper: str) -> None:
    data = {"trained": home.train, "unseen": home.other}
    settings = {
        "model": str(merged),
        "data": data,
        "out": home.out("evaluation"),
        "baseline": whisper,
        "batch_clips": 4,
        "windows": True,
    }
    recipe = evaluate.EvaluateRecipe.model_validate({**settings, "limit": 5, "checks": 10})
    report = evaluate.evaluate(recipe)
    out = Path(recipe.out)
    written_report, predictions = left_by_evaluate(out)
    assert report == written_report
    heard = {name: [line for line in predictions if line["set"] == name] for name in data}
    swapped = [line for line in map(json.loads, (out / "checks.jsonl").open()) if line["set"] == "swapped"]
    assert [line["id"] for line in heard["trained"]] == [f"t{seed}" for seed in range(5)]
    assert [line["id"] for line in swapped] == [line["id"] for name in data for line in heard[name]]
    assert [line["id"] for line in heard["unseen"]] == ["u0", "u1", "u2", "u3", "broken"]

    # The rates are those of the texts that were written down; of what could not be read, all words are deletions.
    assert {(name, kind) for name, one in report["sets"].items() for kind in one["systems"]} == {
        (name, kind) for name in data for kind in ("graft", "whisper")
    }
    for name, one in report["sets"].items():
        for kind, scores in one["systems"].items():
            wanted = score([line["text"] for line in heard[name]], [line[kind] or "" for line in heard[name]])
            assert (scores["clips"], scores["answered"]) == (5, 4 if name == "unseen" else 5)
            assert (scores["wer"], scores["cer_raw"]) == pytest.approx((wanted.wer, wanted.cer_raw))
    failed = report["sets"]["unseen"]["systems"]["graft"]["failed"]
    assert failed.keys() == {"broken"}
    assert failed["broken"].startswith("not readable as audio")
    assert (heard["unseen"][4]["graft"], heard["unseen"][4]["whisper"]) == (None, None)
    assert all(rate > 0 for rate in report["rtfx"].values())

    # The texts are the models' own, whatever shared their batches, and a swapped clip's is that of the audio it got.
    rows = [row(f"t{seed}", seed) for seed in range(5)]
    clips = [read_audio(clip["wav"]["bytes"]) for clip in rows]
    transcriber = open_transcriber(merged, chunker=windows)
    texts = [transcript.text for transcript in transcriber.transcribe_many(clips) if isinstance(transcript, Transcript)]
    transcriber.close()
    assert [line["text"] for line in heard["trained"]] == [clip["text"] for clip in rows]
    assert [line["graft"] for line in heard["trained"]] == texts
    assert len(set(texts)) > 1
    assert [line["audio_id"] for line in swapped[:4]] == ["t1", "t2", "t3", "t4"]
    assert [line["hypothesis"] for line in swapped[:4]] == texts[1:]
    checks = {one["name"]: one for one in report["honesty"]["checks"]}
    assert checks["swapped_audio"]["numbers"]["clips"] == len(swapped)
    assert checks["overlap"]["ids"][:5] == [["trained", f"t{seed}"] for seed in range(5)]
    baseline = open_transcriber(whisper, chunker=windows)
    assert [line["whisper"] for line in heard["trained"]] == [one.text for one in baseline.transcribe_many(clips)]
    baseline.close()

    # What is there stays as it is.
    written = (out / "report.json").stat().st_mtime_ns
    assert evaluate.evaluate(recipe) == report
    with pytest.raises(OutputError, match="evaluation holds another recipe's results: limit was 5 there and is 2 now"):
        evaluate.evaluate(recipe.model_copy(update={"limit": 2}))
    assert report == json.loads((out / "report.json").read_text())
    assert (out / "report.json").stat().st_mtime_ns == written
