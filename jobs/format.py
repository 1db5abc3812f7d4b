"""Give labels the case and punctuation that Whisper hears, without changing their words.

rows -> Whisper (jobs.preparation.pseudo_labels) -> aligned with the labels, words kept -> out/texts.parquet
A row keeps its label where it is formatted already, can't be heard, or agrees too little with what is heard.
A run that was cut off goes on.
"""

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from graft.errors import require
from graft.text.prompts import is_formatted
from graft.text.punctuation import transfer_formatting

from .common.cli import run_job
from .preparation.pseudo_labels import TextsRecipe, Verb, report_untranscribed, write_texts

if TYPE_CHECKING:
    from graft.data.dataset import RowTable

    from .evaluation.asr_pool import ClipTranscript

COLUMNS = {"ID": "string", "text": "string", "words": "int32", "agreed": "int32", "state": "string"}
FORMATTED, KEPT, OWN, UNHEARD = "formatted", "kept", "own", "unheard"
"""States of a row: formatted here; its label kept for want of agreement, or being formatted or empty already; audio not readable."""


class FormatRecipe(TextsRecipe):
    """What to format, by whose ear."""

    least_agreement: float = Field(default=0.7, ge=0, le=1)
    """A row with a smaller share of words heard as they are labelled keeps its label."""


def run(recipe: FormatRecipe) -> dict[str, Any]:
    """Format recipe.data; returns what stands in result.json. Raises DataError, ModelError, OutputError, MissingExtra."""
    require("jiwer", extra="score")
    line = functools.partial(_line, least=recipe.least_agreement)
    return write_texts(recipe, Verb("format", COLUMNS, _wants, line, _counts, _summary))


def _wants(text: str) -> bool:
    return bool(text.strip()) and not is_formatted(text)


def _line(rows: "RowTable", row: int, clip: "ClipTranscript | None", *, least: float) -> dict[str, Any]:
    if clip is None:
        return _kept(rows, row, OWN)
    if clip.error:
        report_untranscribed(rows, row, clip)
        return _kept(rows, row, UNHEARD)
    formatted = transfer_formatting(rows.text(row), clip.text)
    counts = {"words": formatted.words, "agreed": formatted.agreed}
    if formatted.agreement < least:
        return {**_kept(rows, row, KEPT), **counts}
    return {"ID": rows.id(row), "text": formatted.text, **counts, "state": FORMATTED}


def _kept(rows: "RowTable", row: int, state: str) -> dict[str, Any]:
    return {"ID": rows.id(row), "text": rows.text(row), "words": 0, "agreed": 0, "state": state}


def _counts(texts: Path) -> dict[str, Any]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lines = pq.read_table(texts, columns=["words", "agreed", "state"])
    states = Counter(lines["state"].to_pylist())
    agreement = pc.sum(lines["agreed"]).as_py() / max(1, pc.sum(lines["words"]).as_py())
    return {
        "clips": len(lines),
        **{state: states[state] for state in (FORMATTED, KEPT, OWN, UNHEARD)},
        "agreement": agreement,
    }


def _summary(result: dict[str, Any]) -> str:
    return (
        f"{result['agreement']:.1%} of the words heard agree; of {result['clips']} clips {result[FORMATTED]} are formatted, "
        f"{result[KEPT]} agree too little and keep their label, {result[OWN]} needed nothing, {result[UNHEARD]} could not be read"
    )


def main(recipe: FormatRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(FormatRecipe, main, summary=__doc__))
