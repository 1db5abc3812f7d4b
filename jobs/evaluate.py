"""Score a graft on labelled clips by word and character error rates, beside plain Whisper.

The clips can also be scored with their audio swapped, which a model that listens fails.
On request it also scores other instructions, clips joined to recordings, and sounds without speech, for which it counts
the characters that are written.
Writes report.json and, one clip a line, predictions.jsonl.
"""


from .common.cli import run_job
from .evaluation.recipe import EvaluateRecipe


def run(recipe: EvaluateRecipe) -> int:
    """Score a model; 1 if a rate is not as expected."""
    from .evaluation import scoring

    return 0 if all(verdict["agrees"] for verdict in scoring.run(recipe)["expected"]) else 1


if __name__ == "__main__":
    raise SystemExit(run_job(EvaluateRecipe, run, summary=__doc__))
