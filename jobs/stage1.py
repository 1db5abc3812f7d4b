"""Train the projector of a graft, with its encoder and language model frozen.

The projector learns from transcripts, by the language model's loss or by CTC pre-alignment.
"""

import os
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from graft.keys import ModelKey, ScheduleKey, StageFolder

from .build import planned_graft
from .common.cli import PlanOptions, run_job
from .training.recipe import TrainRecipe


class Stage1Recipe(TrainRecipe):
    """Settings of stage 1, which trains the projector, by default under DeepSpeed ZeRO-2."""

    objective: ScheduleKey[Literal["transcript", "ctc"]] = "transcript"
    """Loss to train with: `transcript` is the language model's loss on the transcript; `ctc` is CTC pre-alignment
    against the text embeddings of `letters`, without the language model. Minutes of ctc save hours of either stage."""
    letters: ScheduleKey[str | None] = Field(default=None, min_length=1)
    """Characters of CTC's targets besides the space, in lower case; a letter with marks that is not among them is
    written without, and all others count as spaces. null takes the letters and digits of the texts that are one token
    each of the language model."""
    projector: ModelKey[StageFolder | None] = None
    """Output folder of an earlier stage 1 to start from. null starts from the graft's own projector, or with ctc from
    zero."""

    @model_validator(mode="after")
    def _check_token_noise(self) -> Self:
        if self.objective == "ctc" and self.token_noise:
            raise ValueError(
                "token_noise changes the language model's inputs, and objective=ctc does not use it: leave it out"
            )
        return self


def run(recipe: Stage1Recipe) -> dict[str, Any]:
    """Train the projector of a graft; returns what result.json holds: losses, counts and seconds."""
    from graft.training.stages import Stage

    from .training.driver import fit

    projector = os.path.abspath(recipe.projector) if recipe.projector else None
    return fit(
        recipe, Stage(1, projector=projector, letters=recipe.letters or "" if recipe.objective == "ctc" else None)
    )


def plan(recipe: Stage1Recipe, options: PlanOptions) -> None:
    """Print the memory, time and cost that a run is estimated to take."""
    from .training.estimate import TrainedParts, print_plan

    print_plan(
        recipe,
        options,
        *planned_graft(recipe.model),
        trained=TrainedParts(language_model=recipe.objective == "transcript"),
    )


EXAMPLES = (
    "--recipe small-stage1 model=runs/graft data=runs/data/train out=runs/stage1",
    "--recipe fast-7b-stage1 model=fast-7b workers=8 --plan --hours 2500 --price 3.5",
)
"""Arguments that --help shows."""
main = partial(run_job, Stage1Recipe, run, summary=__doc__, plan=plan, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
