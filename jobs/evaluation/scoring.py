"""Score a model: every set is transcribed by the graft and its baseline, then error rates, counts and predictions are written."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graft.data.nonspeech import SOUNDS
from graft.errors import DataError, RecipeError
from graft.text.wer import score

from ..common.cluster import connect
from ..common.outputs import staged_output
from .asr_pool import AsrModelSpec, transcribe_rows, whisper_folder
from .recipe import EvaluateRecipe
from .test_sets import SWAPPED, Item, as_rows, joined, joined_name, labelled, sounds, swapped

REPORT_FILE = "report.json"
PREDICTIONS_FILE = "predictions.jsonl"
MADE = "made"
"""Folder of the corpora that are made, while they are heard."""


@dataclass(frozen=True)
class ModelTranscripts:
    """What a model made of the items: texts or, in their place, errors; and seconds of audio per second."""

    texts: dict[Item, str]
    errors: dict[Item, str]
    rtfx: float


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Score recipe.model; returns what stands in report.json.

    Raises DataError for rows without text and for names of sets, RecipeError, MissingExtra, and ModelError, also for an instruction that
    the model was not trained for.
    """
    _check_sets(recipe)
    score(["a"], ["a"])  # a missing extra is told now, not after the listening
    baseline = _checked_models(recipe)
    with staged_output(recipe.out, recipe) as out:
        items = _items(recipe, out / MADE)
        connect()
        models = _hear_models(items, baseline, recipe)
        report = _report(models, items, recipe)
        (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        with (out / PREDICTIONS_FILE).open("w") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(models, items))
        shutil.rmtree(out / MADE)
    print(table(report), flush=True)
    return report


def _check_sets(recipe: EvaluateRecipe) -> None:
    for key, name in [("audio_check", recipe.audio_check), *(("expected", name) for name in recipe.expected)]:
        if name and name not in recipe.data:
            raise DataError(f"{key}={name} is no set of data ({', '.join(recipe.data)}): give one of them")
    if recipe.audio_check and recipe.recordings_s:
        raise RecipeError(
            f"recordings_s would join the clips of audio_check={recipe.audio_check} too: leave one out, or run twice"
        )
    recordings = map(joined_name, recipe.data if recipe.recordings_s else [])
    for name in (SWAPPED, *recordings, *(SOUNDS if recipe.sounds else [])):
        if name in recipe.data:
            raise DataError(f"data.{name}: that name is taken by a set which is made here: give the set another one")


def _checked_models(recipe: EvaluateRecipe) -> str | None:
    """The baseline's checkpoint. Raises ModelError when it or the model is of another kind, before a cluster starts for them."""
    from graft.checkpoints.loading import check_graft, open_processor

    check_graft(recipe.model)
    if recipe.instructions:
        processor = open_processor(recipe.model)
        for instruction in recipe.instructions:
            processor.instruction(instruction, None)
    return whisper_folder(recipe.baseline) if recipe.baseline else None


def _items(recipe: EvaluateRecipe, folder: Path) -> list[Item]:
    """All that is heard, one set after the other; what has to be made for it goes into the folder."""
    folder.mkdir()
    items = []
    for name, sources in recipe.data.items():
        mine = labelled(name, sources, limit=recipe.limit)
        items += mine
        if name == recipe.audio_check:
            items += swapped(mine)
        if recipe.recordings_s:
            items += joined(mine, recipe.recordings_s, folder)
    return items + (sounds(recipe.seed, folder) if recipe.sounds else [])


def _hear_models(items: Sequence[Item], baseline: str | None, recipe: EvaluateRecipe) -> dict[str, ModelTranscripts]:
    """What each model hears; swapped audio is for the graft alone."""
    as_they_are = [item for item in items if item.set_name != SWAPPED]
    graft = AsrModelSpec("graft", recipe.model, recipe.dtype, recipe.gpu, recipe.threads_per_worker, recipe.workers)
    models = {"graft": _hear_all(graft, items, recipe.batch_clips)}
    for instruction in recipe.instructions:
        models[f"graft {instruction}"] = _hear_all(
            replace(graft, instruction=instruction), as_they_are, recipe.batch_clips
        )
    if baseline:
        models["whisper"] = _hear_all(replace(graft, kind="whisper", path=baseline), as_they_are, recipe.batch_clips)
    return models


def _hear_all(listener: AsrModelSpec, items: Sequence[Item], batch_clips: int) -> ModelTranscripts:
    """Transcribe items, clips of like length together."""
    order = np.argsort([item.duration_s for item in items], kind="stable")
    batches = [order[start : start + batch_clips] for start in range(0, len(order), batch_clips)]
    texts: dict[Item, str] = {}
    errors: dict[Item, str] = {}
    times: list[float] = []
    for heard in transcribe_rows(listener, as_rows(items), batches):
        times += heard.times
        for index, clip in zip(batches[heard.number], heard.clips, strict=True):
            (errors if clip.error else texts)[items[index]] = clip.error or clip.text
    return ModelTranscripts(texts, errors, sum(item.duration_s for item in texts) / (max(times) - min(times)))


