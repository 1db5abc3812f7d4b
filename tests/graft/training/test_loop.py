"""Test the loop on tiny grafts without Ray: what it trains, and that resuming, workers and fillers change nothing."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from graft.checkpoints.lora import LORA_TARGETS, LoraSettings
from graft.errors import DataError, ModelError
from graft.training.backends import TorchBackend
from graft.training.checkpoint import CheckpointWriter, load_checkpoint, write_checkpoint
from graft.training.loop import LoopSettings, learning_rate_at
from graft.training.meter import Meter
from graft.training.progress import Progress, best_checkpoint, latest_checkpoint
from graft.training.stages import ComputeSettings, Stage, open_for_stage
from tests.support import tiny_models
from tests.support.adapters import save_projector
from tests.support.training import Recorder, clip_steps, example, filler, furthest, run_steps, step_batches, weights

STAGE_1 = Stage(1)
STAGE_2 = Stage(2, lora=LoraSettings(rank=4, alpha=8, dropout=0.1))
FP32 = ComputeSettings("fp32", "torch")
QLORA = dataclasses.replace(STAGE_2, nf4=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("training") / "graft")


def opened(folder: Path, stage: Stage = STAGE_1):
    """Return a stage's model in training mode, its processor and a backend."""
    model, processor = open_for_stage(stage, str(folder), FP32)
    return model, processor, TorchBackend(model, weight_decay=0.01, max_grad_norm=1.0)


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, QLORA], ids=["stage1", "stage2", "qlora"])
def test_a_stage_learns_and_changes_only_what_it_trains(folder, stage):
    model, processor, backend = opened(folder, stage)
    before = weights(model)
    (batch,) = clip_steps(processor, steps=1, size=4)
    _, logs = run_steps([batch] * 20, backend, learning_rate=1e-2)
    assert logs[-1].loss < logs[0].loss - (
        0.4 if stage.lora else 0.02
    )  # random layers leave little to a projector alone
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    trained = {name for name in before if name.startswith("audio_projector.") or (stage.lora and ".lora_" in name)}
    assert changed == trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(tensor.dtype == torch.float32 for name, tensor in before.items() if name in trained)
    assert not any("audio_tower" in name or "visual" in name for name in trained)
    assert len([name for name in trained if ".lora_A." in name]) == (
        14 if stage.lora else 0
    )  # two layers of seven matrices


def test_qlora_quantizes_the_language_models_layers_and_nothing_else(folder):
    from bitsandbytes.nn import Linear4bit

    model, _, _ = opened(folder, QLORA)
    quantized = {
        name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    plain, _, _ = opened(folder)
    targets = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(LORA_TARGETS, name)
    }
    assert quantized == targets
    assert len(targets) == 14
    for name, parameter in plain.named_parameters():
        if name.rpartition(".")[0] not in targets:
            assert torch.equal(model.get_parameter(name), parameter), name


def test_a_stage_begins_with_the_projector_of_the_one_before(folder, tmp_path):
    """The projector keeps float32 precision on a bf16 base."""
    model, processor, backend = opened(folder)
    run_steps(clip_steps(processor, steps=2), backend)
    save_projector(model, tmp_path)
    stage = dataclasses.replace(STAGE_2, projector=str(tmp_path))
    begun, _ = open_for_stage(stage, str(folder), ComputeSettings("bf16"))
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
    assert all(
        torch.equal(states[0][name][key], tensor) for name, entry in states[1].items() for key, tensor in entry.items()
    )


def test_learning_rates():
    settings = LoopSettings(learning_rate=2.0, schedule="linear", warmup_steps=4)
    assert [learning_rate_at(step, settings, 12) for step in (0, 1, 3, 4, 8, 11)] == [0.5, 1.0, 2.0, 2.0, 1.0, 0.25]
    cosine = dataclasses.replace(settings, schedule="cosine", warmup_steps=0)
    rates = [learning_rate_at(step, cosine, 10) for step in range(11)]
    assert (rates[0], rates[5], rates[10]) == pytest.approx((2.0, 1.0, 0.0))
    assert rates == sorted(rates, reverse=True)
    assert [learning_rate_at(7 + step, cosine, 17, start=7) for step in range(11)] == rates
    constant = dataclasses.replace(settings, schedule="constant", warmup_steps=0)
    assert {learning_rate_at(step, constant, 10) for step in range(10)} == {2.0}


