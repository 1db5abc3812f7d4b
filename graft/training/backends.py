"""How gradients and optimizer states are shared between workers: plain torch (one process or DDP), or DeepSpeed ZeRO.

Both divide by nothing: the loop's loss is already divided by the whole step's label count, so gradients are summed over all workers.
Their states are told by parameter name, in float32, whole: they do not depend on the number of workers or on the backend.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.errors import require

STATE_KEYS = ("exp_avg", "exp_avg_sq")
State = dict[str, dict[str, Tensor]]
"""Parameter name -> weight, exp_avg, exp_avg_sq, each float32 in the parameter's shape."""


class Backend(Protocol):
    """A model with its optimizer."""

    def backward(self, inputs: Mapping[str, Tensor], *, label_count: int, is_last: bool) -> Tensor:
        """Add the gradients of a batch, which may be the last of its step; returns its loss, the sum over its labels by `label_count`."""
        ...

    def step(self, learning_rate: float) -> float:
        """Update the weights; returns the gradient's norm before clipping."""
        ...

    def state(self) -> State:
        """Gather weights and optimizer states; every worker must call it."""
        ...

    def load_state(self, state: State, *, step: int) -> None:
        """Set weights and optimizer states after `step` updates."""
        ...


class TorchBackend:
    """AdamW on the trainable parameters, which stay in float32; DDP where there is more than one process."""

    def __init__(self, model: nn.Module, *, weight_decay: float, max_grad_norm: float):
        self.trained = trained_parameters(model)
        self.world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.optimizer = torch.optim.AdamW(self.trained.values(), weight_decay=weight_decay, betas=(0.9, 0.999), fused=True)
        self.max_grad_norm = max_grad_norm
        self.model: Any = model
        if self.world_size > 1:
            device = next(iter(self.trained.values())).device
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def backward(self, inputs: Mapping[str, Tensor], *, label_count: int, is_last: bool) -> Tensor:
        if self.world_size > 1:
            self.model.require_backward_grad_sync = is_last  # DDP's forward reads it
        loss = self.model(**inputs, label_count=label_count).loss
        (loss * self.world_size).backward()  # DDP averages
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> State:
        states = self.optimizer.state
        return {
            name: {"weight": p.detach().float().cpu(), **{key: states[p][key].float().cpu() for key in STATE_KEYS if key in states[p]}}
            for name, p in self.trained.items()
        }

    @torch.no_grad()
    def load_state(self, state: State, *, step: int) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state[name]["weight"])
            if step:
                moments = {key: state[name][key].to(parameter.device, parameter.dtype) for key in STATE_KEYS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}


class DeepSpeedBackend:
    """AdamW under DeepSpeed ZeRO, whose JSON is generated here."""

    def __init__(self, model: nn.Module, *, zero_stage: int, accumulation: int, weight_decay: float, max_grad_norm: float, bf16: bool):
        deepspeed = require("deepspeed", extra="train")
        self.trained = trained_parameters(model)
        self.world_size = torch.distributed.get_world_size()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "steps_per_print": 2**31,
        }
        optimizer = torch.optim.AdamW(self.trained.values(), weight_decay=weight_decay, betas=(0.9, 0.999))
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, model_parameters=list(self.trained.values()), optimizer=optimizer, config=config
        )

    def backward(self, inputs: Mapping[str, Tensor], *, label_count: int, is_last: bool) -> Tensor:
        loss = self.engine(**inputs, label_count=label_count).loss
        # ZeRO averages over workers; the loss is divided by the step's label count, so nothing is left to divide.
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def state(self) -> State:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return {
            name: {
                "weight": safe_get_full_fp32_param(p).detach().cpu().clone(),
                **{key: safe_get_full_optimizer_state(p, key).detach().cpu().clone() for key in STATE_KEYS},
            }
            for name, p in self.trained.items()
        }

    @torch.no_grad()
    def load_state(self, state: State, *, step: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if step:  # AdamW would make its moments in the first step; ZeRO knows where in them each parameter's lie once they are linked
            for flat in (flat for group in self.optimizer.param_groups for flat in group["params"]):
                moments = {key: torch.zeros_like(flat) for key in STATE_KEYS}
                self.optimizer.state[flat] = {"step": torch.tensor(float(step)), **moments}
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.trained.items():
            safe_set_full_fp32_param(parameter, state[name]["weight"])
            parameter.data.copy_(state[name]["weight"])
            for key in STATE_KEYS if step else ():
                safe_set_full_optimizer_state(parameter, state[name][key], key)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
