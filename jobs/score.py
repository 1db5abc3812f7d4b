"""Score transcripts that are there already, of any system, against their references.

It needs no GPU, no model and no cluster. The first file holds the references, each further one what a system wrote; one
file may hold both. Word and character error rates have 95 % intervals, and systems are compared with each other on the
same clips. Files are predictions.jsonl of graft evaluate, manifests of NeMo or the Open ASR Leaderboard, SegLST, CSV,
TSV, NIST's trn, stm and ctm, or Kaldi's text.

references, hypotheses -> clips with the answers of each system -> rates, intervals, verdicts -> a table, scores.json
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from graft.config import Recipe
from graft.errors import DataError, RecipeError
from graft.keys import DataKey, Location, ModelKey, OutputKey
from graft.storage.atomic import write_atomic

from .common.cli import run_job
from .common.outputs import claim_output, locked_output
from .evaluation.predictions import Prediction
from .evaluation.text_files import ColumnName, read_texts

SCORES_FILE = "scores.json"
USUAL_COLUMNS = ("source", "speaker", "sex", "duration")
"""Columns by which rates are broken down where the files have them."""


class ScoreRecipe(Recipe):
    """The references, what systems wrote, and how it is scored."""

    files: DataKey[list[Location]] = Field(default=[])
    """The references, then what each system wrote: files, globs, or folders of JSON lines. One file with both is
    enough. They can be given without files=."""
    refs: DataKey[list[Location]] = Field(default=[])
    """References; all of `files` are then what systems wrote. Only these clips count, also where hypotheses come with
    references of their own."""
    hyps: DataKey[dict[str, Location] | list[Location]] = Field(default={})
    """What systems wrote, by their names in the scores, as hyps.whisper=whisper.jsonl; in a list, names are those
    which the files say, or theirs."""
    columns: DataKey[dict[ColumnName, str]] = Field(default={})
    """Names of columns where they differ from the usual ones, as columns.hypothesis=my_model."""
    language: DataKey[str | None] = None
    """Language of clips of which the files name none, such as de (ISO 639-1). It chooses the normaliser."""
    scorer: ModelKey[Literal["graft", "open-asr"]] = "graft"
    """open-asr is the rule of the Open ASR Leaderboard: OpenAI's English normaliser, words that are joined or parted
    otherwise are right, clips without reference words are left out, and the mean of the sets' rates counts."""
    normalizer: ModelKey[Literal["auto", "english", "openai english", "basic", "basic, by character"]] = "auto"
    """How texts are normalised before they are compared; auto chooses it by the language of each set."""
    leaderboard: ModelKey[Location | None] = None
    """A checkout of the Open ASR Leaderboard, whose own English normaliser is used: its rules change from time to
    time. The scores name its digest."""
    by: DataKey[list[str]] = Field(default=[*USUAL_COLUMNS])
    """Columns by which the rates are broken down; any column of the files can be named."""
    seed: DataKey[int] = Field(default=0, ge=0)
    """Seed of the intervals."""
    out: OutputKey[str | None] = None
    """Folder for scores.json, which has all numbers; null only prints the table."""


