"""Score a model on labelled clips: WER and CER with intervals, plain Whisper beside it, and once with the clips' audio swapped.

Writes report.json and, one clip a line, predictions.jsonl.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from graft.audio import AudioClip, read_audio
from graft.config import Recipe
from graft.corpus import RowReader, read_rows
from graft.errors import AudioError, DataError, GraftError, ModelError
from graft.scoring import score
from jobs.cli import run_job
from jobs.cluster import connect
from jobs.outputs import staged_output

REPORT_FILE = "report.json"
PREDICTIONS_FILE = "predictions.jsonl"
SWAPPED = "swapped"


class EvaluateRecipe(Recipe):
    """What to score, on what."""

    model: str
    """A graft, or the output folder of a stage."""
    data: dict[str, str]
    """Name of a test set -> its parquet files, folder or glob."""
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


@dataclass(frozen=True)
class Item:
    """One clip to transcribe: the row whose text is the reference, and the row whose audio is heard."""

    set_name: str
    id: str
    text: str
    audio_id: str
    uri: str
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
    if recipe.audio_check and recipe.audio_check not in recipe.data:
        raise DataError(f"audio_check={recipe.audio_check} is no set of data ({', '.join(recipe.data)}): give one of them")
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
    if empty := [rows.ids[row] for row in range(count) if not rows.texts[row].strip()]:
        raise DataError(f"{len(empty)} rows of {recipe.data[name]} have no text, {empty[0]} first: drop them with python -m jobs.prepare")

    def item(set_name: str, row: int, heard: int) -> Item:
        place = (rows.uris[rows.file[heard]], int(rows.row_group[heard]), int(rows.row[heard]))
        return Item(set_name, rows.ids[row], rows.texts[row], rows.ids[heard], *place, float(rows.duration_s[heard]))

    swapped = [item(SWAPPED, row, (row + 1) % count) for row in range(count)] if name == recipe.audio_check else []
    return [item(name, row, row) for row in range(count)] + swapped


def _hear_all(kind: str, path: str, items: Sequence[Item], recipe: EvaluateRecipe) -> Heard:
    """Transcribe items through Ray Data, clips of like length together."""
    import ray

    by_length = sorted(items, key=lambda item: item.duration_s)
    batches = [by_length[start : start + recipe.batch_clips] for start in range(0, len(by_length), recipe.batch_clips)]
    blocks = ray.data.range(len(batches), override_num_blocks=len(batches)).map_batches(
        _Hearer,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(recipe.workers, len(batches))),
        num_cpus=1,
        num_gpus=1 if recipe.gpu else 0,
        fn_constructor_args=(kind, os.path.abspath(path) if os.path.exists(path) else path, ray.put(batches), recipe.model_dump()),
    )
    texts: dict[Item, str] = {}
    errors: dict[Item, str] = {}
    times: list[float] = []
    for block in blocks.iter_batches(batch_size=None, batch_format="numpy"):
        for number, heard in zip(block["id"], block["heard"], strict=True):
            answer = json.loads(str(heard))
            if answer["fault"]:
                raise ModelError(answer["fault"])
            times += answer["times"]
            for item, (text, error) in zip(batches[int(number)], answer["texts"], strict=True):
                (texts if error is None else errors)[item] = text if error is None else error
    return Heard(texts, errors, sum(item.duration_s for item in texts) / (max(times) - min(times)))


class _Hearer:
    """A Ray Data actor: batch numbers -> texts of their clips, by a graft or by plain Whisper.

    A model that can't be opened is a value too, `fault`: raised in here, Ray would print it with three tracebacks.
    """

    def __init__(self, kind: str, path: str, batches: Any, recipe: dict[str, Any]) -> None:
        import ray
        import torch

        torch.set_num_threads(recipe["threads_per_worker"])
        self.batches = ray.get(batches)
        self.fault = ""
        try:
            self.transcribe = _load(kind, path, device="cuda" if recipe["gpu"] else "cpu", dtype=recipe["dtype"])
        except GraftError as error:
            self.fault = str(error)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": block["id"], "heard": np.array([json.dumps(self._hear(self.batches[int(number)])) for number in block["id"]])}

    def _hear(self, items: Sequence[Item]) -> dict[str, Any]:
        if self.fault:
            return {"fault": self.fault}
        start = time.time()
        clips = [_read(item) for item in items]
        texts = iter(self.transcribe([clip for clip in clips if isinstance(clip, AudioClip)]))
        answers = [(next(texts), None) if isinstance(clip, AudioClip) else (None, str(clip)) for clip in clips]
        return {"fault": "", "texts": answers, "times": [start, time.time()]}


def _read(item: Item) -> AudioClip | AudioError | DataError:
    try:
        wav, path = RowReader([item.uri]).wav(0, item.row_group, item.row)
        return read_audio(wav, name=path or item.audio_id)
    except (AudioError, DataError) as error:
        return error


def _load(kind: str, path: str, *, device: str, dtype: str) -> Callable[[Sequence[AudioClip]], list[str]]:
    from graft.engines.whisper import WhisperBaseline
    from graft.model.opening import DTYPES
    from graft.transcriber import load

    if kind == "whisper":
        return WhisperBaseline(path, device=device, dtype=DTYPES[dtype]).transcribe_many
    transcriber = load(path, device=device, dtype=dtype)

    def transcribe(clips: Sequence[AudioClip]) -> list[str]:
        texts = []
        for transcript in transcriber.transcribe_many(clips):
            if isinstance(transcript, AudioError):
                raise transcript  # left out, it would shift every later clip's text to its neighbour
            texts.append(transcript.text)
        return texts

    return transcribe


def _checked_models(recipe: EvaluateRecipe) -> str | None:
    """The baseline's checkpoint. Raises ModelError when it or the model is of another kind, before a cluster starts for them."""
    from graft.model.build import check_kind
    from graft.model.bundled import bundled_whisper
    from graft.model.opening import check_graft

    check_graft(recipe.model)
    baseline = str(bundled_whisper()) if recipe.baseline == "bundled" else recipe.baseline
    if baseline:
        check_kind(baseline, "whisper")
    return baseline


def _report(models: Mapping[str, Heard], items: Sequence[Item], recipe: EvaluateRecipe) -> dict[str, Any]:
    sets: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(item.set_name for item in items):
        for kind, heard in models.items():
            if scored := [item for item in items if item.set_name == name and item in heard.texts]:
                result = score([item.text for item in scored], [heard.texts[item] for item in scored], seed=recipe.seed)
                sets.setdefault(name, {})[kind] = result.to_dict()
    errors = {item.audio_id: error for item, error in models["graft"].errors.items()}
    return {"model": recipe.model, "sets": sets, "rtfx": {kind: heard.rtfx for kind, heard in models.items()}, "errors": errors}


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
    if errors := report["errors"]:
        lines.append(f"{len(errors)} clips could not be read and are not scored: {', '.join(list(errors)[:3])}")
    lines.append("seconds of audio per second: " + ", ".join(f"{kind} {rtfx:.1f}" for kind, rtfx in report["rtfx"].items()))
    return "\n".join(lines)


def main(recipe: EvaluateRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(EvaluateRecipe, main, summary="Score a model on labelled clips, beside plain Whisper."))
