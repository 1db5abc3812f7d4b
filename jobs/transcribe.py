"""Transcribe archives of recordings of any length.

audio -> recordings (discovery) -> work items -> their text, on Ray Data (pipeline) -> recordings with text (assembly)

out/ holds recordings/*.parquet, files/NAME.txt and the like, errors.jsonl, summary.json, and in work/ the results that
later runs go on from.
"""


from .common.cli import run_job
from .transcription.recipe import TranscribeRecipe

PARTLY_FAILED = 3


def run(recipe: TranscribeRecipe) -> int:
    """Transcribe the recipe's recordings; returns 3 if one failed and `strict` is on.

    Raises DataError when there are none, ModelError, OutputError.
    """
    from .transcription import driver

    return PARTLY_FAILED if driver.run(recipe).failed and recipe.strict else 0


if __name__ == "__main__":
    raise SystemExit(run_job(TranscribeRecipe, run, summary=__doc__))
