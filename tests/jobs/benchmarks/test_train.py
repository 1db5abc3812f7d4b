"""The training benchmarks on a tiny graft: what they print and write, and that graft's peers do the same work."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from graft.processor import Example
from graft.training.backends import trainable_parameters
from graft.training.stages import ComputeSettings, Stage, open_for_stage
from jobs.bench import main as bench
from jobs.benchmarks.scale import LOADERS, bench_ingest
from jobs.benchmarks.speech import durations, spoken_clips
from jobs.benchmarks.training_step import (
    BATCH_CLIPS,
    Inputs,
    Way,
    _compare,
    all_logits_loss,
    compute_settings,
    flamingo_inputs,
    flamingo_model,
    in_arrival_order,
    length_grouped,
    planned,
    way,
)
from tests.support import tiny_models

pytestmark = pytest.mark.usefixtures("thread_count")


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("bench") / "graft"))


@pytest.mark.slow
def test_steps_are_printed_and_written_as_ratios(graft: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.json"
    arguments = ["--model", graft, "--clips", "6", "--repetitions", "1", "--json", str(file)]
    assert bench(["train", "--only", "step,gains", *arguments]) == 0
    numbers = json.loads(file.read_text())
    assert list(numbers) == ["step", "gains"]
    assert numbers["step"]["graft x wall"] == numbers["gains"]["graft x CPU"] == 1
    assert all(value > 0 for part in numbers.values() for name, value in part.items() if name != "load_average")
    lines = {line.split("  ")[0]: line.split() for line in capfd.readouterr().out.splitlines()}
    assert lines["seed-style"][-1] == f"{numbers['step']['seed-style x CPU']:.2f}"
    assert lines["arrival order"][-2] == f"{numbers['gains']['arrival order x wall']:.2f}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--only", "step,steps"], "--only: steps: choose from step, gains, ingest, workers"),
        (["bulk", "--only", "memory,disk"], "--only: disk: choose from pipeline, peers, memory, bf16"),
        (["train", "--repetitions=0"], "--repetitions: 0 is not a finite number above 0"),
        (["serve", "--clients=-1"], "--clients: -1 is not a finite number above 0"),
        (["scale", "--consumers", "8", "0"], "--consumers: 0 is not a finite number above 0"),
        (["scale", "--workers=x"], "--workers: invalid int value: 'x'"),
        (["features", "--seconds=nan"], "--seconds: nan is not a finite number above 0"),
        (["engine", "--batch-clips", "many"], "--batch-clips: invalid int value: 'many'"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(arguments)
    assert ended.value.code == 2
    assert f"error: argument {message}\n" in capsys.readouterr().err


def test_a_folder_that_is_no_graft_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["train", "--only", "step", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"graft: error: {tmp_path} has no config.json")


@pytest.mark.parametrize("count", [8, 24, 1000])
def test_clips_last_10_s_on_average(count: int) -> None:
    found = durations(count, np.random.default_rng(0))
    assert len(found) == count
    assert found.mean() == pytest.approx(10, abs=1e-6)
    assert 2 <= found.min() < 5 < 18 < found.max() <= 20


def test_the_seeds_step_and_logits_everywhere_come_to_grafts_own_loss(graft: str) -> None:
    model, processor = open_for_stage(Stage(1), graft, ComputeSettings("fp32"))
    for settings in (model.config, processor):
        settings.audio_pool, settings.audio_context = 1, "full"
    arrays = processor.training_batch([processor.example(clip, text) for clip, text in spoken_clips(2)])
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert int((inputs["input_ids"] == model.config.audio_token_id).sum()) == 2 * 1500
    torch.testing.assert_close(all_logits_loss(model, **inputs), model(**inputs).loss)


def test_flamingo_takes_grafts_tokens_and_trains_its_projector_alone(graft: str) -> None:
    (inputs,) = way(graft, 2, in_arrival_order).batches(2)
    computing = compute_settings()
    peer = flamingo_model(open_for_stage(Stage(1), graft, computing)[0].config)
    with torch.autocast("cpu", torch.bfloat16, enabled=computing.dtype == "bf16"):
        peer(**flamingo_inputs(inputs), use_cache=False).loss.backward()
    trained = trainable_parameters(peer)
    assert all(
        "multi_modal_projector" in name and parameter.grad.abs().sum() > 0 for name, parameter in trained.items()
    )
    assert len(trained) == 4


def test_every_way_to_batch_takes_every_clip_once(graft: str) -> None:
    _, processor = open_for_stage(Stage(1), graft, ComputeSettings("fp32"))
    examples: list[Example] = [processor.example(clip, text) for clip, text in spoken_clips(10)]
    groups = [planned(examples), length_grouped(examples), in_arrival_order(examples)]
    assert [sorted(id(one) for batch in group for one in batch) for group in groups] == [sorted(map(id, examples))] * 3
    assert [len(batch) for batch in groups[1]] == [len(batch) for batch in groups[2]] == [BATCH_CLIPS, BATCH_CLIPS, 2]
    lengths = [len(example.target_ids) for batch in groups[1] for example in batch]
    assert lengths[0] == max(lengths)
    assert lengths[-1] == min(lengths)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("limit_s", "clips", "turns"),
    [(60.0, 16, 3), (0.7, 16, 1), (0.12, 2, 1)],
    ids=["as asked", "fewer turns", "fewer clips"],
)
def test_work_that_would_not_end_is_bounded(
    limit_s: float, clips: int, turns: int, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []

    def step(batch: Inputs) -> None:  # 20 ms a clip
        taken.append(len(batch["clips"]))
        time.sleep(0.02 * len(batch["clips"]))

    def batches(count: int) -> list[Inputs]:
        return [{"clips": torch.zeros(2)}] * (count // 2)

    one = Way(step, batches, 16, {"clips": torch.zeros(1)})
    numbers = _compare("", {"graft": one, "a few": one._replace(most_clips=4)}, 16, 3, limit_s)
    assert sum(taken[4:]) == turns * (clips + min(clips, 4))
    assert numbers["a few x wall"] == pytest.approx(1, abs=0.2)
    assert capsys.readouterr().out.startswith(f"{clips} clips in {compute_settings().dtype}, {turns} times each: about")


@pytest.mark.slow
def test_ray_keeps_the_device_of_a_7b_graft_busy(graft: str) -> None:
    """The step sleeps as long as an H200 takes; two loaders and Ray may not keep it waiting."""
    numbers = bench_ingest(graft)
    assert numbers["steps"] > 8
    assert numbers["wait_percent"] < 5
    assert numbers["fed_percent"] > 95
    assert numbers["padding_percent"] < 5
    counted = [numbers[f"read_by_{loaders}_loaders{name}"] for loaders in LOADERS for name in ("", "_short_first")]
    assert max(counted) < 1.1
