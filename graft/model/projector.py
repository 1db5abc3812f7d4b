"""The join that is trained: audio states to text embeddings."""

from torch import Tensor, nn


class AudioProjector(nn.Module):
    """Map audio states (tokens, d_model) to text embeddings (tokens, hidden_size).

    `linear` is one matrix without bias, as in the reference system and, but for a zero bias, Qwen2Audio. `mlp` is Linear, GELU, Linear of
    the text's width, as in AudioFlamingo3.
    """

    def __init__(self, kind: str, *, audio_width: int, text_width: int):
        super().__init__()
        if kind == "linear":
            self.linear = nn.Linear(audio_width, text_width, bias=False)
        else:
            self.linear_1 = nn.Linear(audio_width, text_width)
            self.act = nn.GELU()
            self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, states: Tensor) -> Tensor:
        if hasattr(self, "linear"):
            return self.linear(states)
        return self.linear_2(self.act(self.linear_1(states)))
