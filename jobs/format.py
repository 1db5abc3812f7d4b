"""Give labels the case and punctuation of Whisper's transcripts, without changing their words.

rows -> Whisper (jobs.preparation.pseudo_labels) -> aligned with the labels, whose words are kept -> out/texts.parquet

`texts` of a data source names that file. A row keeps its label where that is formatted already, where its audio cannot
be read, or where label and transcript agree too little. A run that was cut off goes on.
"""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field

from graft.errors import require
from graft.keys import OutputKey
from graft.text.prompts import is_formatted
from graft.text.punctuation import transfer_formatting

from .common.cli import run_job
from .preparation.pseudo_labels import TextsRecipe, write_texts
from .transcription import ClipTranscript

COLUMNS = {"ID": "string", "text": "string", "words": "int32", "agreed": "int32", "state": "string"}
FORMATTED, KEPT, OWN, UNHEARD = STATES = ("formatted", "kept", "own", "unheard")
"""States of a row: its label was formatted; label and transcript agree too little, so that the label is kept; the
label is formatted or empty already; the audio cannot be read."""


class FormatRecipe(TextsRecipe):
    """The clips whose labels are formatted, and the Whisper that transcribes them."""

    least_agreement: OutputKey[float] = Field(default=0.7, ge=0, le=1)
    """A row keeps its label if a smaller share of words is transcribed as it is labelled."""


def run(recipe: FormatRecipe) -> None:
    """Format the labels of recipe.data. Raises as write_texts."""
    require("jiwer", extra="score")
    write_texts(
        recipe,
        "format",
        columns=COLUMNS,
        needs_transcript=lambda text: bool(text.strip()) and not is_formatted(text),
        line=functools.partial(_line, least=recipe.least_agreement),
        report=_report,
    )


def _line(text: str, clip: ClipTranscript | None, language: str | None, *, least: float) -> dict[str, Any]:
    if clip is None or clip.error:
        return {"text": text, "words": 0, "agreed": 0, "state": UNHEARD if clip else OWN}
    formatted = transfer_formatting(text, clip.text, language=language)
    text, state = (text, KEPT) if formatted.agreement < least else (formatted.text, FORMATTED)
    return {"text": text, "words": formatted.words, "agreed": formatted.agreed, "state": state}


def _report(texts: Path) -> tuple[dict[str, Any], str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lines = pq.read_table(texts, columns=["words", "agreed", "state"])
    states = Counter(lines["state"].to_pylist())
    agreement = pc.sum(lines["agreed"]).as_py() / max(1, pc.sum(lines["words"]).as_py())
    result = {"clips": len(lines), **{state: states[state] for state in STATES}, "agreement": agreement}
    return result, (
        f"{agreement:.1%} of the words heard agree; of {len(lines)} clips {states[FORMATTED]} are "
        f"formatted, {states[KEPT]} agree too little and keep their label, {states[OWN]} needed nothing, "
        f"{states[UNHEARD]} could not be read"
    )


EXAMPLES = (
    "data=runs/data/train out=runs/formatted",
    "data=runs/data/train model=openai/whisper-large-v3 gpu=true dtype=bf16 out=runs/formatted",
)
"""Arguments that --help shows."""
main = functools.partial(run_job, FormatRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
