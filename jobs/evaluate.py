"""Score a model on labelled clips: WER and CER with intervals, plain Whisper beside it, and once with the clips' audio swapped.

Writes report.json and, one clip a line, predictions.jsonl.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from graft.config import Recipe
from graft.corpus import CorpusFile, RowTable, Sources, read_rows
from graft.errors import DataError
from graft.scoring import score
from jobs.cli import run_job
from jobs.cluster import connect
from jobs.hearing import Listener, hear, whisper_folder
from jobs.outputs import staged_output

REPORT_FILE = "report.json"
PREDICTIONS_FILE = "predictions.jsonl"
SWAPPED = "swapped"


class EvaluateRecipe(Recipe):
    """What to score, on what."""

    model: str
    """A graft, or the output folder of a stage."""
    data: dict[str, Sources]
    """Name of a test set -> its parquet files, folder or glob, or {files, columns}."""
    out: str
    """Folder for the report."""
    baseline: str | None = "bundled"
    """A Whisper checkpoint to score beside the model; `bundled` is Whisper base, null none."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first clips of each set."""
    audio_check: str | None = None
    """A set that is also scored with every clip's audio swapped for another's: a model that listens fails."""
    batch_clips: int = Field(default=16, ge=1)
    workers: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    dtype: Literal["fp32", "bf16"] = "fp32"
    gpu: bool = False
    seed: int = 0
    """Of the bootstrap."""
    expected: dict[str, dict[Literal["wer", "cer", "wer_raw", "cer_raw"], tuple[float, float]]] = Field(default={})
    """Set -> rate -> the least and the greatest value that agree with a published figure; else the job ends with exit code 1."""


@dataclass(frozen=True)
class Item:
    """One clip to transcribe: the row whose text is the reference, and the row whose audio is heard."""

    set_name: str
    id: str
    text: str
    audio_id: str
    file: CorpusFile
    row_group: int
    row: int
    duration_s: float


@dataclass(frozen=True)
class Heard:
    """What a model made of the items: texts or, in their place, errors; and seconds of audio per second."""

    texts: dict[Item, str]
    errors: dict[Item, str]
    rtfx: float


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Score recipe.model; returns what stands in report.json. Raises DataError for rows without text, ModelError, MissingExtra."""
    for key, name in [("audio_check", recipe.audio_check), *(("expected", name) for name in recipe.expected)]:
        if name and name not in recipe.data:
            raise DataError(f"{key}={name} is no set of data ({', '.join(recipe.data)}): give one of them")
    score(["a"], ["a"])  # a missing extra is told now, not after the listening
    baseline = _checked_models(recipe)
    with staged_output(recipe.out, recipe) as out:
        items = [item for name in recipe.data for item in _items(name, recipe)]
        connect()
        models = {"graft": _hear_all("graft", recipe.model, items, recipe)}
        if baseline:
            plain = [item for item in items if item.set_name != SWAPPED]
            models["whisper"] = _hear_all("whisper", baseline, plain, recipe)
        report = _report(models, items, recipe)
        (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        with (out / PREDICTIONS_FILE).open("w") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(models, items))
    print(table(report), flush=True)
    return report


def _items(name: str, recipe: EvaluateRecipe) -> list[Item]:
    """The clips of a set and, where it is the audio check's, the same texts with the audio of the next clip."""
    if name == SWAPPED:
        raise DataError(f"data.{SWAPPED}: that name is taken by the audio check: give the set another one")
    rows = read_rows(recipe.data[name])
    count = min(len(rows), recipe.limit or len(rows))
    if empty := [rows.id(row) for row in range(count) if not rows.text(row).strip()]:
        raise DataError(f"{len(empty)} rows of data.{name} have no text, {empty[0]} first: drop them with python -m jobs.prepare")

    def item(set_name: str, row: int, heard: int) -> Item:
        place = (rows.files[rows.file[heard]], int(rows.row_group[heard]), int(rows.row[heard]))
        return Item(set_name, rows.id(row), rows.text(row), rows.id(heard), *place, float(np.nan_to_num(rows.duration_s[heard])))

    swapped = [item(SWAPPED, row, (row + 1) % count) for row in range(count)] if name == recipe.audio_check else []
    return [item(name, row, row) for row in range(count)] + swapped


def _hear_all(kind: Literal["graft", "whisper"], path: str, items: Sequence[Item], recipe: EvaluateRecipe) -> Heard:
    """Transcribe items, clips of like length together."""
    order = np.argsort([item.duration_s for item in items], kind="stable")
    batches = [order[start : start + recipe.batch_clips] for start in range(0, len(order), recipe.batch_clips)]
    listener = Listener(kind, path, recipe.dtype, recipe.gpu, recipe.threads_per_worker, recipe.workers)
    texts: dict[Item, str] = {}
    errors: dict[Item, str] = {}
    times: list[float] = []
    for heard in hear(listener, _as_rows(items), batches):
        times += heard.times
        for index, (text, error) in zip(batches[heard.number], heard.texts, strict=True):
            (errors if error else texts)[items[index]] = error or text
    return Heard(texts, errors, sum(item.duration_s for item in texts) / (max(times) - min(times)))


