"""Transcribe a few files in this process, without Ray, and pass on each chunk's text as it is decoded.

plan -> ItemReader -> ItemTranscriber, those of the pipeline, one item at a time -> the results of each recording, or
files of results as the pipeline writes them
"""

import asyncio
import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.audio.chunking import Chunk
from graft.inference.segments import Segment
from graft.storage.atomic import atomic_file
from graft.storage.local_paths import local_path

from . import Auto
from .assembly import read_index
from .discovery import LIST_SUFFIXES, PARQUET, find_recordings, suffix_of
from .pipeline import NOTES_FOLDER, RESULTS, ChunkTranscriber, ItemTranscriber, Opener, Pipeline
from .reader import ItemReader, Reading
from .tasks import asks_for_ray
from .work_items import ITEMS, durations, plan_items

MOST_FILES = 8
MOST_HOURS = 1.0
"""Files, and hours of audio in them, up to which starting Ray would take longer than it saves."""
CHUNKS_AT_ONCE = 4
"""Chunks that are decoded together. The engine takes hardly longer for them than for one; with more of them, the first
text appears later."""


def needs_ray(sources: Sequence[str], workers: int | Auto) -> str | None:
    """Say why Ray is to transcribe what `sources` name, where they are not a few local files; else return None."""
    if reason := asks_for_ray(workers):
        return reason
    paths = (local_path(source) or "" for source in sources)
    is_named = (os.path.isfile(path) and suffix_of(path) not in (*LIST_SUFFIXES, PARQUET) for path in paths)
    if not all(is_named):
        return "these are not only local files that are named one by one"
    return f"these are more than {MOST_FILES} files" if len(sources) > MOST_FILES else None


def are_for_ray(recordings: pa.Table, workers: int | Auto, home: Path) -> str | None:
    """Say why Ray is to transcribe recordings (discovery.RECORDINGS), where they are not a few local ones.

    `home` holds the results of earlier runs. Where one was killed while it read, a file may crash the decoder, which
    ends a process of Ray, and not the run.
    """
    if reason := asks_for_ray(workers):
        return reason
    if len(recordings) > MOST_FILES:
        return f"these are more than {MOST_FILES} recordings"
    if any(local_path(uri) is None for uri in recordings["uri"].to_pylist()):
        return "these are not only local files"
    if any((home / NOTES_FOLDER).glob("*")):
        return "an earlier run was killed while it read a recording"
    return None


def is_too_long(plan: pa.Table) -> str | None:
    """Say so where a plan (ITEMS) holds over MOST_HOURS of audio; short files of unknown duration count nothing."""
    hours = (pc.sum(plan["expected_s"]).as_py() or 0.0) / 3600
    return f"these are {hours:.1f} h of audio" if hours > MOST_HOURS else None


def local_plan(sources: Sequence[str], *, item_s: float) -> pa.Table:
    """Cut local files into items (ITEMS) in the order in which they are named; two may have one name."""
    recordings = pa.concat_tables([find_recordings([source]) for source in sources])
    return plan_items(recordings, item_s=item_s, probe=durations)


def transcribe_items_here(plan: Path, home: Path, pipeline: Pipeline) -> None:
    """Transcribe the items of a plan that have no result in `home` yet, and write each as transcribe_items does.

    Raises as LocalTranscriber.
    """
    for name in ("items", "done", NOTES_FOLDER):
        (home / name).mkdir(exist_ok=True)
    items = pq.read_table(plan, partitioning=None)
    left = items.filter(pc.invert(pc.is_in(items["id"], read_index(home)["id"]))).to_pylist()
    opened = LocalTranscriber(pipeline.reading, pipeline.opener, pipeline.options, notes=home / NOTES_FOLDER)
    with contextlib.closing(opened) as transcriber:
        for item in left:
            results = pa.Table.from_pylist(transcriber.transcribe([item]), RESULTS)
            name = uuid.uuid4().hex
            with atomic_file(home / "items" / f"{name}-0.parquet") as temporary:
                pq.write_table(results, temporary)
            with atomic_file(home / "done" / f"{name}.parquet") as temporary:  # Ray Data skips what stands there
                pq.write_table(results.select(["id"]), temporary)


def recordings_of(plan: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """Yield the items of each recording of a plan."""
    items: list[dict[str, Any]] = []
    for item in plan.to_pylist():
        if item["index"] == 0 and items:
            yield items
            items = []
        items.append(item)
    yield items


class LocalTranscriber:
    """Transcribes the items of recordings with one model; `show` gets each segment when all before it are known.

    `notes` is the reader's folder. Close it after use. Raises GraftError for options that the model does not take, and
    what a model raises that fails on several items one after the other.
    """

    def __init__(
        self,
        reading: Reading,
        opener: Opener,
        options: dict[str, Any],
        show: Callable[[Segment], None] = lambda _: None,
        *,
        notes: Path | None = None,
    ) -> None:
        # The reader takes one thread; the model is opened after it, and may take more.
        self._read = ItemReader(reading, notes)
        self._model: Any = opener()
        self._transcribe = ItemTranscriber(lambda: _ShowingTranscriber(self._model, show), options)

    def close(self) -> None:
        """Release the model."""
        self._model.close()

    def transcribe(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Transcribe the items of a recording; returns them with their results (pipeline.RESULTS)."""
        return [
            item | result
            for item in items
            for chunks in self._read(pa.Table.from_pylist([item], ITEMS))
            for result in self._transcribe(chunks).to_pylist()
        ]


class _ShowingTranscriber:
    """A ChunkTranscriber that passes on every segment in the order of the chunks, as soon as it is known."""

    def __init__(self, model: ChunkTranscriber, show: Callable[[Segment], None]) -> None:
        self._model, self._show = model, show

    async def find_language(self, chunks: Sequence[Chunk]) -> str | None:
        """Find the language of a recording, as the model does."""
        return await self._model.find_language(chunks)

    async def transcribe_chunks(self, chunks: Sequence[Chunk], **options: Any) -> list[Segment]:
        """Transcribe chunks; a segment for each, in their order."""
        places = asyncio.Semaphore(CHUNKS_AT_ONCE)

        async def transcribe(chunk: Chunk) -> Segment:
            async with places:
                (segment,) = await self._model.transcribe_chunks([chunk], **options)
            return segment

        tasks = [asyncio.create_task(transcribe(chunk)) for chunk in chunks]
        segments = []
        try:
            for task in tasks:
                segments.append(await task)
                self._show(segments[-1])
        finally:
            for task in tasks:
                task.cancel()
        return segments
