"""A batch as the training loop takes it, whoever made it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """A batch on its device: the model's inputs with labels, what the plan says of it, and the clips and seconds in it that count."""

    inputs: Mapping[str, Tensor]
    position: int
    step_position: int
    step_label_count: int
    ids: tuple[str, ...]
    """Of the clips that count."""
    clip_count: int
    token_count: int
    """Without padding."""
    audio_s: float
    flops: float = 0.0
    """What the model must compute for it, forward and backward."""
    encode: Callable[[], Tensor] | None = None
    """Makes the clips' audio_states, where they stand in place of input_features."""

    def model_inputs(self) -> Mapping[str, Tensor]:
        """All that the model takes; encodes what is not encoded yet."""
        return self.inputs if self.encode is None else {**self.inputs, "audio_states": self.encode()}