def test_each_part_has_its_learning_rate(folder):
    stage = dataclasses.replace(STAGE_2, lora=dataclasses.replace(STAGE_2.lora, encoder=True, dropout=0.0))
    rates = {"audio_projector": 1e-2, "model": 1e-3, "audio_tower": 0.0}
    model, processor = open_for_stage(stage, str(folder), FP32)
    scales = {"projector": 10.0, "encoder": 0.0}
    backend = TorchBackend(model, weight_decay=0.0, max_grad_norm=1.0, lr_scales=scales)
    before = weights(model)
    run_steps(clip_steps(processor, steps=1), backend, learning_rate=1e-3)
    steps = {
        part: max(float((weights(model)[name] - before[name]).abs().max()) for name in before if name.startswith(part))
        for part in rates
    }
    assert steps == pytest.approx(rates, rel=1e-3)  # AdamW's first step changes a weight by its rate


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(folder):
    model, processor, backend = opened(folder)
    (batch,) = clip_steps(processor, steps=1)
    model.lm_head.weight.data[5, 5] = math.nan
    before, kept = weights(model), Recorder()
    with pytest.raises(ModelError, match=r"the loss is nan at step 1: look at the saved batch.* lower learning_rate"):
        run_steps([batch] * 3, backend, observer=kept)
    assert kept.faults == [([1], "the loss is nan at step 1")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items() if "projector" in name)
    model, _, backend = opened(folder)
    model.audio_projector.linear.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ModelError, match=r"the gradient's norm is (nan|inf) at step 1"):
        run_steps([batch] * 3, backend, total_steps=1, observer=kept)
    assert kept.checkpoints == []


def test_a_run_out_of_memory_names_and_saves_the_batch_that_took_it(folder):
    model, processor, backend = opened(folder)
    steps = clip_steps(processor, steps=2, size=10)
    steps = [
        dataclasses.replace(one, ids=tuple(f"s{step}c{clip}" for clip in range(10))) for step, one in enumerate(steps)
    ]
    sizes = [one.inputs["input_ids"].shape for one in steps]

    def run_out(module, args, kwargs):
        if kwargs["input_ids"] is steps[1].inputs["input_ids"]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(run_out, with_kwargs=True)
    kept = Recorder()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_steps(steps, backend, observer=kept)
    note = f"on a batch of 10 x {sizes[1][1]} tokens with the clips s1c0, s1c1, "
    assert caught.value.__notes__[0].startswith(note)
    assert caught.value.__notes__[0].endswith("s1c7 and 2 others")
    assert kept.faults == [([2], f"the device's memory ran out {caught.value.__notes__[0]}")]


def test_a_run_out_of_memory_in_the_update_names_and_saves_all_batches_of_the_step(folder, monkeypatch):
    _, processor, backend = opened(folder)
    steps = [dataclasses.replace(one, ids=(f"s{step}",)) for step, one in enumerate(clip_steps(processor, steps=2))]

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend.optimizer, "step", run_out)
    kept = Recorder()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_steps(steps, backend, accumulation=2, observer=kept)
    (note,) = caught.value.__notes__
    assert note.startswith("in the update after a batch of ")
    assert note.count("with the clips") == 2
    assert "with the clips s0; a batch of" in note
    assert kept.faults == [([step.position for step in steps], f"the device's memory ran out {note}")]


def test_a_loss_that_explodes_or_diverges_ends_the_run(folder):
    _, processor, backend = opened(folder)
    (batch,) = clip_steps(processor, steps=1)
    with pytest.raises(ModelError, match=r"the loss exploded to 5\.\d at step 1"):
        run_steps([batch], backend, max_loss=4.0)
    meter = Meter(Progress(), total_steps=1000, max_loss=24.0, peak_flops=None)
    noisy = [5.0, 3.0, 1.0, 0.5, 0.2, 2.5, 0.1] * 20
    assert [meter.find_fault(loss) for loss in noisy] == [None] * len(noisy)
    fault = next(fault for fault in map(meter.find_fault, [9.0] * 30) if fault)
    assert re.fullmatch(r"the loss diverged: its running mean rose from [12]\.\d+ to [3-6]\.\d+", fault)


def test_validations_find_the_best_and_lack_of_progress_ends_the_run(folder):
    _, processor, backend = opened(folder)
    batches = clip_steps(processor, steps=12)
    kept = Recorder(losses=[3.0, 2.0, 2.5, 2.0])
    done, _ = run_steps(batches, backend, validate_every=2, patience=2, checkpoint_every=100, observer=kept)
    best = {"validation_loss": 2.0}
    assert (done.step, done.best_metrics, done.best_step, done.stale_validations) == (8, best, 4, 2)
    assert [(progress.step, is_best) for progress, is_best in kept.checkpoints] == [(2, True), (4, True), (8, False)]
    again, logs = run_steps(batches[8:], backend, progress=done, validate_every=2, patience=2, total_steps=12)
    assert (again, logs) == (done, [])


