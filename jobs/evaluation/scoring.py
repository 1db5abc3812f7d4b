"""Score models on clips: transcribe each set as jobs.transcribe would, compare with the labels, and report.

test sets -> the bulk pipeline, once for each model and instruction -> error rates -> report.json, predictions.jsonl
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graft.data.nonspeech import SOUNDS
from graft.errors import DataError, RecipeError
from graft.text.wer import score

from ..common.cluster import connect
from ..common.outputs import staged_output
from ..transcription.models import find_whisper, model_opener
from ..transcription.pipeline import Pipeline, Workers
from ..transcription.reader import WINDOWS, Reading
from ..transcription.runs import ClipTranscript, measured_rtfx, transcribe_rows
from .recipe import EvaluateRecipe
from .test_sets import SWAPPED, Item, as_rows, joined, joined_name, labelled, sounds, swapped

REPORT_FILE = "report.json"
PREDICTIONS_FILE = "predictions.jsonl"
WORK_FOLDER = "work"
"""Folder of what is made while the job runs: corpora of sounds and recordings, and the results of each model."""
PIPELINES = {
    "speech": "speech (detected and cut into chunks, as jobs.transcribe does)",
    "windows": "windows (all of each clip, without the speech detector)",
}


Transcripts = Mapping[Item, ClipTranscript]


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Score recipe.model; returns the content of report.json.

    Raises DataError for rows without text and for names of sets, RecipeError, MissingExtra, and ModelError, also for an
    instruction that the model was not trained for.
    """
    _check_sets(recipe)
    score(["a"], ["a"])  # a missing extra is reported now, not after hours
    baseline = _check_models(recipe)
    with staged_output(recipe.out, recipe) as out:
        work = (out / WORK_FOLDER).absolute()
        work.mkdir()
        items = _items(recipe, work)
        models, rtfx = _transcribe_models(items, baseline, recipe, work)
        report = _report(models, rtfx, items, recipe)
        (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        with (out / PREDICTIONS_FILE).open("w") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(models, items))
        shutil.rmtree(work)
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


def _check_models(recipe: EvaluateRecipe) -> str | None:
    """Check the models before a cluster starts for them; returns the baseline's checkpoint. Raises ModelError."""
    from graft.checkpoints.loading import check_graft, open_processor

    check_graft(recipe.model)
    if recipe.instructions:
        processor = open_processor(recipe.model)
        for instruction in recipe.instructions:
            processor.instruction(instruction, None)
    return find_whisper(recipe.baseline) if recipe.baseline else None


def _items(recipe: EvaluateRecipe, folder: Path) -> list[Item]:
    """List all that is scored, set by set; what has to be made for it is written into the folder."""
    items = []
    for name, sources in recipe.data.items():
        own = labelled(name, sources, limit=recipe.limit)
        items += own
        if name == recipe.audio_check:
            items += swapped(own)
        if recipe.recordings_s:
            items += joined(own, recipe.recordings_s, folder)
    return items + (sounds(recipe.seed, folder) if recipe.sounds else [])


def _transcribe_models(
    items: Sequence[Item], baseline: str | None, recipe: EvaluateRecipe, work: Path
) -> tuple[dict[str, Transcripts], dict[str, float]]:
    """Transcribe the items with the graft, again with each instruction, and with the baseline.

    Returns the transcripts of each, and how many seconds of audio it transcribed per second.
    """
    settings: dict[str, Any] = {"threads": recipe.threads_per_worker, "gpu": recipe.gpu, "dtype": recipe.dtype}
    workers = Workers(
        recipe.readers, recipe.workers, recipe.threads_per_worker, int(recipe.gpu), items_per_batch=recipe.batch_clips
    )
    connect(cpus=workers.cpus)
    reading = WINDOWS if recipe.windows else Reading(recipe.speech, recipe.chunks)
    graft = model_opener("graft", recipe.model, **settings)
    pipelines = {"graft": Pipeline(reading, graft, workers)}
    for instruction in recipe.instructions:
        pipelines[f"graft {instruction}"] = Pipeline(reading, graft, workers, {"instruction": instruction})
    if baseline:
        pipelines["whisper"] = Pipeline(reading, model_opener("whisper", baseline, **settings), workers)
    models: dict[str, Transcripts] = {}
    rtfx = {}
    by_clip = {item.clip: item for item in items}  # items of swapped audio share the clips of others
    for number, (kind, pipeline) in enumerate(pipelines.items()):
        print(f"evaluate: {kind}", flush=True)
        home = work / f"model-{number}"
        clips = dict(zip(by_clip, transcribe_rows(as_rows([*by_clip.values()]), home, pipeline), strict=True))
        # The audio check is of the graft alone.
        own = [item for item in items if kind == "graft" or item.set_name != SWAPPED]
        models[kind], rtfx[kind] = {item: clips[item.clip] for item in own}, measured_rtfx(home)
    return models, rtfx


