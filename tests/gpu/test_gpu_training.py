"""Test both stages on the device with plain torch: what they train, and which settings change speed and memory only."""

import re
from pathlib import Path

import pytest
import torch

from graft.checkpoints.lora import LORA_TARGETS
from graft.training.checkpoint import load_checkpoint, write_checkpoint
from graft.training.encoder_cache import CachingEncoder, open_cache
from graft.training.preflight import preflight
from graft.training.progress import Progress
from tests.support import wide_models

pytestmark = pytest.mark.gpu
STAGES = ["stage1", "stage2", "qlora"]
DTYPES = ["fp32", "bf16"]
SAME = {"fp32": 1e-5, "bf16": 0.03}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage_learns_and_changes_only_what_it_trains(
    folder: Path, device: torch.device, name: str, dtype: str
) -> None:
    model, processor, backend = wide_models.opened(folder, device, name, dtype)
    before = wide_models.weights(model)
    batch = wide_models.training_batch(processor, device, range(4))
    with backend.evaluating():
        _, label_count = preflight(model, batch.inputs, processor.prompt_end_ids())
        assert label_count == batch.step_label_count
    logs = wide_models.run_steps([batch] * 20, backend, total_steps=20, learning_rate=1e-2, schedule="constant")
    assert logs[-1].loss < logs[0].loss - (
        0.1 if name == "stage1" else 1.0
    )  # random layers leave little to a projector alone
    assert logs[-1].memory_gb > 0
    changed = {name for name, tensor in wide_models.weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == set(backend.trained)
    assert all(name.startswith("audio_projector.") or ".lora_" in name for name in changed)
    assert {parameter.dtype for parameter in backend.trained.values()} == {torch.float32}
    assert {parameter.device for parameter in model.parameters()} == {batch.inputs["labels"].device}
    assert all(group["fused"] for group in backend.optimizer.param_groups)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    folder: Path, device: torch.device, tmp_path: Path, name: str, dtype: str
) -> None:
    """Runs are equal bit for bit with eager attention; the other backward passes may add in any order."""
    settings = {"schedule": "cosine", "warmup_steps": 2, "total_steps": 6}
    whole, processor, backend = wide_models.opened(folder, device, name, dtype, attention="eager")
    batches = [
        wide_models.training_batch(processor, device, (2 * step, 2 * step + 1), position=step + 1) for step in range(6)
    ]
    wide_models.run_steps(batches, backend, **settings)
    _, _, first = wide_models.opened(folder, device, name, dtype, attention="eager")
    wide_models.run_steps(batches[:3], first, **settings)
    path = write_checkpoint(tmp_path, first.state(), Progress(step=3, position=3), keep=1)
    resumed, _, second = wide_models.opened(folder, device, name, dtype, attention="eager")
    second.load_state(load_checkpoint(path)[0], step=3)
    wide_models.run_steps(batches[3:], second, step=3, **settings)
    expected = wide_models.weights(whole)
    assert [
        name for name, tensor in wide_models.weights(resumed).items() if not torch.equal(tensor, expected[name])
    ] == []
    one, other = backend.state(), second.state()
    assert all(torch.equal(tensor, one[name][key]) for name, entry in other.items() for key, tensor in entry.items())


