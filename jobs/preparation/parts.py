"""Write the rows of a split as parquet files, each a task of its own on Ray or in this process."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..transcription.tasks import Tasks
from .audio_places import AudioReader
from .clips import stored_clip
from .concatenation import JoinedRow, joined_corpus_row
from .manifests import Row


@dataclass(frozen=True)
class Part:
    """A parquet file and its rows."""

    path: Path
    rows: Sequence[Row | JoinedRow]
    rows_per_group: int
    has_languages: bool
    home: str
    """The folder that relative paths of audio begin at."""


def write_parts(parts: Iterator[Part], tasks: Tasks, workers: int) -> Iterator[Path]:
    """Write files, `workers` at a time, and yield the path of each that is done. `tasks` runs `write_part`.

    Raises AudioError for audio that is gone since it was read.
    """
    running: dict[Any, Path] = {}
    try:
        while True:
            while len(running) < workers and (part := next(parts, None)):
                running[tasks.start(part)] = part.path
            if not running:
                return
            task, _ = tasks.wait(running)
            yield running.pop(task)
    finally:
        tasks.stop(running)


def write_part(part: Part) -> None:
    """Write one file. Raises as write_parts."""
    from graft.data.dataset import write_corpus

    with contextlib.closing(AudioReader(part.home)) as reader:
        write_corpus(
            (_corpus_row(row, reader, has_language=part.has_languages) for row in part.rows),
            part.path,
            rows_per_group=part.rows_per_group,
            has_languages=part.has_languages,
        )


def _corpus_row(row: Row | JoinedRow, reader: AudioReader, *, has_language: bool) -> dict[str, Any]:
    """Read a row's audio into the columns of write_corpus."""
    language = {"language": row.language} if has_language else {}
    if isinstance(row, JoinedRow):
        return joined_corpus_row(row, reader) | language
    content, name = stored_clip(row, reader)
    return {
        "ID": row.id,
        "duration": row.duration_s,
        "wav": {"bytes": content, "path": name},
        "spk_id": row.speaker,
        "sex": row.sex,
        "text": row.text,
        **language,
    }
