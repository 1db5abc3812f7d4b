"""The sharding backend: AdamW under DeepSpeed ZeRO, whose configuration is generated here.

ZeRO 1 shards the optimizer's states over the workers, 2 the gradients too, 3 all weights, frozen ones included.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import require
from graft.training.backends import (
    BETAS,
    STATE_KEYS,
    eval_mode,
    float32_copy,
    parameter_groups,
    set_learning_rate,
    trainable_parameters,
)
from graft.training.checkpoint import State


class ZeroBackend:
    """AdamW under DeepSpeed ZeRO in an existing process group; master weights are float32 in any arithmetic."""

    def __init__(
        self,
        model: nn.Module,
        *,
        zero_stage: int,
        accumulation: int,
        weight_decay: float,
        max_grad_norm: float,
        bf16: bool,
        lr_scales: Mapping[str, float] | None = None,
    ):
        deepspeed = require("deepspeed", extra="train")
        self.model = model
        self.trained = trainable_parameters(model)
        self.zero_stage = zero_stage
        self.world_size = torch.distributed.get_world_size()
        groups = parameter_groups(self.trained, lr_scales or {})
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, betas=BETAS, fused=True)
        config = zero_config(zero_stage, accumulation=accumulation, max_grad_norm=max_grad_norm, bf16=bf16)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, model_parameters=list(self.trained.values()), optimizer=optimizer, config=config
        )
        if len(groups) > 1:
            # ZeRO 1 and 2 look for the moments of all groups after the first one's first step, when others have none.
            self._make_moments(0)

    def backward(self, inputs: Mapping[str, Tensor], *, label_count: int, is_last: bool) -> Tensor:
        loss = self.engine(**inputs, label_count=label_count).loss
        # ZeRO averages gradients over workers; they must be summed, because the loss is divided by the step's labels.
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.optimizer, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return eval_mode(self.model)

    def state(self) -> State:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return {
            name: {
                "weight": float32_copy(safe_get_full_fp32_param(p)).view(_shape(p)),
                **{key: float32_copy(safe_get_full_optimizer_state(p, key)).view(_shape(p)) for key in STATE_KEYS},
            }
            for name, p in self.trained.items()
        }

    @torch.no_grad()
    def load_state(self, state: State, *, step: int) -> None:
        if step:
            self._make_moments(step)
        load = self._load_sharded if self.zero_stage == 3 else self._load_whole
        for name, parameter in self.trained.items():
            load(parameter, state[name], STATE_KEYS if step else ())

    def _make_moments(self, step: int) -> None:
        """Create AdamW's moments, as its first step would; only then can ZeRO set a parameter's moments."""
        flats = [flat for group in self.optimizer.param_groups for flat in group["params"]]
        for flat in self.optimizer.fp32_partitioned_groups_flat if self.zero_stage == 3 else flats:
            moments = {key: torch.zeros_like(flat) for key in STATE_KEYS}
            self.optimizer.optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **moments}
        if self.zero_stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_whole(self, parameter: nn.Parameter, entry: Mapping[str, Tensor], keys: tuple[str, ...]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, entry["weight"])
        parameter.data.copy_(entry["weight"])
        for key in keys:
            safe_set_full_optimizer_state(parameter, entry[key], key)

    def _load_sharded(self, parameter: Any, entry: Mapping[str, Tensor], keys: tuple[str, ...]) -> None:
        """Set this worker's part of a parameter; DeepSpeed's setter refuses sizes that workers do not divide evenly."""
        group, offset, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]

        def local_part(value: Tensor) -> Tensor:
            # (parameter's shape) -> (count * workers,), zeros at the end -> (count,)
            padded = nn.functional.pad(value.flatten(), (0, count * self.world_size - value.numel()))
            return padded.narrow(0, count * torch.distributed.get_rank(), count)

        flat.narrow(0, offset, count).copy_(local_part(entry["weight"]))
        parameter.ds_tensor.data.copy_(local_part(entry["weight"]))
        for key in keys:
            self.optimizer.optimizer.state[flat][key].narrow(0, offset, count).copy_(local_part(entry[key]))


def zero_config(zero_stage: int, *, accumulation: int, max_grad_norm: float, bf16: bool) -> dict[str, Any]:
    """Make DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**31,
    }


@contextlib.contextmanager
def sharded_loading(*, bf16: bool) -> Iterator[None]:
    """Make transformers shard every weight that it creates or loads over the workers (ZeRO-3)."""
    require("deepspeed", extra="train")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers shards weights as long as this object exists.
    config = HfDeepSpeedConfig(zero_config(3, accumulation=1, max_grad_norm=0.0, bf16=bf16))
    try:
        yield
    finally:
        del config
        unset_hf_deepspeed_config()


def restore_rotary_frequencies(model: nn.Module) -> None:
    """Compute the frequencies of rotary positions again, in float32: loading by `sharded_loading` in bf16 rounds them.

    No checkpoint holds them; unsharded models keep them in float32 in any dtype.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "original_inv_freq")]
    for module in modules:
        fresh = type(module)(module.config)
        for name in ("inv_freq", "original_inv_freq"):
            setattr(module, name, nn.Buffer(getattr(fresh, name).to(module.inv_freq.device), persistent=False))


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered_state(module: nn.Module) -> dict[str, Tensor]:
    """Gather and copy a sharded module's tensors; every worker must call it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
