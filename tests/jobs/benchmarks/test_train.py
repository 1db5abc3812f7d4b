"""The training benchmarks on a tiny graft: what they print and write, and that what graft is measured against does the same work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from graft.processor import GraftProcessor
from graft.training.backends import trained_parameters
from graft.training.stages import ComputeSettings, Stage, stage_model
from jobs.bench import main as bench
from jobs.benchmarks.batches import BATCH_CLIPS, in_order, length_grouped, made_examples, padded, planned
from jobs.benchmarks.ingest import STARTING_STEPS, bench_ingest
from jobs.benchmarks.peers import AllLogits, FlamingoStep, SeedStep, flamingo_inputs, seed_inputs
from jobs.benchmarks.speech import durations
from jobs.benchmarks.workers import bench_workers
from tests.support import tiny_models

pytestmark = pytest.mark.usefixtures("thread_count")


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("bench") / "graft"))


def test_steps_are_printed_and_written_as_ratios(
    graft: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.json"
    arguments = ["--graft", graft, "--clips", "6", "--repetitions", "1", "--json", str(file)]
    assert bench(["train", "--only", "step,gains", *arguments]) == 0
    numbers = json.loads(file.read_text())
    assert list(numbers) == ["step", "gains"]
    assert numbers["step"]["graft ratio"] == numbers["gains"]["graft cpu_ratio"] == 1
    assert all(value > 0 for part in numbers.values() for name, value in part.items() if name != "load_average")
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["seed-style"][-1] == f"{numbers['step']['seed-style cpu_ratio']:.2f}"
    assert lines["arrival order"][-2] == f"{numbers['gains']['arrival order ratio']:.2f}"


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(["train", "--only", "step,steps"])
    assert "steps: choose from step, gains, ingest, workers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option", "told"),
    [
        ("bulk", "--recordings=0", "0 is less than one"),
        ("serve", "--clients=-1", "-1 is less than one"),
        ("scale", "--workers=x", "invalid positive_int value: 'x'"),
        ("features", "--seconds=nan", "nan is not a finite number above 0"),
    ],
)
def test_numbers_that_are_nothing_are_refused(
    name: str, option: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench([name, option])
    assert ended.value.code == 2
    assert f"argument {option.partition('=')[0]}: {told}" in capsys.readouterr().err


def test_a_folder_that_is_no_graft_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["train", "--only", "step", "--graft", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"graft: error: {tmp_path} has no config.json")


@pytest.mark.parametrize("count", [8, 24, 1000])
def test_clips_last_10_s_on_average(count: int) -> None:
    found = durations(count, np.random.default_rng(0))
    assert len(found) == count
    assert found.mean() == pytest.approx(10, abs=1e-6)
    assert 2 <= found.min() < 5 < 18 < found.max() <= 20


def test_the_seeds_step_and_logits_everywhere_come_to_grafts_own_loss(graft: str) -> None:
    model, processor = stage_model(Stage(1), graft, ComputeSettings("fp32"))
    for settings in (model.config, processor):
        settings.audio_pool, settings.audio_context = 1, "full"
    (inputs,) = padded(processor, made_examples(processor, 2), [[0, 1]])
    own = model(**inputs).loss
    torch.testing.assert_close(AllLogits(model)(**inputs), own)
    torch.testing.assert_close(SeedStep(model)(**seed_inputs(inputs)), own)


def test_flamingo_takes_grafts_tokens_and_trains_its_projector_alone(graft: str) -> None:
    model, processor = stage_model(Stage(1), graft, ComputeSettings("bf16"))
    peer = FlamingoStep(model.config)
    (inputs,) = padded(processor, made_examples(processor, 2), [[0, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        peer(**flamingo_inputs(inputs)).backward()
    trained = trained_parameters(peer)
    assert all(
        "multi_modal_projector" in name and parameter.grad.abs().sum() > 0 for name, parameter in trained.items()
    )
    assert len(trained) == 4


def test_every_way_to_batch_takes_every_clip_once(graft: str) -> None:
    examples = made_examples(GraftProcessor.from_pretrained(graft), 10)
    ways = [[batch.rows for batch in planned(examples)], length_grouped(examples), in_order(range(10))]
    assert [sorted(index for batch in way for index in batch) for way in ways] == [list(range(10))] * 3
    assert [len(batch) for batch in ways[1]] == [len(batch) for batch in ways[2]] == [BATCH_CLIPS, BATCH_CLIPS, 2]


@pytest.mark.slow
def test_two_workers_train_the_same_clips_as_one(graft: str) -> None:
    numbers = bench_workers(graft, clips=16, repetitions=1).numbers
    assert numbers["clips"] > BATCH_CLIPS
    assert numbers["two_to_one"] > 0


@pytest.mark.slow
def test_ray_keeps_the_device_of_a_7b_graft_busy(graft: str) -> None:
    """The step sleeps as long as an H200 takes; 2 loaders and Ray may not keep it waiting."""
    numbers = bench_ingest(graft, clips=800).numbers
    assert numbers["steps"] > STARTING_STEPS
    assert numbers["data_wait_percent_mean"] < 5
    assert numbers["fed_to_bare"] > 0.95
