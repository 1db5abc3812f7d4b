"""Make the sets that are scored: labelled clips, swapped audio, clips joined to recordings, and sounds without speech.

Recordings and sounds are written as a corpus, so that they are read as any other clip is.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.data.dataset import CorpusFile, RowReader, RowTable, clip_row, read_parquet, read_rows, write_corpus
from graft.data.settings import Sources
from graft.errors import DataError

from .text_files import COLUMNS

PAUSE_S = 0.5
"""Seconds of silence between the clips of a joined recording."""


@dataclass(frozen=True)
class Item:
    """A clip to score: the row whose text is the reference ("" where nobody speaks), and the row of its audio."""

    set_name: str
    id: str
    text: str
    audio_id: str
    clip: tuple[CorpusFile, int, int]
    """Place of the audio: file, row group and row."""
    duration_s: float
    language: str | None = None
    """Language of the reference (ISO 639-1), None where it is not known."""
    known: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The reference's speaker, sex and source, those that the data name."""
    is_check: bool = False
    """Whether it checks the evaluation, and is not scored."""


def labelled(name: str, sources: Sources, *, limit: int | None, language: str | None = None) -> list[Item]:
    """List the first clips of a set; a set of several languages becomes one for each, "NAME LANGUAGE".

    `language` is that of the clips of which the data names none. Ids that occur again are numbered: `a`, `a#2`. Raises
    DataError for rows without text.
    """
    items = _number_ids(_with_known(_items(name, sources, limit=limit, language=language)))
    if len({item.language for item in items}) > 1:
        items = [replace(item, set_name=f"{name} {item.language or 'unknown'}") for item in items]
    if empty := [item.id for item in items if not item.text.strip()]:
        raise DataError(
            f"{len(empty)} rows of data.{name} have no text, {empty[0]} first: drop them with `graft prepare`"
        )
    return items


def joined_name(name: str) -> str:
    """Return the name of the set of recordings that are joined from a set."""
    return f"{name} joined"


def joined(items: Sequence[Item], recording_s: float, folder: Path) -> list[Item]:
    """Join a set's clips, with pauses, to recordings of at least `recording_s` seconds; the last may be shorter.

    A clip that cannot be read is left out with its text. Raises DataError when none can be read.
    """
    path = folder / f"recordings-{len(list(folder.iterdir()))}.parquet"  # a set's name need not be one of a file
    write_corpus(_recordings(items, recording_s), path, rows_per_group=4)
    return _items(joined_name(items[0].set_name), str(path), language=items[0].language)


def sounds(seed: int, folder: Path, *, are_checks: bool = False) -> list[Item]:
    """Make sounds in which nobody speaks, a set for each kind; as checks only the shortest of each sound."""
    from graft.data.nonspeech import SOUNDS, generate_sounds

    items = []
    for kind in SOUNDS:
        path = folder / f"{kind}.parquet"
        made = (sound for sound in generate_sounds(kind, seed) if not are_checks or sound.is_shortest)
        write_corpus((clip_row(sound.name, sound.clip, "") for sound in made), path, rows_per_group=4)
        items += [replace(item, is_check=are_checks) for item in _items(kind, str(path))]
    return items


def as_rows(items: Sequence[Item]) -> RowTable:
    """Return the rows whose audio is transcribed."""
    languages = list(dict.fromkeys(["", *(item.language or "" for item in items)]))
    files = {file: index for index, file in enumerate(dict.fromkeys(item.clip[0] for item in items))}
    return RowTable(
        ids=pa.array([item.audio_id for item in items], pa.large_string()),
        texts=pa.array([item.text for item in items], pa.large_string()),
        duration_s=np.array([item.duration_s for item in items]),
        language=np.array([languages.index(item.language or "") for item in items], np.int16),
        languages=languages,
        source=np.zeros(len(items), np.int16),
        file=np.array([files[item.clip[0]] for item in items], np.int32),
        row_group=np.array([item.clip[1] for item in items], np.int32),
        row=np.array([item.clip[2] for item in items], np.int32),
        group_bytes=np.zeros(len(items), np.float32),
        files=list(files),
        weights=[1.0],
    )


def _items(name: str, sources: Sources, *, limit: int | None = None, language: str | None = None) -> list[Item]:
    rows = read_rows(sources, language=language)
    columns = (rows.file, rows.row_group, rows.row, np.nan_to_num(rows.duration_s))
    return [
        Item(
            name,
            rows.id(index),
            rows.text(index),
            rows.id(index),
            (rows.files[file], row_group, row),
            duration_s,
            rows.language_of(index),
        )
        for index, (file, row_group, row, duration_s) in enumerate(
            zip(*(column[:limit].tolist() for column in columns), strict=True)
        )
    ]


def _number_ids(items: Sequence[Item]) -> list[Item]:
    """Make ids unique, by which answers are told apart."""
    seen = Counter[str]()
    numbered = []
    for item in items:
        seen[item.id] += 1
        name = item.id if seen[item.id] == 1 else f"{item.id}#{seen[item.id]}"
        numbered.append(replace(item, id=name, audio_id=name))
    return numbered


def _with_known(items: Sequence[Item]) -> list[Item]:
    """Add what the data say of speakers and sources."""
    known = {file: _read_known(file) for file in dict.fromkeys(item.clip[0] for item in items)}
    return [replace(item, known=known[item.clip[0]].get(item.clip[1:], {})) for item in items]


def _read_known(file: CorpusFile) -> dict[tuple[int, int], dict[str, str]]:
    """Read the columns that name speaker, sex and source: (row group, row) -> those that are not empty."""

    def read(parquet: pq.ParquetFile) -> dict[tuple[int, int], dict[str, str]]:
        names = parquet.schema_arrow.names
        found = {key: next((one for one in COLUMNS[key] if one in names), None) for key in ("speaker", "sex", "source")}
        columns = {key: column for key, column in found.items() if column is not None}
        known = {}
        for group in range(parquet.num_row_groups if columns else 0):
            rows = parquet.read_row_group(group, columns=list(columns.values())).to_pylist()
            for number, row in enumerate(rows):
                known[group, number] = {key: str(row[column]) for key, column in columns.items() if row[column]}
        return known

    return read_parquet(file.uri, read)


def _recordings(items: Sequence[Item], recording_s: float) -> Iterator[Mapping[str, Any]]:
    from ..training.validation import readable

    rows = as_rows(items)
    waiting: list[tuple[str, str, AudioClip]] = []
    for part in readable(rows, RowReader(rows.files)):  # the report lists the others in the set that they come from
        waiting.append(part)
        if sum(clip.duration_s + PAUSE_S for _, _, clip in waiting) >= recording_s:
            yield _recording(waiting)
            waiting = []
    if waiting:
        yield _recording(waiting)


def _recording(parts: Sequence[tuple[str, str, AudioClip]]) -> Mapping[str, Any]:
    pause = np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)
    samples = np.concatenate([piece for _, _, clip in parts for piece in (clip.samples, pause)])
    return clip_row(f"{parts[0][0]}..{parts[-1][0]}", AudioClip(samples), " ".join(text for _, text, _ in parts))
