"""Write the splits of a corpus: manifests -> rows -> checks of their audio -> splits -> parquet, on Ray for many."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.data.splits import Candidate, assign_splits, seeded_hash
from graft.errors import DataError
from graft.text.characters import display_columns

from ..common.console import ProgressLine
from ..transcription.tasks import RayTasks, Tasks, TasksHere, asks_for_ray
from .clip_tasks import ReadingProgress, check_batch, read_all_clips
from .clips import ClipChecker, ClipLimits
from .concatenation import JoinedRow, join_splits
from .manifests import DroppedLine, Row, read_manifests
from .parts import Part, write_part, write_parts
from .recipe import Manifest, PrepareRecipe

MOST_CLIPS_HERE = 2000
"""Clips up to which starting Ray would take longer than it saves."""
COPIES_FOLDER = ".clips"
"""Folder in the unfinished output for copies of clips that are no local files of their own."""


def write_splits(recipe: PrepareRecipe, folder: Path, sources: Sequence[Manifest]) -> dict[str, Any]:
    """Write the splits of sources, dropped.jsonl and summary.json into a folder; returns the summary.

    Raises DataError where no row remains, OutputError.
    """
    # A line that cannot be parsed is read once for each source of its manifest, and listed once.
    dropped: dict[DroppedLine, None] = {}
    rows = _keep_rows((_check_line(row, recipe) for row in read_manifests(sources)), dropped)
    workers = _Workers.choose(recipe, len(rows))
    rows = _keep_rows(_read_clips(rows, recipe, folder.absolute(), workers), dropped)
    rows = _keep_rows(_unique_ids(rows, sources), dropped)
    splits = _assign(rows, recipe, dropped)
    joined = join_splits(splits, recipe.joined, seed=recipe.seed) if recipe.joined else {}
    _write_splits(splits, joined, recipe, folder.absolute(), workers)
    summary: dict[str, Any] = {
        "splits": {
            split: {
                "rows": len(members),
                "hours": _hours(members),
                "speakers": len({row.speaker for row in members} - {None}),
            }
            for split, members in splits.items()
        },
        "dropped": _count_reasons(dropped),
    }
    if recipe.joined:
        summary["joined"] = {split: {"rows": len(clips), "hours": _hours(clips)} for split, clips in joined.items()}
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as file:
        for line in sorted(dropped, key=lambda row: (row.source, row.line, row.reason, row.id or "", row.detail)):
            file.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


@dataclass(frozen=True)
class _Workers:
    """Where clips are read and files are written."""

    is_ray: bool
    count: int
    """Tasks at a time."""

    @classmethod
    def choose(cls, recipe: PrepareRecipe, clip_count: int) -> "_Workers":
        """Choose this process for few clips; else join the Ray cluster or start a local Ray."""
        reason = asks_for_ray(recipe.workers)
        if reason is None and clip_count > MOST_CLIPS_HERE and recipe.workers != 1:
            reason = f"these are {clip_count:,} clips"
        if reason is None:
            return cls(False, 1)
        from ..common.cluster import connect
        from ..transcription.machine import cluster_machine

        connect(cpus=None if recipe.workers == "auto" else recipe.workers, trains=False)
        machine = cluster_machine()
        count = sum(machine.node_cpus) if recipe.workers == "auto" else recipe.workers
        print(f"graft: preparing on Ray, because {reason}: workers={count} (of {machine})", flush=True)
        return cls(True, count)

    def tasks(self, function: Callable[..., Any]) -> Tasks:
        """Return what runs a function."""
        return RayTasks(function) if self.is_ray else TasksHere(function)

    def printing(self, line: Callable[[], str]) -> AbstractContextManager[Any]:
        """Print a line of progress while a block lasts, which is short without Ray."""
        return ProgressLine(line) if self.is_ray else nullcontext()


def _keep_rows(results: Iterable[Row | DroppedLine], dropped: dict[DroppedLine, None]) -> list[Row]:
    """Return the rows among the results, and add the dropped lines to `dropped`."""
    rows = []
    for result in results:
        if isinstance(result, DroppedLine):
            dropped[result] = None
        else:
            rows.append(result)
    return rows


def _check_line(row: Row | DroppedLine, recipe: PrepareRecipe) -> Row | DroppedLine:
    """Return the row, or why it is dropped, as far as its manifest tells."""
    if isinstance(row, DroppedLine):
        return row
    length = display_columns(row.text)
    if row.text and length < recipe.min_text_chars:  # a row without text was kept by its source
        return row.dropped("text too short", f"{length} characters, at least {recipe.min_text_chars}")
    if recipe.disjoint_speakers and row.speaker is None:
        return row.dropped("no speaker", "disjoint_speakers wants one")
    if row.length_s is not None and row.length_s > recipe.max_duration_s:
        return row.dropped("too long", f"{row.length_s:.3f} s, at most {recipe.max_duration_s:g} s")
    return row


def _read_clips(rows: list[Row], recipe: PrepareRecipe, folder: Path, workers: _Workers) -> Iterable[Row | DroppedLine]:
    """Read and check the audio of rows, of which the list is emptied."""
    limits = ClipLimits(recipe.min_duration_s, recipe.max_duration_s, recipe.max_chars_per_s)
    (folder / COPIES_FOLDER).mkdir()
    threads = 1 if workers.is_ray else os.cpu_count() or 1
    checker = ClipChecker(limits, folder / COPIES_FOLDER, os.getcwd(), threads)
    progress = ReadingProgress(len(rows))
    with workers.printing(progress.line):
        return read_all_clips(rows, checker, workers.tasks(check_batch), workers.count, progress)


def _write_splits(
    splits: Mapping[str, list[Row]],
    joined: Mapping[str, Sequence[JoinedRow]],
    recipe: PrepareRecipe,
    folder: Path,
    workers: _Workers,
) -> None:
    """Write all rows, and remove the copies of their clips."""
    has_languages = any(row.language for members in splits.values() for row in members)
    counts = [len(members) + len(joined.get(split, ())) for split, members in splits.items()]
    file_count, written = sum(-(-count // recipe.rows_per_file) for count in counts), list[Path]()

    def parts() -> Iterator[Part]:
        for split, members in splits.items():
            # Manifests are sorted by speaker and book; batches should not be.
            rows: list[Row | JoinedRow] = [*members, *joined.get(split, [])]
            rows.sort(key=lambda row: (seeded_hash(recipe.seed, row.id), row.id))
            for number, start in enumerate(range(0, len(rows), recipe.rows_per_file)):
                path = folder / split / f"part-{number:05d}.parquet"
                some = rows[start : start + recipe.rows_per_file]
                yield Part(path, some, recipe.rows_per_group, has_languages, os.getcwd())

    with workers.printing(lambda: f"{len(written)}/{file_count} files written"):
        written.extend(write_parts(parts(), workers.tasks(write_part), workers.count))
    shutil.rmtree(folder / COPIES_FOLDER)


def _unique_ids(rows: Sequence[Row], sources: Sequence[Manifest]) -> Iterator[Row | DroppedLine]:
    """Keep the first row of each id: pinned ones first, then by the recipe's order of sources, then by content."""
    order = {source.place: index for index, source in reversed(list(enumerate(sources)))}
    first: dict[str, Row] = {}
    others: dict[str, list[Row]] = {}
    for row in rows:
        if first.setdefault(row.id, row) is not row:
            others.setdefault(row.id, []).append(row)
    for name, kept in first.items():
        same = [kept, *others[name]] if name in others else [kept]
        if len(same) > 1:
            same.sort(
                key=lambda row: (
                    row.pinned is None,
                    order[row.source],
                    row.audio.sort_key,
                    row.offset_s,
                    row.text,
                    row.line,
                )
            )
        yield same[0]
        for row in same[1:]:
            yield row.dropped("duplicate id", f"kept: {same[0].source} line {same[0].line}")


