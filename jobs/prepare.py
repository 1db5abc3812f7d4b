"""Turn manifests of speech into parquet files in disjoint, seeded splits.

manifest lines -> rows -> checks of text and audio -> one row an id -> splits (graft.data.splits), on request with longer clips made of theirs
(jobs.preparation.concatenation) -> out/SPLIT/part-00000.parquet ..., out/dropped.jsonl, out/summary.json. Every line that a source takes ends up in a split
or, with its reason, in dropped.jsonl. Same input and seed, same bytes; the order of a manifest's lines changes no split.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from graft.audio.clip import read_audio
from graft.config import Recipe
from graft.data.splits import Candidate, assign_splits, seeded_hash
from graft.errors import AudioError, DataError, require

from .common.cli import run_job
from .common.outputs import holds_results, staged_output
from .preparation.concatenation import JoinedRecipe, JoinedRow, join_splits, joined_columns
from .preparation.manifests import Dropped, Manifest, Row, SplitName, clip_of, header_s, read_manifests


class PrepareRecipe(Recipe):
    """What jobs.prepare does."""

    sources: list[str | Manifest] = Field(min_length=1)
    """Manifests: paths, or {manifest, split} to pin one to a split, {manifest, columns} where its fields have other names, {manifest, only}
    for some of its lines, and {manifest, unlabelled: keep} for those without text too."""
    out: str
    """Folder that the splits are written to."""
    splits: dict[SplitName, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: {"train": 0.95, "dev": 0.05}
    )
    """Shares of the rows that no source pins; they add up to 1."""
    disjoint_speakers: bool = False
    """Keep every speaker within one split; rows without a speaker are dropped."""
    seed: int = 0
    """Draws the splits and the order of rows."""
    min_duration_s: float = Field(default=0.1, ge=0)
    """Shorter clips are dropped."""
    max_duration_s: float = Field(default=30, gt=0)
    """Longer clips are dropped: cutting one would leave its text whole."""
    min_text_chars: int = Field(default=2, ge=1)
    """Rows with a shorter text are dropped, but for unlabelled ones that are kept."""
    max_chars_per_s: float = Field(default=40, gt=0)
    """Rows that would have to be spoken faster are dropped: their text belongs to other audio."""
    joined: JoinedRecipe | None = None
    """Add longer clips, made of clips of one speaker: who hears single sentences alone does not learn to write down 30 s."""
    rows_per_file: int = Field(default=1000, ge=1)
    """Rows of one parquet file."""
    rows_per_group: int = Field(default=100, ge=1)
    """Rows of one row group, the unit of reading."""

    @model_validator(mode="after")
    def _check_splits(self) -> "PrepareRecipe":
        if any(source.split is None for source in self.long_sources()) and abs(sum(self.splits.values()) - 1) > 1e-6:
            raise ValueError(f"splits add up to {sum(self.splits.values()):g}, want 1")
        return self

    @model_validator(mode="after")
    def _check_joined(self) -> "PrepareRecipe":
        if self.joined and self.joined.longest_s > self.max_duration_s:
            raise ValueError(
                f"joined.longest_s is {self.joined.longest_s:g}, over max_duration_s {self.max_duration_s:g}: lower it"
            )
        pinned = [source.split for source in self.long_sources()]
        known = {*filter(None, pinned), *(self.splits if None in pinned else [])}
        if self.joined and (unknown := set(self.joined.splits or []) - known):
            raise ValueError(
                f"joined.splits names {', '.join(sorted(unknown))}, the splits are {', '.join(sorted(known))}"
            )
        return self

    def long_sources(self) -> list[Manifest]:
        """All sources in the long form."""
        return [Manifest(manifest=source) if isinstance(source, str) else source for source in self.sources]


def main(recipe: PrepareRecipe) -> None:
    """Write the splits of the recipe's manifests. Raises DataError when a manifest is missing or no row remains, OutputError."""
    if holds_results(recipe.out, recipe):
        print(f"{recipe.out}: already prepared")
        return
    require("pyarrow", extra="jobs")  # now, not after the decoding
    with staged_output(recipe.out, recipe) as folder:
        dropped: list[Dropped] = []
        rows = list(_keep(read_manifests(recipe.long_sources()), dropped))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            rows = list(_keep(pool.map(lambda row: _checked(row, recipe), rows), dropped))
        rows = list(_keep(_unique_ids(rows, recipe), dropped))
        splits = _split(rows, recipe, dropped)
        joined = join_splits(splits, recipe.joined, seed=recipe.seed) if recipe.joined else {}
        for split, members in splits.items():
            _write_split(folder / split, [*members, *joined.get(split, [])], recipe)
        dropped = list(
            dict.fromkeys(dropped)
        )  # a line that can't be read is so for each source that its manifest serves
        lines = [
            json.dumps(vars(row), ensure_ascii=False) + "\n"
            for row in sorted(dropped, key=lambda row: (row.source, row.line))
        ]
        (folder / "dropped.jsonl").write_text("".join(lines), encoding="utf-8")
        summary = {
            "splits": {split: _measures(members) for split, members in splits.items()},
            "dropped": _reasons(dropped),
        }
        if recipe.joined:
            summary["joined"] = {split: {"rows": len(clips), "hours": _hours(clips)} for split, clips in joined.items()}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_table(recipe.out, summary)


