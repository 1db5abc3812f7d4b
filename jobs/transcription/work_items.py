"""Cut recordings into work items of about half an hour, the rows of the plan that Ray Data remembers by their ids.

The duration in a header is an estimate: it only says where borders are looked for, and the last item of a recording
has no end. An item's id is made of its recording's name and version, its place and how often it failed, so that a
later run knows what is done.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graft.audio.decoding import open_audio
from graft.errors import AudioError

LEAST_BYTES_PER_S = 600
"""The lowest bitrate of codecs for speech. A file that is shorter than an item even at this rate is not opened for the
plan."""
FILES_PER_TASK = 500
PROBES = 8
"""Number of headers that a task reads at a time: over a network most of the time is waiting."""
_BLOCK = 65_536
"""Number of recordings that are Python strings at a time: they take many times the memory of Arrow's."""

ITEMS = pa.schema(
    [
        ("id", pa.string()),
        ("item", pa.string()),  # the id of its first attempt
        ("attempt", pa.int32()),  # from 0
        ("recording", pa.string()),
        ("uri", pa.string()),
        ("row_group", pa.int32()),  # null for files
        ("row", pa.int32()),
        ("audio_column", pa.string()),
        ("language", pa.string()),  # null where it is not known
        ("index", pa.int32()),  # of the item in its recording
        ("item_count", pa.int32()),  # of the recording
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),  # null for the last
        ("expected_s", pa.float64()),  # null if unknown
    ]
)

Probe = Callable[[Sequence[str]], list[float | None]]
"""URIs -> seconds of audio in each; None where the number is not known."""


def plan_items(recordings: pa.Table, *, item_s: float = 1800.0, probe: Probe) -> pa.Table:
    """Cut recordings (discovery.RECORDINGS) into ITEMS of about `item_s` seconds, in their order.

    `probe` returns the durations of files that may be longer than an item.
    """
    duration_s = recordings["duration_s"].to_numpy().copy()
    size = recordings["size"].fill_null(2**62).to_numpy()
    is_row = recordings["row"].is_valid().to_numpy()
    unknown = np.flatnonzero(~is_row & np.isnan(duration_s) & (size >= item_s * LEAST_BYTES_PER_S))
    probed = probe(recordings["uri"].take(pa.array(unknown)).to_pylist()) if len(unknown) else []
    duration_s[unknown] = [np.nan if seconds is None else seconds for seconds in probed]
    counts = np.maximum(1, np.rint(np.nan_to_num(duration_s) / item_s)).astype(np.int32)  # items of each recording
    # Of each item: the row of its recording, and its number within the recording.
    place = np.repeat(np.arange(len(recordings)), counts)
    index = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_last = index == counts[place] - 1
    batches = recordings.select(["recording", "version"]).to_batches(max_chunksize=_BLOCK)
    ids = pa.chunked_array([_recording_ids(batch) for batch in batches], pa.string())
    start_s = index * item_s
    chosen = recordings.select(["recording", "uri", "row_group", "row", "audio_column", "language"]).take(
        pa.array(place)
    )
    item_ids = pc.binary_join_element_wise(ids.take(pa.array(place)), pa.array(index).cast(pa.string()), "-")
    columns = {
        **dict(zip(chosen.column_names, chosen.columns, strict=True)),
        "id": item_ids,
        "item": item_ids,
        "attempt": pa.array(np.zeros(len(place)), pa.int32()),
        "index": pa.array(index, pa.int32()),
        "item_count": pa.array(counts[place]),
        "start_s": pa.array(start_s, pa.float64()),
        "end_s": pa.array(start_s + item_s, pa.float64(), mask=is_last),
        "expected_s": pa.array(np.where(is_last, duration_s[place] - start_s, item_s), pa.float64(), from_pandas=True),
    }
    return pa.table([columns[name] for name in ITEMS.names], schema=ITEMS)


def _recording_ids(names: pa.RecordBatch) -> pa.Array:
    """Return short ids of recordings as they are now; equal names and versions have equal ids."""
    rows = zip(*(column.to_pylist() for column in names.columns), strict=True)
    return pa.array([hashlib.sha256(f"{name}\0{version}".encode()).hexdigest()[:20] for name, version in rows])


def at_attempts(items: pa.Table, results: pa.Table, *, retry_errors: bool) -> pa.Table:
    """Give items the ids of their current attempts: those that failed and are to be tried again get a new one.

    `results` has the columns `item`, `attempt` and `failed` of all that is done.
    """
    if not len(results):
        return items
    numbered = items.select(["item"]).append_column("order", pa.array(np.arange(len(items))))
    joined = numbered.join(last_attempts(results), "item").sort_by("order")  # a join loses the order
    attempts = pc.fill_null(joined["attempt"], 0).to_numpy().copy()
    if retry_errors:
        attempts += joined["failed"].to_numpy(zero_copy_only=False) == True  # noqa: E712 - null is not
    attempt = pa.array(attempts, pa.int32())
    retried = pc.binary_join_element_wise(items["item"], attempt.cast(pa.string()), "~")
    ids = pc.if_else(pa.array(attempts == 0), items["item"], retried)
    return items.set_column(0, "id", ids).set_column(items.schema.get_field_index("attempt"), "attempt", attempt)


def last_attempts(results: pa.Table) -> pa.Table:
    """Return the last `attempt` of every item that is done, and whether that `failed`."""
    # One number for both, whose greatest value is the last attempt; a failure wins where an attempt stands there twice.
    rank = pc.add(pc.multiply(results["attempt"].cast(pa.int64()), 2), results["failed"].cast(pa.int64()))
    last = pa.table({"item": results["item"], "rank": rank}).group_by("item").aggregate([("rank", "max")])
    ranks = last["rank_max"].to_numpy()
    return pa.table({"item": last["item"], "attempt": ranks // 2, "failed": ranks % 2 == 1})


def durations(uris: Sequence[str]) -> list[float | None]:
    """Return the seconds of audio in files; None for those that cannot be read.

    They are taken from the headers or, where a header has none, counted by decoding the file.
    """
    with ThreadPoolExecutor(PROBES) as pool:
        return list(pool.map(_duration, uris))


def _duration(uri: str) -> float | None:
    with contextlib.suppress(AudioError), open_audio(uri) as audio:
        seconds = audio.info.duration_s
        return sum(map(len, audio.frames())) / audio.info.rate if seconds is None else seconds
    return None
