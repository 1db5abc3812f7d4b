"""Batches, and the backends that train on them: plain torch for one process or DDP; DeepSpeed ZeRO's is in zero.py.

Backends sum gradients over all workers, because the loop divides each loss by the whole step's label count. They give
their states by parameter name, in float32 and unsharded, so that a checkpoint depends neither on the number of workers
nor on the backend.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.training.checkpoint import State

STATE_KEYS = ("exp_avg", "exp_avg_sq")
BETAS = (0.9, 0.999)


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
    masked: tuple[str, ...] = ()
    """Ids of the clips that are masked, each with the reason."""
    flops: float = 0.0
    """FLOPs of its forward and backward pass."""
    encode: Callable[[], Tensor] | None = None
    """Computes the clips' audio_states, which then replace input_features."""

    def model_inputs(self) -> Mapping[str, Tensor]:
        """Return the model's inputs, with audio_states computed where `encode` is given."""
        return self.inputs if self.encode is None else {**self.inputs, "audio_states": self.encode()}


class Backend(Protocol):
    """A model with its optimizer."""

    model: nn.Module
    """The model itself, without wrappers such as DDP."""

    def backward(self, inputs: Mapping[str, Tensor], *, label_count: int, is_last: bool) -> Tensor:
        """Add a batch's gradients; returns its loss, summed over its labels and divided by `label_count`.

        `is_last` marks the last batch of a step, after which workers exchange gradients.
        """

    def step(self, learning_rate: float) -> float:
        """Update the weights, each part at its scale of the rate; returns the gradients' norm before clipping."""

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Put `model` into eval mode without gradients, in the arithmetic of training; every worker must enter it."""

    def state(self) -> State:
        """Copy weights and optimizer states to the CPU; every worker must call it."""

    def load_state(self, state: State, *, step: int) -> None:
        """Set weights and optimizer states after `step` updates."""


class TorchBackend:
    """AdamW on the trainable parameters, which stay in float32; DDP where there is more than one process.

    With `bf16` autocast rounds the trained weights to bf16 in matrix products. `lr_scales` are parameter_groups'.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float,
        max_grad_norm: float,
        bf16: bool = False,
        lr_scales: Mapping[str, float] | None = None,
    ):
        self.model = model
        self.trained = trainable_parameters(model)
        self.world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        groups = parameter_groups(self.trained, lr_scales or {})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, betas=BETAS, fused=True)
        self.max_grad_norm = max_grad_norm
        device = next(iter(self.trained.values())).device
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        modules: Iterable[Any] = model.modules() if bf16 else ()
        for module in modules:
            # Casting is left to autocast: PEFT would compute float32 adapters in float32, which takes twice as long.
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
        self._wrapped: Any = model
        if self.world_size > 1:
            self._wrapped = nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None
            )

    def backward(self, inputs: Mapping[str, Tensor], *, label_count: int, is_last: bool) -> Tensor:
        if self.world_size > 1:
            self._wrapped.require_backward_grad_sync = is_last  # DDP's forward pass reads it
        with self._autocast:
            loss = self._wrapped(**inputs, label_count=label_count).loss
        (loss * self.world_size).backward()  # DDP averages over workers
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.optimizer, learning_rate)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with eval_mode(self.model), self._autocast:
            yield

    def state(self) -> State:
        states = self.optimizer.state
        return {
            name: {
                "weight": float32_copy(p),
                **{key: float32_copy(states[p][key]) for key in STATE_KEYS if key in states[p]},
            }
            for name, p in self.trained.items()
        }

    @torch.no_grad()
    def load_state(self, state: State, *, step: int) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state[name]["weight"])
            if step:
                moments = {key: state[name][key].to(parameter.device, parameter.dtype) for key in STATE_KEYS}
                moments["step"] = torch.tensor(float(step), device=parameter.device)
                self.optimizer.state[parameter] = moments


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(trained: Mapping[str, nn.Parameter], lr_scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Group parameters for an optimizer by the scale of their learning rate, which is 1 where none is given.

    `lr_scales` has scales of the parts `projector`, `adapters` (on the language model) and `encoder` (adapters on it).
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(lr_scales.get(trained_part(name), 1.0), []).append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]


def trained_part(name: str) -> str:
    """Return the part that a trained parameter belongs to: projector, encoder or adapters."""
    return {"audio_projector": "projector", "audio_tower": "encoder"}.get(name.partition(".")[0], "adapters")


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; at the end every module returns to its own mode.

    NF4 matrices stay in train mode: on some CPUs bitsandbytes repacks them for inference at their first use in eval
    mode, which cannot be undone.
    """
    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, was_training in modes:
        if type(module).__module__.startswith("bitsandbytes."):
            module.train(was_training)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training  # train() would set the modules inside it, too


def float32_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU in float32, even from the CPU: training continues while the copy is written to disk."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
