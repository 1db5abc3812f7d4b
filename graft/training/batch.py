"""A batch as the training loop takes it, whoever made it."""

from collections.abc import Mapping
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