def test_the_monitored_metric_alone_chooses_the_best(folder):
    _, processor, backend = opened(folder)
    found = [
        {"validation_loss": loss, "validation_wer": wer, "validation_wer/calls": calls}
        for loss, wer, calls in ((3.0, 0.5, 0.2), (2.0, 0.3, 0.4), (1.0, 0.6, 0.3))
    ]
    for monitor, best in (("validation_loss", 3), ("validation_wer", 2), ("validation_wer/calls", 1)):
        kept = Recorder(losses=found, monitor=monitor)
        done, _ = run_steps(clip_steps(processor, steps=3), backend, validate_every=1, observer=kept)
        assert (done.best_step, done.best_metrics) == (best, found[best - 1])


def test_a_metric_of_another_set_that_is_not_finite_ends_the_run(folder):
    _, processor, backend = opened(folder)
    kept = Recorder(losses=[{"validation_loss": 1.0, "validation_loss/calls": math.nan}])
    with pytest.raises(ModelError, match=r"the validation loss of calls is nan at step 1: lower learning_rate"):
        run_steps(clip_steps(processor, steps=2), backend, validate_every=1, observer=kept)
    assert kept.checkpoints == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_never_the_best_and_ends_the_run(folder, loss):
    _, processor, backend = opened(folder)
    kept = Recorder(losses=[loss, 2.0])
    with pytest.raises(ModelError, match=r"the validation loss is (nan|inf) at step 1: lower learning_rate"):
        run_steps(clip_steps(processor, steps=2), backend, validate_every=1, observer=kept)
    assert kept.checkpoints == []


def masked(processor, *, position: int):
    """A step whose two clips are masked."""
    (batch,) = step_batches(processor, filler(processor) * 2)
    reasons = tuple(f"clip{2 * position + clip}: not readable" for clip in range(2))
    return dataclasses.replace(batch, position=position, step_position=position, step_label_count=9, masked=reasons)


def test_a_run_in_which_too_much_is_masked_ends_with_the_first_reasons(folder):
    _, processor, backend = opened(folder)
    nothing, good = [masked(processor, position=step) for step in range(4)], clip_steps(processor, steps=4)
    kept = Recorder()
    with pytest.raises(
        DataError, match=r"none of 8 clips could be used \(clip0: not readable; clip1: .*; clip2: .*; \.\.\.\)"
    ):
        run_steps(nothing, backend, observer=kept)
    assert [log.loss for log in kept.logs[:4]] == [None] * 4
    assert kept.checkpoints == []  # a second run of the command does not find a run that is done
    some = [*good, nothing[0]]
    with pytest.raises(DataError, match=r"only 8 of 10 clips .*clip0.*max_masked=0\.1 .*or raise max_masked"):
        run_steps(some, backend)
    done, logs = run_steps(some, backend, max_masked=0.2)
    assert (done.clips, done.masked) == (8, 2)
    assert done.first_loss == logs[0].loss
    # A step without labels is no loss of zero, above which all others would have diverged.
    run_steps([nothing[0], *good * 10], backend, max_masked=0.2)


def test_a_stopped_run_saves_and_can_be_resumed(folder):
    _, processor, backend = opened(folder)
    batches, kept = clip_steps(processor, steps=5), Recorder(stop_after=3)
    done, _ = run_steps(batches, backend, observer=kept, checkpoint_every=100, validate_every=100)
    assert done.step == done.position == 3
    assert [progress for progress, _ in kept.checkpoints] == [done]


def test_checkpoints_are_written_atomically_and_the_oldest_removed(tmp_path):
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


def test_the_best_checkpoint_is_kept_and_write_errors_are_raised(tmp_path):
    state = {"a.weight": {"weight": torch.ones(2)}}
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=1)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2)):
        writer.write(state, Progress(step=step, best_step=best))
    writer.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert best_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"
    assert best_checkpoint(tmp_path / "none") is None
    (tmp_path / "file").write_text("")
    broken = CheckpointWriter(tmp_path / "file", keep=1)
    broken.write(state, Progress(step=1))
    with pytest.raises(NotADirectoryError):
        broken.wait()
