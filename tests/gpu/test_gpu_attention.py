"""Test that SDPA, eager attention and FlashAttention 2 agree in language model and encoder, forward and backward."""

import re
from pathlib import Path

import pytest
import torch

from tests.support import wide_models

pytestmark = pytest.mark.gpu
SAME = {"fp32": 1e-5, "bf16": 0.03}


def computed(folder: Path, device: torch.device, attention: str, dtype: str) -> tuple[float, dict[str, torch.Tensor]]:
    model, processor, backend = wide_models.opened(folder, device, "stage2", dtype, attention=attention)
    assert {part.config._attn_implementation for part in (model.audio_tower, model.model.language_model)} == {attention}
    return wide_models.backward(wide_models.training_batch(processor, device, range(5)), backend)


def check_same(
    one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]], tolerance: float
) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert {
        name for name, tensor in one[1].items() if wide_models.distance(tensor, other[1][name]) > tolerance
    } == set()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sdpa_equals_eager(folder: Path, device: torch.device, dtype: str) -> None:
    check_same(computed(folder, device, "sdpa", dtype), computed(folder, device, "eager", dtype), SAME[dtype])


def test_flash_attention_equals_sdpa(folder: Path, cuda: torch.device) -> None:
    pytest.importorskip("flash_attn")
    check_same(
        computed(folder, cuda, "flash_attention_2", "bf16"), computed(folder, cuda, "sdpa", "bf16"), SAME["bf16"]
    )


def test_a_missing_flash_attention_is_named(folder: Path, device: torch.device) -> None:
    from importlib.util import find_spec

    from graft.errors import MissingExtra, install_command

    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    with pytest.raises(MissingExtra, match=re.escape(f"flash_attn is not installed: {install_command('flash')}")):
        wide_models.opened(folder, device, attention="flash_attention_2")
