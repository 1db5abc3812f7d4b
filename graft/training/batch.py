"""TrainingBatch, the training loop's input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """A batch on its device; clips that could not be decoded are masked and not counted."""

    inputs: Mapping[str, Tensor]
    """The model's inputs, labels included."""
    position: int
    """Number of real batches of the run up to and including this one, as in PlannedBatch."""
    step_position: int
    step_label_count: int
    ids: tuple[str, ...]
    """Ids of the clips."""
    clip_count: int
    token_count: int
    """Number of tokens, padding excluded."""
    audio_s: float
    flops: float = 0.0
    """FLOPs of its forward and backward pass."""
    encode: Callable[[], Tensor] | None = None
    """Computes the clips' audio_states, which then replace input_features."""

    def model_inputs(self) -> Mapping[str, Tensor]:
        """Return the model's inputs, with audio_states computed where `encode` is given."""
        return self.inputs if self.encode is None else {**self.inputs, "audio_states": self.encode()}
