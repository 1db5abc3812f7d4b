"""Test the memory estimate: shares by ZeRO stage, and the bytes of real quantized weights."""

import pytest
import torch

from graft.checkpoints.known_bases import known_config
from graft.checkpoints.loading import open_graft
from graft.training.estimate import (
    LAYOUTS,
    Layout,
    activation_bytes,
    count_parameters,
    device_memory,
    matrix_parameters,
)
from tests.support import tiny_models


def test_memory_by_layout():
    config = known_config("openai/whisper-large-v3-turbo", "Qwen/Qwen2-VL-7B-Instruct")
    parameters = count_parameters(config, lora_rank=64)

    def memory(layout: Layout, workers: int = 4, **settings: object):
        return device_memory(
            config, parameters, layout=layout, workers=workers, token_count=1000, label_count=0, **settings
        )

    assert memory("ddp").weights == pytest.approx(2 * 8.928e9 + 4 * 166.1e6, rel=1e-3)
    assert memory("ddp").optimizer == 8 * parameters.trained
    assert memory("ddp").activations == pytest.approx(5.7e9)
    totals = [memory(layout).total for layout in LAYOUTS]
    assert totals == sorted(totals, reverse=True)
    assert memory("zero 1").optimizer == memory("ddp").optimizer / 4
    assert memory("zero 1").gradients == memory("ddp").gradients == 4 * memory("zero 2").gradients
    assert memory("zero 2").weights == memory("ddp").weights
    assert memory("zero 3", workers=2).weights <= 0.57 * memory("zero 2", workers=2).weights
    assert len({memory(layout, workers=1).total for layout in LAYOUTS}) == 1
    saved = memory("ddp").weights - memory("ddp", nf4=True).weights
    assert saved == pytest.approx(matrix_parameters(config) * (2 - 4.127 / 8), rel=1e-3)
    logits = device_memory(config, parameters, layout="ddp", workers=1, token_count=0, label_count=8 * 1565).activations
    assert logits == pytest.approx(19e9, rel=0.01)
    assert activation_bytes(config, 1000, lora=False, checkpointing=False) == pytest.approx(4.0e9)
    assert activation_bytes(config, 1000, lora=False, checkpointing=True) < 0.4e9


def test_the_bytes_of_a_quantized_model(tmp_path):
    """Only the weights of the matrices take half a byte each."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, _ = open_graft(tiny_models.save_tiny_graft(tmp_path / "graft"), dtype=torch.bfloat16, nf4=True)
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    packed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    assert packed * 2 == matrix_parameters(model.config)
