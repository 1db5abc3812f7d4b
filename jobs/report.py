"""Make a web page of an evaluation: one file that opens without a server or a network.

It has the scores with their intervals and verdicts, plots, every clip with the differences between two systems word by
word, the audio of the most telling ones, a sheet to judge the labels, the checks of the evaluation, the training of the
model, and the recipe. Beside it, in exports/, the same results are written as STM, SegLST
and a NeMo manifest, which meeteval-viz and NeMo's Speech Data Explorer open.

predictions.jsonl, report.json -> clips with word differences, pictures, audio -> report.html, exports/
"""

from functools import partial
from pathlib import Path

from pydantic import Field

from graft.config import Recipe
from graft.errors import RecipeError
from graft.keys import DataKey, Location, OutputKey

from .common.cli import run_job
from .common.outputs import claim_output, locked_output
from .evaluation.report_page.settings import PageSettings
from .score import ScoreRecipe, read_lines

PREDICTIONS_FILE = "predictions.jsonl"


class ReportRecipe(Recipe):
    """The evaluation to show, and what the page holds."""

    files: DataKey[list[Location]] = Field(min_length=1)
    """The output folder of graft evaluate; or files of references and hypotheses, as graft score takes them. They can
    be given without files=."""
    runs: DataKey[list[str] | None] = None
    """Output folders of stages, whose curves and changed weights are shown; null takes those that led to the evaluated
    model, as far as its folder's recipes name them."""
    page: OutputKey[PageSettings] = PageSettings()
    """How many clips the page lists, and how many of them have audio."""
    out: OutputKey[str | None] = None
    """Folder for report.html and exports/; null is the folder of the evaluation."""


def run(recipe: ReportRecipe) -> None:
    """Write the page, also again. Raises DataError for files that are no evaluation, MissingExtra, and OutputError."""
    from .evaluation.report_page.evaluation import Evaluation, evaluation_of, read_evaluation
    from .evaluation.report_page.writing import runs_of, write_report

    folder = _evaluation_folder(recipe)
    out = recipe.out or folder
    if out is None:
        raise RecipeError("files are no folder of graft evaluate: give the folder for the page as out=FOLDER")

    def read() -> Evaluation:
        if folder is not None:
            return read_evaluation(folder)
        lines, own_references = read_lines(ScoreRecipe(files=recipe.files))
        return evaluation_of(lines, own_references=own_references)

    with locked_output(out):
        evaluation = read()  # before anything is written
        runs = runs_of(evaluation, recipe.runs)
        page = write_report(evaluation, claim_output(out, recipe) if recipe.out else Path(out), recipe.page, runs)
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)", flush=True)


def _evaluation_folder(recipe: ReportRecipe) -> str | None:
    """Return the folder of graft evaluate, None where files of texts were given."""
    first, *others = recipe.files
    return first if not others and Path(first, PREDICTIONS_FILE).is_file() else None


EXAMPLES = ("runs/scores", "refs.jsonl graft.jsonl whisper.jsonl out=runs/page")
"""Arguments that --help shows."""
main = partial(run_job, ReportRecipe, run, summary=__doc__, examples=EXAMPLES, words="files")

if __name__ == "__main__":
    raise SystemExit(main())
