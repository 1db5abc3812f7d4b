"""Test GPU memory in training: logits of labels only, no growth over steps, nothing left at the end."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.model.modeling import GraftForConditionalGeneration
from tests.support import wide_models

pytestmark = pytest.mark.gpu
VOCABULARY, ROWS, LENGTH, LABELS = 50_000, 8, 512, 4


def peak_bytes(device: torch.device, compute: Callable[[], object]) -> int:
    """Return the peak of allocated memory above its level at the start."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def text_batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 90, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.full_like(ids, -100)
    labels[:, -LABELS:] = ids[:, -LABELS:]
    return ids, labels


def all_logits_loss(model: GraftForConditionalGeneration, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def test_logits_of_labels_alone_are_kept(cuda: torch.device) -> None:
    """Logits of all positions would take at least their float32 values and gradients more."""
    parts = wide_models.wide_parts(vocab_size=VOCABULARY)
    model = wide_models.wide_model(cuda, **parts).requires_grad_(False)
    model.model.language_model.layers[0].input_layernorm.requires_grad_(True)
    ids, labels = text_batch(cuda)
    model(input_ids=ids, labels=labels).loss.backward()  # cuBLAS takes its workspace
    ours = peak_bytes(cuda, lambda: model(input_ids=ids, labels=labels).loss.backward())
    full = peak_bytes(cuda, lambda: all_logits_loss(model, ids, labels).backward())
    assert full - ours > 2 * 4 * ROWS * LENGTH * VOCABULARY * 0.95
    assert ours < full / 4


def test_gradient_checkpointing_takes_less(cuda: torch.device) -> None:
    model = wide_models.wide_model(
        cuda, **wide_models.wide_parts(num_hidden_layers=8, layer_types=None)
    ).requires_grad_(False)
    model.model.language_model.layers[0].input_layernorm.requires_grad_(True)
    ids, labels = text_batch(cuda)
    model.train()(input_ids=ids, labels=labels).loss.backward()
    plain = peak_bytes(cuda, lambda: model(input_ids=ids, labels=labels).loss.backward())
    model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert peak_bytes(cuda, lambda: model(input_ids=ids, labels=labels).loss.backward()) < 0.6 * plain


@pytest.mark.parametrize("name", ["stage1", "stage2", "qlora"])
def test_steps_hold_no_more_and_a_finished_run_holds_nothing(folder: Path, cuda: torch.device, name: str) -> None:
    def held_after(steps: int) -> int:
        """Return the allocated bytes at the end of a run, while its model still exists."""
        _, processor, backend = wide_models.opened(folder, cuda, name, "bf16")
        wide_models.run_steps(
            [wide_models.training_batch(processor, cuda, range(4))] * steps, backend, total_steps=steps
        )
        gc.collect()
        return torch.cuda.memory_allocated(cuda)

    held_after(2)  # libraries take what they keep
    gc.collect()
    before = torch.cuda.memory_allocated(cuda)
    few, many = held_after(3), held_after(12)
    gc.collect()
    assert few == many > before
    assert torch.cuda.memory_allocated(cuda) == before
