"""Estimate how long work takes on this machine: seconds on a reference machine, times this one's slowness.

The reference is two cores of an AMD EPYC (AVX-512 with BF16), in fp32. Its slowness in bf16 is 0.54.
"""

from typing import Literal

ROWS, WIDTH, HIDDEN = 400, 576, 1536
"""Shape of the layer whose training step is timed, one of SmolLM2-135M's on 400 tokens."""
REFERENCE_S = 0.024
"""Seconds of its forward and backward pass in fp32 on one core of the reference machine."""


def slowness(dtype: Literal["fp32", "bf16"]) -> float:
    """Measure how many times as long as on the reference machine a layer's step takes here, on one core in `dtype`."""
    import torch
    from torch.utils.benchmark import Timer

    from graft.checkpoints.loading import DTYPES

    layer = torch.nn.Linear(WIDTH, HIDDEN, dtype=DTYPES[dtype])
    inputs = torch.randn(ROWS, WIDTH, dtype=DTYPES[dtype], requires_grad=True)
    timer = Timer("layer(inputs).sum().backward()", globals={"layer": layer, "inputs": inputs}, num_threads=1)
    return timer.blocked_autorange(min_run_time=0.3).median / REFERENCE_S


def about(seconds: float) -> str:
    """Write an estimate as people read it: "about 5 s", "about 75 s", "about 4 minutes"."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    return f"about {round(seconds / 60)} minutes"
