"""Stage 1: train the projector alone, on a frozen Whisper encoder and a frozen language model."""

import sys
from typing import Any

from graft.stages import Stage
from jobs.cli import run_job
from jobs.fit import fit
from jobs.plan import print_plan
from jobs.train_recipe import TrainRecipe


class Stage1Recipe(TrainRecipe):
    """Stage 1: the projector, by default under DeepSpeed ZeRO-2."""


def run(recipe: Stage1Recipe) -> dict[str, Any]:
    """Train the projector of a graft; returns losses, counts and seconds."""
    return fit(recipe, Stage(1))


def main(recipe: Stage1Recipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(Stage1Recipe, main, summary="Train the projector of a graft.", plan=print_plan))