def _as_rows(items: Sequence[Item]) -> RowTable:
    files = {file: index for index, file in enumerate(dict.fromkeys(item.file for item in items))}
    return RowTable(
        ids=pa.array([item.audio_id for item in items], pa.large_string()),
        texts=pa.array([item.text for item in items], pa.large_string()),
        duration_s=np.array([item.duration_s for item in items]),
        source=np.zeros(len(items), np.int16),
        file=np.array([files[item.file] for item in items], np.int32),
        row_group=np.array([item.row_group for item in items], np.int32),
        row=np.array([item.row for item in items], np.int32),
        files=list(files),
        weights=[1.0],
    )


def _checked_models(recipe: EvaluateRecipe) -> str | None:
    """The baseline's checkpoint. Raises ModelError when it or the model is of another kind, before a cluster starts for them."""
    from graft.model.opening import check_graft

    check_graft(recipe.model)
    return whisper_folder(recipe.baseline) if recipe.baseline else None


def _report(models: Mapping[str, Heard], items: Sequence[Item], recipe: EvaluateRecipe) -> dict[str, Any]:
    sets: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(item.set_name for item in items):
        for kind, heard in models.items():
            if scored := [item for item in items if item.set_name == name and item in heard.texts]:
                result = score([item.text for item in scored], [heard.texts[item] for item in scored], seed=recipe.seed)
                sets.setdefault(name, {})[kind] = result.to_dict()
    errors = {item.audio_id: error for item, error in models["graft"].errors.items()}
    rtfx = {kind: heard.rtfx for kind, heard in models.items()}
    return {"model": recipe.model, "sets": sets, "expected": _verdicts(sets, recipe), "rtfx": rtfx, "errors": errors}


def _verdicts(sets: Mapping[str, Any], recipe: EvaluateRecipe) -> list[dict[str, Any]]:
    """Compare the graft's rates with what is expected of them."""
    verdicts = []
    for name, rates in recipe.expected.items():
        for rate, (low, high) in rates.items():
            found = sets.get(name, {}).get("graft", {}).get(rate)  # None where no clip could be read
            agrees = found is not None and low <= found <= high
            verdicts.append({"set": name, "rate": rate, "found": found, "low": low, "high": high, "agrees": agrees})
    return verdicts


def _predictions(models: Mapping[str, Heard], items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {"set": item.set_name, "id": item.id, "audio_id": item.audio_id, "text": item.text}
        | {kind: heard.texts.get(item) for kind, heard in models.items()}
        for item in items
    ]


def table(report: Mapping[str, Any]) -> str:
    """Lay a report out as a table: WER with its 95 % interval and CER after Whisper's normaliser, and WER of the raw strings."""
    lines = [f"{'set':<12} {'model':<8} {'clips':>5} {'words':>6}  {'WER':>6}  {'95 % interval':<16} {'CER':>6}  {'raw WER':>7}"]
    for name, scores in report["sets"].items():
        for kind, s in scores.items():
            interval = f"[{s['wer_low']:.1%}, {s['wer_high']:.1%}]"
            rates = f"{s['wer']:>6.1%}  {interval:<16} {s['cer']:>6.1%}  {s['wer_raw']:>7.1%}"
            lines.append(f"{name:<12} {kind:<8} {s['clips']:>5} {s['words']:>6}  {rates}")
    for v in report["expected"]:
        verdict = "agrees with" if v["agrees"] else "does not agree with"
        found = "of no clip" if v["found"] is None else f"{v['found']:.2%}"
        lines.append(f"{v['set']}: {v['rate']} {found} {verdict} the expected {v['low']:.2%} to {v['high']:.2%}")
    if errors := report["errors"]:
        lines.append(f"{len(errors)} clips could not be read and are not scored: {', '.join(list(errors)[:3])}")
    lines.append("seconds of audio per second: " + ", ".join(f"{kind} {rtfx:.1f}" for kind, rtfx in report["rtfx"].items()))
    return "\n".join(lines)


def main(recipe: EvaluateRecipe) -> int:
    return 0 if all(verdict["agrees"] for verdict in run(recipe)["expected"]) else 1


if __name__ == "__main__":
    sys.exit(run_job(EvaluateRecipe, main, summary="Score a model on labelled clips, beside plain Whisper."))