def _report(models: Mapping[str, ModelTranscripts], items: Sequence[Item], recipe: EvaluateRecipe) -> dict[str, Any]:
    sets: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(item.set_name for item in items):
        for kind, heard in models.items():
            if scored := [item for item in items if item.set_name == name and item in heard.texts]:
                sets.setdefault(name, {})[kind] = _scores(
                    scored, [heard.texts[item] for item in scored], seed=recipe.seed
                )
    errors = {item.audio_id: error for item, error in models["graft"].errors.items()}
    rtfx = {kind: heard.rtfx for kind, heard in models.items()}
    return {"model": recipe.model, "sets": sets, "expected": _verdicts(sets, recipe), "rtfx": rtfx, "errors": errors}


def _scores(items: Sequence[Item], texts: Sequence[str], *, seed: int) -> dict[str, float]:
    """The error rates of a set's texts or, where nobody speaks, how much was written."""
    if any(item.text for item in items):
        return score([item.text for item in items], texts, seed=seed).to_dict()
    minutes = sum(item.duration_s for item in items) / 60
    written = [len(text) for text in texts]
    return {
        "clips": len(items),
        "minutes": minutes,
        "chars_per_minute": sum(written) / minutes,
        "share_with_text": float(np.mean(np.array(written) > 0)),
    }


def _verdicts(sets: Mapping[str, Any], recipe: EvaluateRecipe) -> list[dict[str, Any]]:
    """Compare the graft's rates with what is expected of them."""
    verdicts = []
    for name, rates in recipe.expected.items():
        for rate, (low, high) in rates.items():
            found = sets.get(name, {}).get("graft", {}).get(rate)  # None where no clip could be read
            agrees = found is not None and low <= found <= high
            verdicts.append({"set": name, "rate": rate, "found": found, "low": low, "high": high, "agrees": agrees})
    return verdicts


def _predictions(models: Mapping[str, ModelTranscripts], items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {"set": item.set_name, "id": item.id, "audio_id": item.audio_id, "text": item.text}
        | {kind: heard.texts.get(item) for kind, heard in models.items()}
        for item in items
    ]


def table(report: Mapping[str, Any]) -> str:
    """Lay a report out: WER with its 95 % interval and CER after Whisper's normaliser, WER of the raw strings; below, what silence made."""
    rows = [(name, kind, scores) for name, kinds in report["sets"].items() for kind, scores in kinds.items()]
    names, kinds = (max([least, *(len(row[column]) for row in rows)]) for column, least in ((0, 12), (1, 8)))
    headings = f"{'clips':>5} {'words':>6}  {'WER':>6}  {'95 % interval':<16} {'CER':>6}  {'raw WER':>7}"
    lines = [f"{'set':<{names}} {'model':<{kinds}} {headings}"]
    for name, kind, s in rows:
        if "wer" in s:
            interval = f"[{s['wer_low']:.1%}, {s['wer_high']:.1%}]"
            rates = f"{s['wer']:>6.1%}  {interval:<16} {s['cer']:>6.1%}  {s['wer_raw']:>7.1%}"
            lines.append(f"{name:<{names}} {kind:<{kinds}} {s['clips']:>5} {s['words']:>6}  {rates}")
    if silent := [row for row in rows if "chars_per_minute" in row[2]]:
        lines.append(
            f"{'no speech':<{names}} {'model':<{kinds}} {'clips':>5} {'min':>6}  {'chars/min':>9}  {'with text':>9}"
        )
        for name, kind, s in silent:
            counts = (
                f"{s['clips']:>5} {s['minutes']:>6.1f}  {s['chars_per_minute']:>9.1f}  {s['share_with_text']:>9.1%}"
            )
            lines.append(f"{name:<{names}} {kind:<{kinds}} {counts}")
    for v in report["expected"]:
        verdict = "agrees with" if v["agrees"] else "does not agree with"
        found = "of no clip" if v["found"] is None else f"{v['found']:.2%}"
        lines.append(f"{v['set']}: {v['rate']} {found} {verdict} the expected {v['low']:.2%} to {v['high']:.2%}")
    if errors := report["errors"]:
        lines.append(f"{len(errors)} clips could not be read and are not scored: {', '.join(list(errors)[:3])}")
    lines.append(
        "seconds of audio per second: " + ", ".join(f"{kind} {rtfx:.1f}" for kind, rtfx in report["rtfx"].items())
    )
    return "\n".join(lines)
