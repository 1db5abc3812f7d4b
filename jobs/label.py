"""Transcribe speech that has no labels with Whisper, and keep what it is confident of.

rows without text -> Whisper (jobs.preparation.pseudo_labels) -> kept, or rejected with a reason -> out/texts.parquet

`texts` of a data source names that file. A rejected row has an empty text, so that training leaves it out; its column
`heard` has what Whisper wrote. Rows with a text keep it. A run that was cut off goes on.

Source of the guard against loops, and of mean log-probability as confidence: Radford et al. 2022, section 4.5.
"""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field

from graft.data.splits import comparable_text
from graft.keys import OutputKey
from graft.text.characters import compose, compression_ratio, display_columns

from .common.cli import run_job
from .preparation.pseudo_labels import TextsRecipe, write_texts
from .transcription import ClipTranscript

COLUMNS = {
    "ID": "string",
    "text": "string",
    "heard": "string",
    "mean_logprob": "float32",
    "duration": "float32",  # seconds of audio that were transcribed
    "state": "string",
}
LABELLED, OWN = "labelled", "own"
SILENT, LOOP, RATE, UNSURE, UNHEARD = REASONS = ("silent", "loop", "rate", "unsure", "unheard")
"""Reasons for which a row is rejected: its transcript has no words, repeats itself, has too many or too few characters
for its length, or has a low confidence; or its audio cannot be read."""


class LabelRecipe(TextsRecipe):
    """The clips to label, the Whisper that labels them, and which of its labels are kept."""

    least_confidence: OutputKey[float] = Field(default=-0.25, le=0)
    """A row whose tokens have a smaller mean log-probability is rejected. At -0.25, Whisper base keeps 78 % of 3.7 min
    of LibriSpeech's test-other, with a WER of 8.8 % where all of it has 11.2 %; at -0.15 it keeps 35 % with 5.7 %.
    These figures were measured when the mean included the token that ends a text."""
    most_compression: OutputKey[float] = Field(default=2.4, gt=0)
    """A row whose text zlib makes more times as small, by characters, is rejected: the text repeats itself."""
    least_chars_per_s: OutputKey[float] = Field(default=2, ge=0)
    """A row with fewer characters a second, wide ones (Chinese, Japanese, Korean) counted twice, is rejected: most of
    its speech was not transcribed."""
    most_chars_per_s: OutputKey[float] = Field(default=30, gt=0)
    """A row with more such characters a second is rejected: nobody speaks as fast."""


def run(recipe: LabelRecipe) -> None:
    """Label recipe.data. Raises as write_texts."""
    write_texts(
        recipe,
        "label",
        columns=COLUMNS,
        needs_transcript=lambda text: not text.strip(),
        line=functools.partial(_line, recipe=recipe),
        report=_report,
    )


def _line(text: str, clip: ClipTranscript | None, language: str | None, *, recipe: LabelRecipe) -> dict[str, Any]:
    if clip is None:
        return {"text": text, "state": OWN}
    if clip.error:
        return {"text": "", "state": UNHEARD}
    reason, text = doubt(clip, recipe), compose(clip.text)
    measures = {"heard": text, "mean_logprob": clip.mean_logprob, "duration": clip.duration_s}
    return {"text": "" if reason else text, **measures, "state": reason or LABELLED}


def doubt(clip: ClipTranscript, recipe: LabelRecipe) -> str | None:
    """Return the first of REASONS for which a clip's text is rejected; None where it is kept."""
    if not comparable_text(clip.text):
        return SILENT
    if compression_ratio(clip.text) > recipe.most_compression:
        return LOOP
    if not recipe.least_chars_per_s <= display_columns(clip.text) / clip.duration_s <= recipe.most_chars_per_s:
        return RATE
    return UNSURE if clip.mean_logprob is None or clip.mean_logprob < recipe.least_confidence else None


def _report(texts: Path) -> tuple[dict[str, Any], str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lines = pq.read_table(texts, columns=["duration", "state"])
    states = Counter(lines["state"].to_pylist())
    parts = (lines.filter(pc.equal(lines["state"], LABELLED)), lines)
    hours, hours_heard = (round((pc.sum(part["duration"]).as_py() or 0) / 3600, 4) for part in parts)
    rejected = {reason: states[reason] for reason in REASONS}
    result = {
        "clips": len(lines),
        LABELLED: states[LABELLED],
        OWN: states[OWN],
        "hours": hours,
        "hours_heard": hours_heard,
        "rejected": rejected,
    }
    why = ", ".join(f"{count} {reason}" for reason, count in rejected.items() if count)
    return result, (
        f"of {len(lines)} clips {states[LABELLED]} are labelled, {hours:.2f} of {hours_heard:.2f} h, "
        f"{states[OWN]} had a text, rejected {why or 'none'}"
    )


EXAMPLES = (
    "data=runs/unlabelled/train out=runs/labels",
    "data=runs/unlabelled/train model=openai/whisper-large-v3 gpu=true dtype=bf16 out=runs/labels",
)
"""Arguments that --help shows."""
main = functools.partial(run_job, LabelRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
