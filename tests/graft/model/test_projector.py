"""Test the projectors alone: what a token of each depends on, and the weights that they begin with."""

import pytest
import torch

from graft.model.projector import KERNEL_SIZE, AudioProjector

WIDTH, TEXT_WIDTH = 16, 24


def conv(blocks: int = 2, pool: int = 2) -> AudioProjector:
    torch.manual_seed(0)
    projector = AudioProjector("conv", audio_width=WIDTH, text_width=TEXT_WIDTH, pool=pool, blocks=blocks)
    projector.reset_parameters()
    return projector


def changed_tokens(projector: AudioProjector, states: torch.Tensor, state: int, counts: list[int]) -> list[int]:
    """List the tokens that depend on a state."""
    other = states.clone()
    other[state] = other[state].flip(0)  # a constant would leave with the norm
    with torch.no_grad():
        difference = (projector(states, counts) - projector(other, counts)).abs().sum(1)
    return difference.nonzero().flatten().tolist()


def test_a_new_conv_projector_passes_on_each_token_by_itself():
    assert changed_tokens(conv(), torch.rand(40, WIDTH), 21, [20]) == [10]


def test_blocks_see_neighbours_of_the_same_clip_only():
    projector = conv()
    for block in projector.blocks:
        torch.nn.init.normal_(block.linear_2.weight, std=0.1)
    reach = 2 * (KERNEL_SIZE // 2)  # states on each side, through two blocks
    states = torch.rand(80, WIDTH)
    assert changed_tokens(projector, states, 40, [40]) == list(range((40 - reach) // 2, (40 + reach) // 2 + 1))
    assert changed_tokens(projector, states, 40, [20, 20]) == list(range(20, (40 + reach) // 2 + 1))


def test_the_norm_has_the_scale_of_text_embeddings():
    projector = conv()
    projector.match_scale(torch.randn(100, TEXT_WIDTH) * 0.3)
    with torch.no_grad():
        embeddings = projector(torch.randn(40, WIDTH), [20])
    assert embeddings.shape == (20, TEXT_WIDTH)
    assert float(embeddings.square().mean().sqrt()) == pytest.approx(0.3, rel=0.1)