def run(recipe: ScoreRecipe) -> None:
    """Score the files, also again. Raises as score, and OutputError where the folder `out` holds other results."""
    from .evaluation.score_table import score_table

    if recipe.out is None:
        print(score_table(score(recipe)), flush=True)
        return
    with locked_output(recipe.out):
        scores = score(recipe)  # before anything is written
        folder = claim_output(recipe.out, recipe)
        write_atomic(folder / SCORES_FILE, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    print(score_table(scores), flush=True)


def score(recipe: ScoreRecipe) -> dict[str, Any]:
    """Score the files that a recipe names; returns the content of scores.json.

    Raises RecipeError, DataError for files that cannot be read or that do not fit each other, and MissingExtra.
    """
    from .evaluation.leaderboard import leaderboard_normalizer
    from .evaluation.samples import ScoringSettings
    from .evaluation.scoring import score_predictions

    settings = ScoringSettings(
        scorer=recipe.scorer,
        normalizer=None if recipe.normalizer == "auto" else recipe.normalizer,
        english=leaderboard_normalizer(recipe.leaderboard) if recipe.leaderboard else None,
        language=recipe.language,
        by=recipe.by,
        seed=recipe.seed,
    )
    lines, own_references = read_lines(recipe)
    scores = score_predictions(lines, settings, own_references=own_references)
    found = {column for one in scores["sets"].values() for column in one.get("breakdowns", {})}
    if missing := [column for column in recipe.by if column not in found | set(USUAL_COLUMNS)]:
        known = sorted({name for line in lines for name in line.more} | {*USUAL_COLUMNS, "language"})
        raise DataError(f"by={missing[0]}: no clip has such a column: give some of {', '.join(known)}")
    return scores


def read_lines(recipe: ScoreRecipe) -> tuple[list[Prediction], bool]:
    """Read the files that a recipe names; returns their lines, and whether the references of answers count.

    Raises RecipeError, and DataError for files that cannot be read.
    """
    references, hypotheses = _roles(recipe)
    lines = list(_reference_lines(references, recipe.columns))
    holds_answers = any(line.system is not None for line in lines)
    lines += _answer_lines(hypotheses, recipe.columns)
    return lines, holds_answers and not recipe.refs


def _roles(recipe: ScoreRecipe) -> tuple[list[str], list[tuple[str | None, str]]]:
    """Return the files of references, and those of hypotheses with the names that they are given."""
    references, answers = (recipe.refs, recipe.files) if recipe.refs else (recipe.files[:1], recipe.files[1:])
    if not references:
        raise RecipeError("there is nothing to score: give the file of the references, then those of the hypotheses")
    named = recipe.hyps.items() if isinstance(recipe.hyps, Mapping) else ((None, one) for one in recipe.hyps)
    return list(references), [*((None, one) for one in answers), *named]


def _reference_lines(locations: list[str], columns: Mapping[ColumnName, str]) -> Iterator[Prediction]:
    """Read the references; of several files, each without names of sets is a set."""
    names = _names(locations)
    for location in locations:
        for line in read_texts(location, "reference", columns):
            is_answer = line.system is not None or line.hypothesis is not None or line.error is not None
            system = line.system or (names[location] if is_answer else None)
            set_name = line.set_name or (names[location] if len(locations) > 1 else None)
            yield replace(line, system=system, set_name=set_name)


def _answer_lines(given: list[tuple[str | None, str]], columns: Mapping[ColumnName, str]) -> Iterator[Prediction]:
    names = _names([location for _, location in given])
    for name, location in given:
        lines = list(read_texts(location, "hypothesis", columns))
        if not any(line.hypothesis is not None or line.error for line in lines):
            raise DataError(f"{location} holds no hypothesis: name its column as columns.hypothesis=NAME")
        systems = list(dict.fromkeys(line.system for line in lines if line.system))
        if name is not None and len(systems) > 1:
            raise DataError(
                f"hyps.{name}={location} holds several systems ({', '.join(systems[:3])}): give it without a name"
            )
        yield from (replace(line, system=name or line.system or names[location]) for line in lines)


def _names(locations: list[str]) -> dict[str, str]:
    """Name files after themselves, globs and files of the same name after their folders too."""
    stems = {location: Path(location).name.partition(".")[0] for location in locations}
    stems |= {location: Path(location).parent.name for location, stem in stems.items() if "*" in stem}
    doubled = [stem for stem, count in Counter(stems.values()).items() if count > 1]
    return {
        location: f"{Path(location).parent.name}/{stem}" if stem in doubled else stem
        for location, stem in stems.items()
    }


EXAMPLES = (
    "refs.jsonl hyps.jsonl",
    "refs=refs.trn hyps.graft=graft.trn hyps.whisper=whisper.trn out=runs/scores",
    "predictions.jsonl by=source,snr_db scorer=open-asr",
)
"""Arguments that --help shows."""
main = partial(run_job, ScoreRecipe, run, summary=__doc__, examples=EXAMPLES, words="files")

if __name__ == "__main__":
    raise SystemExit(main())
