"""Transcribe test sets with several systems, and write each answer as soon as it is there: predictions.jsonl.

systems and their items -> the bulk pipeline of each -> its results in work/ -> a line for each clip, as it comes
                        -> the same lines in the order of the sets

A run that was killed goes on: what has a line is not transcribed again, and results that have none yet get theirs.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from graft.storage.atomic import atomic_file

from ..transcription import ClipTranscript
from ..transcription.assembly import ItemResults, NewResults, open_results, recordings_in
from ..transcription.pipeline import Pipeline, clip_transcript, languages_for_model, plan_rows, run_plan
from .predictions import Prediction, read_predictions, write_predictions
from .test_sets import Item, as_rows

PREDICTIONS_FILE = "predictions.jsonl"
CHECKS_FILE = "checks.jsonl"
"""Answers that check the evaluation and are not scored, as those to swapped audio."""
LOOK_S, RESTS_PER_LOOK = 2.0, 20
"""Seconds between two looks for new results, and how many times as long as a look the pause after it is at least."""
CLIPS_AT_ONCE = 500
"""Most clips whose lines are made together."""

Key = tuple[str, str | None, str]
"""A system, a set, and a clip's id in it."""


@dataclass(frozen=True)
class System:
    """A system that is scored: its name in the predictions, and the pipeline in which it transcribes."""

    name: str
    pipeline: Pipeline
    items: Sequence[Item]
    """What it transcribes, of which some may share their audio."""
    checkpoint: str | None = None
    """Graft or Whisper whose prompt may name languages; None where it takes any."""


def predict(systems: Sequence[System], out: Path, work: Path) -> tuple[list[Prediction], list[Prediction]]:
    """Transcribe each system's items; returns what is scored, and what checks the evaluation.

    The one is in out/predictions.jsonl then, the other in out/checks.jsonl, both in the order of the items. Each clip
    has its share of the time in which its system was at work. Raises as run_plan.
    """
    scored, checks = (PredictionFile(out / name) for name in (PREDICTIONS_FILE, CHECKS_FILE))
    for number, system in enumerate(systems):
        _predict_with(system, work / f"system-{number}", scored, checks)
    timed: dict[Key, Prediction] = {}
    for system in systems:
        timed |= _with_seconds(scored.predictions | checks.predictions, system.name)
    items = dict.fromkeys(item for system in systems for item in system.items)
    chosen = {_key(system.name, item) for system in systems for item in system.items}
    for file, are_checks in ((scored, False), (checks, True)):
        keys = (_key(system.name, item) for item in items if item.is_check == are_checks for system in systems)
        file.rewrite([timed[key] for key in keys if key in chosen])
    return list(scored.predictions.values()), list(checks.predictions.values())


def _predict_with(system: System, home: Path, scored: "PredictionFile", checks: "PredictionFile") -> None:
    """Transcribe the items that have no line of the system yet; `home` holds the results of earlier runs."""
    # Items of swapped audio share the clips of others, which come first and have the language of the audio.
    owners: dict[Any, Item] = {}
    left: dict[Any, list[Item]] = {}
    for item in system.items:
        owners.setdefault(item.clip, item)
        if _key(system.name, item) not in (checks if item.is_check else scored).predictions:
            left.setdefault(item.clip, []).append(item)
    if not left:
        return
    print(f"evaluate: {system.name}", flush=True)
    rows = as_rows([owners[clip] for clip in left])
    plan = plan_rows(languages_for_model(rows, system.checkpoint) if system.checkpoint else rows)
    sharing = list(left.values())  # the items of each clip

    def write(clips: Iterable[tuple[int, ClipTranscript]]) -> None:
        made = [(item, _prediction(system.name, item, clip)) for number, clip in clips for item in sharing[number]]
        for file, are_checks in ((scored, False), (checks, True)):
            file.append(one for item, one in made if item.is_check == are_checks)

    home.mkdir(exist_ok=True)
    done = open_results(home)
    with ClipFollower(plan, done, home, write):
        run_plan(plan, done, home, system.pipeline)


class ClipFollower:
    """Shows the transcript of each clip as soon as all of its items have results, while a block lasts.

    `plan` has the items of the clips, and `done` is the index of what `home` held of them before. `show` gets the
    numbers of clips with their transcripts, in a thread. What fails there is raised at the end of the block.
    """

    def __init__(
        self, plan: pa.Table, done: pa.Table, home: Path, show: Callable[[Iterable[tuple[int, ClipTranscript]]], None]
    ) -> None:
        self._plan, self._home, self._show = plan, home, show
        self._found = ItemResults(plan)
        self._found.add(done)
        self._results = NewResults(home, seen=done["file"].unique().to_pylist())
        self._is_shown = np.zeros(len(self._found.starts), bool)  # each clip
        self._fault: BaseException | None = None
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="graft-predictions", daemon=True)

    def __enter__(self) -> "ClipFollower":
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._is_ending.set()
        self._thread.join()
        if error is None and self._fault:
            raise self._fault

    def _run(self) -> None:
        try:
            is_last, pause_s = False, 0.0
            while not is_last:
                is_last = self._is_ending.wait(pause_s)
                start = time.monotonic()
                self._found.add(self._results.read())
                self._show_new()
                pause_s = max(LOOK_S, RESTS_PER_LOOK * (time.monotonic() - start))
        except BaseException as error:
            self._fault = error

    def _show_new(self) -> None:
        new = np.flatnonzero(self._found.done() & ~self._is_shown)
        for start in range(0, len(new), CLIPS_AT_ONCE):
            clips = new[start : start + CLIPS_AT_ONCE]
            places = self._found.items_of(clips)
            items = self._plan.take(places).combine_chunks().append_column("file", self._found.files_of(places))
            transcripts = map(clip_transcript, recordings_in(items, self._home / "items"))
            self._show(zip(clips.tolist(), transcripts, strict=True))
            self._is_shown[clips] = True


