"""AudioProjector: the module between audio encoder and language model, the only one trained from scratch."""

from torch import Tensor, nn


class AudioProjector(nn.Module):
    """Project audio states (tokens, d_model) to text embeddings (tokens, hidden_size).

    `linear` is one matrix without bias, as in the reference system; Qwen2Audio has the same with a bias. `mlp` is
    linear, GELU, linear with the language model's width in between, as in AudioFlamingo3. States are cast to the
    projector's dtype, which is float32 in training.
    """

    def __init__(self, kind: str, *, audio_width: int, text_width: int):
        super().__init__()
        if kind == "linear":
            self.linear = nn.Linear(audio_width, text_width, bias=False)
        else:
            self.linear_1 = nn.Linear(audio_width, text_width)
            self.act = nn.GELU()
            self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, audio_states: Tensor) -> Tensor:
        audio_states = audio_states.to(next(self.parameters()).dtype)
        if hasattr(self, "linear"):
            return self.linear(audio_states)
        return self.linear_2(self.act(self.linear_1(audio_states)))
