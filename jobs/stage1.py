"""Train the projector of a graft, with its encoder and language model frozen.

The projector learns from transcripts, by the language model's loss, or from letters by CTC.
"""

import os
import sys
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from graft.model.tokens import LETTERS

from .build import planned_graft
from .common.cli import PlanOptions, run_job
from .training.recipe import TrainRecipe


class Stage1Recipe(TrainRecipe):
    """Stage 1: the projector, by default under DeepSpeed ZeRO-2."""

    objective: Literal["transcript", "ctc"] = "transcript"
    """Transcripts by the language model, or, without it, spelling by CTC against its embeddings of `letters`: minutes that spare either
    stage hours."""
    letters: str = Field(default=LETTERS, min_length=1)
    """What is spelled, besides the space, in lower case and without accents."""
    projector: str | None = None
    """Output folder of an earlier stage 1 to start from; null for the graft's own projector, or for CTC none."""

    @model_validator(mode="after")
    def _check_text_noise(self) -> Self:
        if self.objective == "ctc" and self.token_noise:
            raise ValueError("token_noise changes what is read of an answer, and spelling reads none: leave it out")
        return self


def run(recipe: Stage1Recipe) -> dict[str, Any]:
    """Train the projector of a graft; returns losses, counts and seconds."""
    from graft.training.stages import Stage

    from .training.driver import fit

    projector = os.path.abspath(recipe.projector) if recipe.projector else None
    return fit(recipe, Stage(1, projector=projector, letters=recipe.letters if recipe.objective == "ctc" else None))


def plan(recipe: Stage1Recipe, options: PlanOptions) -> None:
    """Print what a run takes."""
    from .training.estimate import Trained, print_plan

    print_plan(recipe, options, *planned_graft(recipe.model), trained=Trained(reads=recipe.objective == "transcript"))


def main(recipe: Stage1Recipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(Stage1Recipe, main, summary=__doc__, plan=plan))
