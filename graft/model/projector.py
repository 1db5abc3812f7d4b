"""AudioProjector: the module between audio encoder and language model, the only one trained from scratch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

KERNEL_SIZE = 7
"""States that a convolution of `conv` sees: 0.14 s."""
NORM_EPS = 1e-6


class AudioProjector(nn.Module):
    """Project audio states to text embeddings (audio tokens of all clips, hidden_size).

    `linear` is one matrix without bias, as in the reference system; Qwen2Audio has the same with a bias. `mlp` is
    linear, GELU, linear with the language model's width in between, as in AudioFlamingo3. Both take the states of audio
    tokens (tokens, d_model), each by itself. `conv` takes the encoder's states (50 a second): blocks of depthwise
    convolutions (ConvNeXt; Liu et al., 2022) mix each with its neighbours, `pool` following states are stacked to an
    audio token, and an MLP ends in a norm with the scale of text embeddings. States are cast to the projector's dtype,
    which is float32 in training.
    """

    def __init__(self, kind: str, *, audio_width: int, text_width: int, pool: int = 1, blocks: int = 0):
        super().__init__()
        self.pool = pool if kind == "conv" else 1
        """Audio states that are stacked to one audio token."""
        if kind == "linear":
            self.linear = nn.Linear(audio_width, text_width, bias=False)
            return
        if kind == "conv":
            self.blocks = nn.ModuleList(ConvBlock(audio_width) for _ in range(blocks))
            self.stacked_norm = nn.LayerNorm(pool * audio_width)
            self.norm = nn.RMSNorm(text_width, eps=NORM_EPS)
        self.linear_1 = nn.Linear(self.pool * audio_width, text_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_width, text_width)

    @classmethod
    def from_config(cls, config: Any, *, text_width: int) -> "AudioProjector":
        """Make the projector of a GraftConfig, for text embeddings of a width."""
        return cls(
            config.audio_projector,
            audio_width=config.audio_config.d_model,
            text_width=text_width,
            pool=config.audio_pool,
            blocks=config.audio_projector_blocks,
        )

    def forward(self, audio_states: Tensor, token_counts: Sequence[int]) -> Tensor:
        """Project the states of all clips (states, d_model), which lie end to end, to their audio tokens.

        `token_counts` are the audio tokens of each clip; a clip has `pool` times as many states.
        """
        audio_states = audio_states.to(next(self.parameters()).dtype)
        if hasattr(self, "linear"):
            return self.linear(audio_states)
        if hasattr(self, "blocks"):
            audio_states = self._mix(audio_states, [self.pool * count for count in token_counts])
            audio_states = self.stacked_norm(audio_states.unflatten(0, (-1, self.pool)).flatten(1))
        embeddings = self.linear_2(self.act(self.linear_1(audio_states)))
        return self.norm(embeddings) if hasattr(self, "norm") else embeddings

    def reset_parameters(self) -> None:
        """Draw new weights: matrices with a standard deviation of 0.02; blocks that pass on what they get."""
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for block in getattr(self, "blocks", []):
            block.reset_parameters()
        if hasattr(self, "norm"):
            self.stacked_norm.reset_parameters()
            nn.init.constant_(self.norm.weight, 0.02)

    @torch.no_grad()
    def match_scale(self, text_embeddings: Tensor) -> None:
        """Give the norm of `conv` the root mean square of text embeddings (vocabulary, hidden_size)."""
        if hasattr(self, "norm"):
            nn.init.constant_(self.norm.weight, float(text_embeddings.float().square().mean().sqrt()))

    def _mix(self, audio_states: Tensor, counts: Sequence[int]) -> Tensor:
        """Let each state see its neighbours in the same clip: (states of all clips, d_model), as many of each clip."""
        clips = nn.utils.rnn.pad_sequence(audio_states.split(counts), batch_first=True)  # (clips, longest, d_model)
        lengths = torch.tensor(counts, device=clips.device)
        is_state = torch.arange(clips.shape[1], device=clips.device) < lengths[:, None]  # (clips, longest)
        for block in self.blocks:
            clips = block(clips, is_state[..., None])
        return clips[is_state]


class ConvBlock(nn.Module):
    """Add to each state what a depthwise convolution and an MLP make of it and its neighbours; at first nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=width)
        self.norm_2 = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(2 * width, width)

    def forward(self, states: Tensor, is_state: Tensor) -> Tensor:
        """Mix padded states (clips, longest, d_model); `is_state` (clips, longest, 1) marks those that are a clip's."""
        mixed = self.norm_1(states) * is_state  # a clip ends in zeros, whatever the batch's longest clip
        mixed = self.conv(mixed.transpose(1, 2)).transpose(1, 2)  # over time: (clips, d_model, longest) and back
        return states + self.linear_2(self.act(self.linear_1(self.norm_2(mixed))))

    def reset_parameters(self) -> None:
        """Draw new weights for the convolution, and let the block pass on what it gets."""
        for module in (self.norm_1, self.conv, self.norm_2):
            module.reset_parameters()
        nn.init.zeros_(self.linear_2.weight)