def _report(
    models: Mapping[str, Transcripts], rtfx: Mapping[str, float], items: Sequence[Item], recipe: EvaluateRecipe
) -> dict[str, Any]:
    sets: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(item.set_name for item in items):
        for kind, clips in models.items():
            if scored := [item for item, clip in clips.items() if item.set_name == name and not clip.error]:
                texts = [clips[item].text for item in scored]
                sets.setdefault(name, {})[kind] = _scores(scored, texts, seed=recipe.seed)
    return {
        "model": recipe.model,
        "pipeline": "windows" if recipe.windows else "speech",
        "sets": sets,
        "expected": _verdicts(sets, recipe),
        "rtfx": dict(rtfx),
        "errors": {item.audio_id: clip.error for item, clip in models["graft"].items() if clip.error},
    }


def _scores(items: Sequence[Item], texts: Sequence[str], *, seed: int) -> dict[str, float]:
    """Return the error rates of a set's texts or, where nobody speaks, how much was written."""
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
    """Compare the graft's rates with the expected ones."""
    verdicts = []
    for name, rates in recipe.expected.items():
        for rate, (low, high) in rates.items():
            found = sets.get(name, {}).get("graft", {}).get(rate)  # None where no clip could be read
            agrees = found is not None and low <= found <= high
            verdicts.append({"set": name, "rate": rate, "found": found, "low": low, "high": high, "agrees": agrees})
    return verdicts


def _predictions(models: Mapping[str, Transcripts], items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    for item in items:
        clips = {kind: model.get(item) for kind, model in models.items()}
        texts = {kind: clip.text if clip and not clip.error else None for kind, clip in clips.items()}
        yield {"set": item.set_name, "id": item.id, "audio_id": item.audio_id, "text": item.text} | texts


def table(report: Mapping[str, Any]) -> str:
    """Lay a report out for people.

    A row has the WER with its 95 % interval and the CER after Whisper's normaliser, and the WER of the raw strings.
    Below are the sets without speech, the verdicts on expected rates, unreadable clips, the pipeline and the speed.
    """
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
        headings = f"{'clips':>5} {'min':>6}  {'chars/min':>9}  {'with text':>9}"
        lines.append(f"{'no speech':<{names}} {'model':<{kinds}} {headings}")
        for name, kind, s in silent:
            written = f"{s['chars_per_minute']:>9.1f}  {s['share_with_text']:>9.1%}"
            lines.append(f"{name:<{names}} {kind:<{kinds}} {s['clips']:>5} {s['minutes']:>6.1f}  {written}")
    for v in report["expected"]:
        verdict = "agrees with" if v["agrees"] else "does not agree with"
        found = "of no clip" if v["found"] is None else f"{v['found']:.2%}"
        lines.append(f"{v['set']}: {v['rate']} {found} {verdict} the expected {v['low']:.2%} to {v['high']:.2%}")
    if errors := report["errors"]:
        lines.append(f"{len(errors)} clips could not be read and are not scored: {', '.join(list(errors)[:3])}")
    lines.append(f"pipeline: {PIPELINES[report.get('pipeline', 'windows')]}")  # reports used to be of windows alone
    speeds = ", ".join(f"{kind} {rtfx:.1f}" for kind, rtfx in report["rtfx"].items())
    return "\n".join([*lines, f"seconds of audio per second: {speeds}"])