class PredictionFile:
    """predictions.jsonl while it is written, and all that is in it.

    A line that was cut off when a run was killed is removed. Raises DataError for a file of other things.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.predictions: dict[Key, Prediction] = {}
        if path.is_file():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
            for one in read_predictions(whole.decode().split("\n"), path.name):
                self.predictions[str(one.system), one.set_name, one.id] = one

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write predictions to the disk before this returns."""
        new = list(predictions)
        if not new:
            return
        with self.path.open("a", encoding="utf-8") as lines:
            write_predictions(new, lines)
            lines.flush()
            os.fsync(lines.fileno())
        self.predictions |= {(str(one.system), one.set_name, one.id): one for one in new}

    def rewrite(self, predictions: Sequence[Prediction]) -> None:
        """Put predictions in the place of all that are there; none make no file."""
        self.predictions = {(str(one.system), one.set_name, one.id): one for one in predictions}
        if predictions or self.path.is_file():
            with atomic_file(self.path) as temporary, temporary.open("w", encoding="utf-8") as lines:
                write_predictions(predictions, lines)


def _key(system: str, item: Item) -> Key:
    return system, item.set_name, item.id


def _prediction(system: str, item: Item, clip: ClipTranscript) -> Prediction:
    """Return what a system wrote for a clip; one that could not be read has an error."""
    more = {
        "audio_id": item.audio_id if item.audio_id != item.id else None,
        "mean_logprob": clip.mean_logprob,
        "started_at": clip.started_at,
        "transcription_s": clip.transcription_s,
    }
    return Prediction(
        item.id,
        item.set_name,
        system,
        item.text,
        None if clip.error else clip.text,
        item.duration_s,
        item.language,
        item.known.get("speaker"),
        item.known.get("sex"),
        item.known.get("source"),
        flags=clip.flags,
        error=clip.error,
        more={key: value for key, value in more.items() if value is not None},
    )


def _with_seconds(predictions: Mapping[Key, Prediction], system: str) -> dict[Key, Prediction]:
    """Return a system's predictions, each with its share of the time: clips that run at a time divide it equally."""
    own = {key: one for key, one in predictions.items() if key[0] == system}
    # Items that share their audio were transcribed once.
    spans = {key: (one.more.get("started_at"), one.more.get("transcription_s")) for key, one in own.items()}
    distinct = [span for span in dict.fromkeys(spans.values()) if None not in span]
    shares = dict(zip(distinct, divide_time(distinct), strict=True))
    return {key: replace(one, seconds=shares.get(spans[key])) for key, one in own.items()}


def divide_time(spans: Sequence[tuple[Any, Any]]) -> list[float]:
    """Divide the time that spans (start, seconds) cover among them, equally wherever several overlap."""
    if not spans:
        return []
    starts, lengths = np.array(spans, float).T
    times = np.concatenate([starts, starts + lengths])
    order = np.argsort(times, kind="stable")
    running = np.cumsum(np.where(order < len(spans), 1, -1))[:-1]  # between each time and the next
    parts = np.where(running > 0, np.diff(times[order]) / np.maximum(running, 1), 0.0)
    passed = np.empty(len(times))
    passed[order] = np.concatenate([[0.0], np.cumsum(parts)])
    return (passed[len(spans) :] - passed[: len(spans)]).tolist()


def speeds(predictions: Iterable[Prediction]) -> dict[str, float]:
    """Return seconds of audio per second of each system; clips that several sets share count once."""
    audio: dict[str, dict[Any, tuple[float, float]]] = {}
    for one in predictions:
        if one.seconds and one.duration_s:
            audio.setdefault(str(one.system), {})[one.more.get("started_at")] = one.duration_s, one.seconds
    sums = {system: np.sum(list(pairs.values()), axis=0) for system, pairs in audio.items()}
    return {system: float(audio_s / seconds) for system, (audio_s, seconds) in sums.items()}


def of_data(items: Sequence[Item], work: Path) -> list[Item]:
    """Return the items whose audio is the data's own, and not made in the folder `work`."""
    return [item for item in items if not item.clip[0].uri.startswith(f"{work}/")]


def write_clip_index(items: Sequence[Item], path: Path, *, work: Path) -> None:
    """Write where the audio of each clip is: file, row group, row and column; not of what lies in `work`."""
    import pyarrow.parquet as pq

    kept = of_data(items, work)
    places = [item.clip for item in kept]
    columns = {
        "set": pa.array([item.set_name for item in kept], pa.string()),
        "id": pa.array([item.id for item in kept], pa.string()),
        "uri": pa.array([file.uri for file, _, _ in places], pa.string()),
        "audio": pa.array([file.audio for file, _, _ in places], pa.string()),
        "row_group": pa.array([group for _, group, _ in places], pa.int32()),
        "row": pa.array([row for _, _, row in places], pa.int32()),
        "duration_s": pa.array([item.duration_s for item in kept], pa.float64()),
    }
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