def test_batches_accumulated_equal_one_batch_of_all(folder: Path, device: torch.device) -> None:
    _, processor, backend = wide_models.opened(folder, device)
    together = wide_models.training_batch(processor, device, range(4))
    loss, gradients = wide_models.backward(together, backend)
    losses = [
        backend.backward(
            wide_models.training_batch(processor, device, seeds).inputs,
            label_count=together.step_label_count,
            is_last=seeds == (2, 3),
        )
        for seeds in ((0, 1), (2, 3))
    ]
    assert float(sum(losses)) == pytest.approx(loss, rel=1e-5)
    assert (
        wide_models.distance(
            backend.trained["audio_projector.linear.weight"].grad, gradients["audio_projector.linear.weight"]
        )
        < SAME["fp32"]
    )


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_checkpointing_gives_the_same_gradients(
    folder: Path, device: torch.device, name: str, dtype: str
) -> None:
    results = []
    for checkpointing in (False, True):
        model, processor, backend = wide_models.opened(
            folder, device, name, dtype, gradient_checkpointing=checkpointing
        )
        calls: list[int] = []
        model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        results.append(wide_models.backward(wide_models.training_batch(processor, device, range(3)), backend))
        assert len(calls) == 1 + checkpointing
    check_same(results, SAME[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_layers_give_the_same_gradients(folder: Path, device: torch.device, dtype: str) -> None:
    """Compare without dropout, which draws other random numbers in compiled code."""
    results = []
    for compiled in (False, True):
        _, processor, backend = wide_models.opened(folder, device, "no-dropout", dtype, compile=compiled)
        results.append(wide_models.backward(wide_models.training_batch(processor, device, range(3)), backend))
    check_same(results, SAME[dtype])


def check_same(results: list[tuple[float, dict[str, torch.Tensor]]], tolerance: float) -> None:
    (loss, gradients), *others = results
    for other_loss, other_gradients in others:
        assert other_loss == pytest.approx(loss, rel=tolerance)
        distances = {
            name: wide_models.distance(other_gradients[name], tensor)
            for name, tensor in gradients.items()
            if tensor.any()
        }
        assert distances
        assert max(distances.values()) < tolerance, distances


def test_nf4_quantizes_the_language_models_layers_and_nothing_else(folder: Path, device: torch.device) -> None:
    model, processor, backend = wide_models.opened(folder, device, "qlora", "bf16")
    from bitsandbytes.nn import Linear4bit

    plain, _, plain_backend = wide_models.opened(folder, device, "stage1", "bf16")
    quantized = {
        name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    targets = {name for name, _ in plain.named_modules() if re.fullmatch(LORA_TARGETS, name)}
    assert quantized == targets
    assert len(targets) == 14
    for name, parameter in plain.named_parameters():
        if name.rpartition(".")[0] not in targets:
            assert torch.equal(model.get_parameter(name), parameter), name
    batch = wide_models.training_batch(processor, device, range(3))
    with backend.evaluating(), plain_backend.evaluating():
        loss, expected = (float(one(**batch.inputs).loss) for one in (model, plain))
    assert loss == pytest.approx(expected, rel=0.1)  # B is zero: four bits are all the difference
    assert loss != expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_from_the_cache_equal_those_of_the_encoder(
    folder: Path, device: torch.device, tmp_path: Path, dtype: str
) -> None:
    """States are equal bit for bit, whether all or only some are cached, and so is the loss."""
    model, processor, backend = wide_models.opened(folder, device, "stage1", dtype)
    inputs = dict(wide_models.training_batch(processor, device, range(3)).inputs)
    with backend.evaluating():
        loss = float(model(**inputs).loss)
    features, counts = inputs.pop("input_features"), inputs["audio_frame_counts"]
    encoder = CachingEncoder(model, open_cache(tmp_path, model.config, encoder="e", features="f", dtype=dtype))
    made = encoder(features, counts, ["a", "b", ""], {})
    encoder.close()
    read = {place: encoder.cache.get(key) for place, key in enumerate("ab")}
    assert encoder.cache.get("") is None
    assert [entry.frame_count for entry in read.values()] == counts[:2].tolist()
    found = {place: entry.states.to(device) for place, entry in read.items()}
    mixed = CachingEncoder(model, encoder.cache)(features[2:], counts, ["a", "b", "c"], found)
    assert wide_models.distance(mixed, made) < SAME[dtype]
    own = sum(len(states) for states in found.values())
    assert torch.equal(mixed[:own], made[:own])
    with backend.evaluating():
        assert float(model(**inputs, audio_states=made).loss) == pytest.approx(loss, rel=SAME[dtype])