def _keep(results: Iterable[Row | Dropped], dropped: list[Dropped]) -> Iterator[Row]:
    for result in results:
        if isinstance(result, Row):
            yield result
        else:
            dropped.append(result)


def _checked(row: Row, recipe: PrepareRecipe) -> Row | Dropped:
    """The row with its measured duration, or why it is dropped."""
    if row.text and len(row.text) < recipe.min_text_chars:  # those without text were kept by their source
        return _drop(row, "text too short", f"{len(row.text)} characters, at least {recipe.min_text_chars}")
    if recipe.disjoint_speakers and row.speaker is None:
        return _drop(row, "no speaker", "disjoint_speakers wants one")
    try:
        duration_s = header_s(row)
        if duration_s <= recipe.max_duration_s:  # so that hours of audio are not decoded in vain
            duration_s = read_audio(clip_of(row), name=str(row.audio)).duration_s
    except AudioError as error:
        return _drop(row, "unreadable audio", str(error))
    if duration_s > recipe.max_duration_s:
        return _drop(row, "too long", f"{duration_s:.3f} s, at most {recipe.max_duration_s:g} s")
    if duration_s < recipe.min_duration_s:
        return _drop(row, "too short", f"{duration_s:.3f} s, at least {recipe.min_duration_s:g} s")
    if len(row.text) > recipe.max_chars_per_s * duration_s:
        return _drop(
            row,
            "speech rate",
            f"{len(row.text)} characters in {duration_s:.3f} s, at most {recipe.max_chars_per_s:g} per second",
        )
    return replace(row, duration_s=duration_s)


def _drop(row: Row, reason: str, detail: str = "") -> Dropped:
    return Dropped(row.source, row.line, row.id, reason, detail)


def _unique_ids(rows: Iterable[Row], recipe: PrepareRecipe) -> Iterator[Row | Dropped]:
    """The first row of each id: pinned before unpinned, then by the recipe's order of sources, then by content, not by line."""
    order = {source.manifest: index for index, source in reversed(list(enumerate(recipe.long_sources())))}
    first: dict[str, Row] = {}
    for row in sorted(
        rows,
        key=lambda row: (row.pinned is None, order[row.source], row.id, row.audio, row.offset_s, row.text, row.line),
    ):
        kept = first.setdefault(row.id, row)
        yield row if kept is row else _drop(row, "duplicate id", f"kept: {kept.source} line {kept.line}")