def _assign(rows: Sequence[Row], recipe: PrepareRecipe, dropped: dict[DroppedLine, None]) -> dict[str, list[Row]]:
    """Put rows with distinct ids into splits; adds those in conflict to `dropped`. Raises DataError for an empty
    split."""
    candidates = [
        Candidate(row.text, row.speaker if recipe.disjoint_speakers else None, row.pinned, row.id) for row in rows
    ]
    splits: dict[str, list[Row]] = {}
    for row, placement in zip(rows, assign_splits(candidates, recipe.splits, seed=recipe.seed), strict=True):
        if placement.conflict:
            dropped[row.dropped(placement.conflict, f"would have gone to {placement.split}")] = None
        else:
            splits.setdefault(placement.split, []).append(row)
    if not splits:
        reasons = ", ".join(f"{reason} {count}" for reason, count in _count_reasons(dropped).items())
        raise DataError(f"all rows were dropped ({reasons}): correct the sources")
    if any(source.split is None for source in recipe.long_sources()):
        for name, share in recipe.splits.items():
            if share > 0 and name not in splits:
                count = sum(map(len, splits.values()))
                raise DataError(f"split {name} got none of {count} rows for its share {share:g}: change seed or splits")
    return dict(sorted(splits.items()))


def _hours(rows: Sequence[Row | JoinedRow]) -> float:
    return round(sum(sorted(row.duration_s for row in rows)) / 3600, 4)  # sorted: the sum of floats depends on order


def _count_reasons(dropped: Iterable[DroppedLine]) -> dict[str, int]:
    return dict(sorted(Counter(row.reason for row in dropped).items()))
