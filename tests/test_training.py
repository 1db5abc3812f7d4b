"""The loop on tiny grafts, without Ray: what learns, what stays as it was, and that stops, workers and fillers change nothing."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import tiny
import tiny_workers
import torch
from tiny_training import clip_steps, example, filler, furthest, run_steps, step_batches, weights

from graft.errors import ModelError
from graft.model.adapters import LORA_TARGETS, LoraSettings
from graft.model.weights import save_projector
from graft.training.backends import TorchBackend
from graft.training.checkpoint import Progress, latest_checkpoint, load_checkpoint, write_checkpoint
from graft.training.loop import LoopSettings, learning_rate_at
from graft.training.tracking import MetricsLog, draw_loss, read_metrics
from jobs.train_worker import Stage, stage_model

STAGE_1 = Stage(1)
STAGE_2 = Stage(2, lora=LoraSettings(rank=4, alpha=8, dropout=0.1))
QLORA = dataclasses.replace(STAGE_2, nf4=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_tiny_graft(tmp_path_factory.mktemp("training") / "graft")


def opened(folder: Path, stage: Stage = STAGE_1):
    """The model of a stage in training mode, its processor and a backend."""
    model, processor = stage_model(stage, str(folder), dtype=torch.float32, device="cpu", seed=0)
    return model.train(), processor, TorchBackend(model, weight_decay=0.01, max_grad_norm=1.0)


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, QLORA], ids=["stage1", "stage2", "qlora"])
def test_a_stage_learns_and_changes_only_what_it_trains(folder, stage):
    model, processor, backend = opened(folder, stage)
    before = weights(model)
    (batch,) = clip_steps(processor, steps=1, size=4)
    _, logs = run_steps([batch] * 20, backend, learning_rate=1e-2)
    assert logs[-1].loss < logs[0].loss - (0.4 if stage.lora else 0.02)  # random layers leave little to a projector alone
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    trained = {name for name in before if name.startswith("audio_projector.") or (stage.lora and ".lora_" in name)}
    assert changed == trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(tensor.dtype == torch.float32 for name, tensor in before.items() if name in trained)
    assert not any("audio_tower" in name or "visual" in name for name in trained)
    assert len([name for name in trained if ".lora_A." in name]) == (14 if stage.lora else 0)  # two layers of seven matrices


def test_qlora_quantizes_the_language_models_layers_and_nothing_else(folder):
    from bitsandbytes.nn import Linear4bit

    model, _, _ = opened(folder, QLORA)
    quantized = {name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    plain, _, _ = opened(folder)
    targets = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear) and re.fullmatch(LORA_TARGETS, name)}
    assert quantized == targets
    assert len(targets) == 14
    for name, parameter in plain.named_parameters():
        if name.rpartition(".")[0] not in targets:
            assert torch.equal(model.get_parameter(name), parameter), name


def test_a_stage_begins_with_the_projector_of_the_one_before(folder, tmp_path):
    """In full: a bf16 base must not round it."""
    model, processor, backend = opened(folder)
    run_steps(clip_steps(processor, steps=2), backend)
    save_projector(model, tmp_path)
    stage = dataclasses.replace(STAGE_2, projector=str(tmp_path))
    begun, _ = stage_model(stage, str(folder), dtype=torch.bfloat16, device="cpu", seed=0)
    assert torch.equal(begun.audio_projector.linear.weight, model.audio_projector.linear.weight)
    assert begun.lm_head.weight.dtype == torch.bfloat16


def test_four_batches_accumulated_equal_one_batch_of_all(folder):
    states = []
    for accumulation in (1, 4):
        _, processor, backend = opened(folder)
        for step in range(3):
            clips = [example(processor, 4 * step + index) for index in range(4)]
            batches = [clips] if accumulation == 1 else [[clip] for clip in clips]
            run_steps(step_batches(processor, *batches), backend, accumulation=accumulation, learning_rate=1e-4)
        states.append(backend.state()["audio_projector.linear.weight"])
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=0, atol=1e-6)


def test_a_filler_changes_nothing(folder):
    results = []
    for fillers in (0, 1):
        model, processor, backend = opened(folder)
        batches = step_batches(processor, [example(processor, 1)], *[filler(processor)] * fillers)
        progress, logs = run_steps(batches, backend, accumulation=1 + fillers)
        assert progress == Progress(step=1, position=1, clips=1, audio_s=1.0, first_loss=logs[0].loss)
        results.append((weights(model), logs[0].loss))
    assert furthest(results[0][0], results[1][0]) == 0
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, QLORA], ids=["stage1", "stage2", "qlora"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder, tmp_path, stage):
    settings = {"schedule": "cosine", "warmup_steps": 2, "total_steps": 6}
    model, processor, backend = opened(folder, stage)
    batches = clip_steps(processor, steps=6)
    run_steps(batches, backend, **settings)
    _, _, first = opened(folder, stage)
    progress, _ = run_steps(batches[:3], first, **settings)
    torch.rand(7)  # another process's random numbers
    path = write_checkpoint(tmp_path, first.state(), progress, keep=2)
    resumed, _, second = opened(folder, stage)
    state, progress = load_checkpoint(path)
    second.load_state(state, step=progress.step)
    done, _ = run_steps(batches[progress.position :], second, progress=progress, **settings)
    assert furthest(weights(resumed), weights(model)) == 0
    assert (done.step, done.position, done.clips) == (6, 6, 12)
    states = backend.state(), second.state()
    assert all(torch.equal(states[0][name][key], tensor) for name, entry in states[1].items() for key, tensor in entry.items())


def test_two_processes_equal_one(folder, tmp_path):
    """With accumulation, uneven batches, dropout and a filler, on gloo."""
    cases = [tiny_workers.Case(str(folder), stage, ("torch",)) for stage in ("stage1", "stage2")]
    for case, together in zip(cases, tiny_workers.in_processes(2, cases, tmp_path), strict=True):
        alone = tiny_workers.train_share(case)
        for shared in together:
            assert furthest(shared["weights"], alone["weights"]) < 1e-6
            assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def test_learning_rates():
    settings = LoopSettings(learning_rate=2.0, schedule="linear", warmup_steps=4)
    assert [learning_rate_at(step, settings, 12) for step in (0, 1, 3, 4, 8, 11)] == [0.5, 1.0, 2.0, 2.0, 1.0, 0.25]
    cosine = dataclasses.replace(settings, schedule="cosine", warmup_steps=0)
    rates = [learning_rate_at(step, cosine, 10) for step in range(11)]
    assert (rates[0], rates[5], rates[10]) == pytest.approx((2.0, 1.0, 0.0))
    assert rates == sorted(rates, reverse=True)
    constant = dataclasses.replace(settings, schedule="constant", warmup_steps=0)
    assert {learning_rate_at(step, constant, 10) for step in range(10)} == {2.0}


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(folder):
    model, processor, backend = opened(folder)
    (batch,) = clip_steps(processor, steps=1)
    saved: list[Progress] = []
    model.lm_head.weight.data[5, 5] = math.nan
    with pytest.raises(ModelError, match=r"the loss is nan, .* at step 1: lower learning_rate"):
        run_steps([batch] * 3, backend, on_checkpoint=saved.append)
    model, _, backend = opened(folder)
    model.audio_projector.linear.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ModelError, match=r"the loss is 5\.\d+, the gradient's norm (nan|inf) at step 1"):
        run_steps([batch] * 3, backend, total_steps=1, on_checkpoint=saved.append)
    assert saved == []


def test_checkpoints_appear_whole_and_the_oldest_go(tmp_path):
    state = {"a.weight": {"weight": torch.ones(2), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, state, Progress(step=step, position=2 * step), keep=2)
    half = tmp_path / ".step-00000200.partial"
    half.mkdir()
    (half / "progress.json").write_text("half")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"
    loaded, progress = load_checkpoint(tmp_path / "step-00000100")
    assert progress == Progress(step=100, position=200)
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["a.weight"]["weight"], torch.ones(2))
    write_checkpoint(tmp_path, state, Progress(step=200), keep=2)  # over what was left half written
    assert load_checkpoint(tmp_path / "step-00000200")[1].step == 200
    assert not half.exists()


def test_metrics_go_on_from_the_checkpoint_and_are_drawn(tmp_path):
    log = MetricsLog(tmp_path, from_step=0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 3.0 / step, "learning_rate": 1e-3})
    MetricsLog(tmp_path, from_step=2).write({"step": 3, "loss": 0.5, "learning_rate": 1e-3})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 3.0), (2, 1.5), (3, 0.5)]
    picture = draw_loss(tmp_path, title="stage 1").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000