def _split(rows: Sequence[Row], recipe: PrepareRecipe, dropped: list[Dropped]) -> dict[str, list[Row]]:
    """Rows with distinct ids -> the rows of each split; appends those in conflict to `dropped`."""
    candidates = [
        Candidate(row.text, row.speaker if recipe.disjoint_speakers else None, row.pinned, row.id) for row in rows
    ]
    splits: dict[str, list[Row]] = {}
    for row, placement in zip(rows, assign_splits(candidates, recipe.splits, seed=recipe.seed), strict=True):
        if placement.conflict:
            dropped.append(_drop(row, placement.conflict, f"would have gone to {placement.split}"))
        else:
            splits.setdefault(placement.split, []).append(row)
    _check_filled(splits, recipe, dropped)
    return dict(sorted(splits.items()))


def _check_filled(splits: dict[str, list[Row]], recipe: PrepareRecipe, dropped: Sequence[Dropped]) -> None:
    if not splits:
        reasons = ", ".join(f"{reason} {count}" for reason, count in _reasons(dropped).items())
        raise DataError(f"no row of {len(recipe.sources)} manifests remains, dropped: {reasons}")
    for name, share in recipe.splits.items():
        if share > 0 and name not in splits and any(source.split is None for source in recipe.long_sources()):
            raise DataError(
                f"split {name} got none of {sum(map(len, splits.values()))} rows for its share {share:g}: change seed or splits"
            )


def _write_split(folder: Path, rows: Sequence[Row | JoinedRow], recipe: PrepareRecipe) -> None:
    """Parquet files of the rows in a seeded random order: manifests are sorted by speaker and book, batches should not be."""
    from graft.data.dataset import write_corpus

    shuffled = sorted(rows, key=lambda row: (seeded_hash(recipe.seed, row.id), row.id))
    for part, start in enumerate(range(0, len(rows), recipe.rows_per_file)):
        folder.mkdir(exist_ok=True)
        columns = map(_columns, shuffled[start : start + recipe.rows_per_file])
        write_corpus(columns, folder / f"part-{part:05d}.parquet", rows_per_group=recipe.rows_per_group)


def _columns(row: Row | JoinedRow) -> dict[str, Any]:
    if isinstance(row, JoinedRow):
        return joined_columns(row)
    clip = clip_of(row)
    content, suffix = (clip, ".flac") if isinstance(clip, bytes) else (clip.read_bytes(), row.audio.suffix)
    wav = {"bytes": content, "path": row.audio.stem + suffix}
    return {
        "ID": row.id,
        "duration": row.duration_s,
        "wav": wav,
        "spk_id": row.speaker,
        "sex": row.sex,
        "text": row.text,
    }


def _measures(rows: Sequence[Row]) -> dict[str, float]:
    return {"rows": len(rows), "hours": _hours(rows), "speakers": len({row.speaker for row in rows if row.speaker})}


def _hours(rows: Sequence[Row | JoinedRow]) -> float:
    return round(sum(sorted(row.duration_s for row in rows)) / 3600, 4)


def _reasons(dropped: Iterable[Dropped]) -> dict[str, int]:
    return dict(sorted(Counter(row.reason for row in dropped).items()))


def _print_table(out: str, summary: dict[str, Any]) -> None:
    print(f"{'split':<16}{'rows':>8}{'hours':>10}{'speakers':>10}")
    for split, measures in summary["splits"].items():
        print(f"{split:<16}{measures['rows']:>8}{measures['hours']:>10.2f}{measures['speakers']:>10}")
    for split, measures in summary.get("joined", {}).items():
        print(f"{split + ' joined':<16}{measures['rows']:>8}{measures['hours']:>10.2f}")
    for reason, count in summary["dropped"].items():
        print(f"dropped {count:>16}  {reason}")
    print(f"in {out}; dropped rows in {out}/dropped.jsonl")


if __name__ == "__main__":
    sys.exit(run_job(PrepareRecipe, main, summary=__doc__))
