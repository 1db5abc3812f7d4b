"""Train LoRA adapters on the language model of a graft together with its projector.

The frozen weights of the language model are quantized to NF4 (QLoRA), or left in `dtype` (LoRA).
"""

import os
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from graft.config import Recipe
from graft.errors import ModelError
from graft.keys import MachineKey, ModelKey, ScheduleKey, StageFolder

from .build import is_untrained, planned_graft
from .common.cli import PlanOptions, run_job
from .training.recipe import TrainRecipe


class LoraRecipe(Recipe):
    """The LoRA adapters."""

    rank: int = Field(default=64, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(default=16, ge=1)
    """Scale of each adapter: its update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    encoder: bool = False
    """Put adapters on the Whisper encoder, too."""


class LearningRates(Recipe):
    """Learning rates of single parts, each with the warm-up and the schedule of learning_rate."""

    projector: float | None = Field(default=None, ge=0)
    """Learning rate of the projector. 0 leaves it as it is, null takes learning_rate."""
    adapters: float | None = Field(default=None, ge=0)
    """Learning rate of the adapters on the language model. 0 leaves them as they are, null takes learning_rate."""
    encoder: float | None = Field(default=None, ge=0)
    """Learning rate of the adapters on the Whisper encoder (lora.encoder). null takes learning_rate."""


class Stage2Recipe(TrainRecipe):
    """Settings of stage 2, which trains adapters and projector."""

    projector: ModelKey[StageFolder | None] = None
    """Output folder of stage 1, whose projector is trained on. null takes that of `adapters`, or the graft's own where
    it is trained, as a pretrained or merged graft's is."""
    adapters: ModelKey[StageFolder | None] = None
    """Output folder of an earlier stage 2 on the same graft, whose adapters are trained on. null makes fresh ones."""
    quantize: ModelKey[Literal["nf4", "none"]] = "nf4"
    """Quantization of the language model: nf4 is QLoRA, none keeps it in `dtype`."""
    lora: ModelKey[LoraRecipe] = LoraRecipe()
    """Shape of the adapters."""
    backend: MachineKey[Literal["deepspeed", "torch"]] = "torch"
    """Training backend: plain torch, with DDP where there are several workers, or DeepSpeed ZeRO."""
    learning_rate: ScheduleKey[float] = Field(default=2e-4, gt=0)
    """Learning rate after the warm-up."""
    learning_rates: ScheduleKey[LearningRates] = LearningRates()
    """Other learning rates for the projector, the adapters or the encoder; the log shows learning_rate."""

    @model_validator(mode="after")
    def _check_encoder_rate(self) -> Self:
        if self.learning_rates.encoder is not None and not self.lora.encoder:
            raise ValueError("learning_rates.encoder needs adapters on the encoder: give lora.encoder=true")
        return self


def run(recipe: Stage2Recipe) -> dict[str, Any]:
    """Train adapters and projector; returns what result.json holds: losses, counts and seconds."""
    from graft.checkpoints.lora import LoraSettings
    from graft.training.stages import Stage

    from .training.driver import fit

    lora = LoraSettings(**recipe.lora.model_dump())
    adapters, projector = _initial_adapters(recipe), _initial_projector(recipe)
    stage = Stage(2, lora=lora, nf4=recipe.quantize == "nf4", projector=projector, adapters=adapters)
    return fit(recipe, stage)


def _initial_adapters(recipe: Stage2Recipe) -> str | None:
    """Check the folder of the adapters to start from.

    Raises ModelError for another rank or alpha than the recipe's, and for adapters of a graft of other bases.
    """
    from graft.checkpoints.loading import base_checkpoint, check_graft
    from graft.checkpoints.lora import read_adapters
    from graft.checkpoints.projector_file import read_projector
    from graft.model.configuration import read_graft_config

    if recipe.adapters is None:
        return None
    _, config = read_adapters(recipe.adapters)
    if (config.r, config.lora_alpha) != (recipe.lora.rank, recipe.lora.alpha):
        raise ModelError(
            f"the adapters in {recipe.adapters} have lora.rank={config.r} lora.alpha={config.lora_alpha}: give these"
        )
    check_graft(recipe.model)
    # The projector beside the adapters states the bases of both; projector= may be another one.
    read_projector(recipe.adapters, read_graft_config(base_checkpoint(recipe.model)))
    return os.path.abspath(recipe.adapters)


def _initial_projector(recipe: Stage2Recipe) -> str | None:
    """Choose the folder of the projector to start from; None for the graft's own.

    Raises ModelError for a projector that was never trained.
    """
    from graft.checkpoints.loading import read_stage
    from graft.checkpoints.lora import has_adapters

    if recipe.projector is None and recipe.adapters is not None:
        return os.path.abspath(recipe.adapters)
    if recipe.projector is None and read_stage(recipe.model) is None:
        if is_untrained(recipe.model):
            raise ModelError(
                f"the projector of {recipe.model} is untrained: give projector=, the output folder of stage 1"
            )
        return None
    if recipe.projector is None and has_adapters(recipe.model):
        raise ModelError(
            f"{recipe.model} is stage 2's output: give its graft as model= and it as adapters=, or merge it first"
        )
    return os.path.abspath(recipe.projector or recipe.model)


def plan(recipe: Stage2Recipe, options: PlanOptions) -> None:
    """Print the memory, time and cost that a run is estimated to take."""
    from .training.estimate import TrainedParts, print_plan

    trained = TrainedParts(lora_rank=recipe.lora.rank, lora_encoder=recipe.lora.encoder, nf4=recipe.quantize == "nf4")
    print_plan(recipe, options, *planned_graft(recipe.model), trained=trained)


EXAMPLES = (
    "--recipe small-stage2 model=runs/graft projector=runs/stage1 data=runs/data/train out=runs/stage2",
    "--recipe fast-7b-stage2 model=fast-7b workers=8 --plan --device h100 --hours 2500",
)
"""Arguments that --help shows."""
main = partial(run_job, Stage2Recipe, run, summary=__doc__, plan=plan, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
