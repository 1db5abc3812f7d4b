"""Recordings -> work items of about half an hour, the rows that Ray Data reads, transcribes and remembers by their ids.

A duration told by a header is an estimate: it only says where borders are looked for, and the last item of a recording has no end. An
item's id is made of its recording's name and version, its place and how often it failed, so a later run knows what is done.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graft.audio.decoding import open_audio
from graft.errors import AudioError

LEAST_BYTES_PER_S = 600
"""Of any codec that speech is kept in: files that would last for less than an item even so are not opened for the plan."""
FILES_PER_TASK = 500
_BLOCK = 65_536
PROBES = 8
"""Headers that a task reads at a time: over a network they wait for answers."""

ITEMS = pa.schema(
    [
        ("id", pa.string()),
        ("item", pa.string()),  # the id of its first attempt
        ("attempt", pa.int32()),  # from 0
        ("recording", pa.string()),
        ("uri", pa.string()),
        ("row_group", pa.int32()),  # null for files
        ("row", pa.int32()),
        ("index", pa.int32()),  # of the item in its recording
        ("item_count", pa.int32()),  # of the recording
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),  # null for the last
        ("expected_s", pa.float64()),  # null if unknown
    ]
)

Probe = Callable[[Sequence[str]], list[float | None]]
"""URIs -> seconds of audio in each; None where none can be told."""


def plan_items(recordings: pa.Table, *, item_s: float, probe: Probe) -> pa.Table:
    """Cut recordings (archive.RECORDINGS) into ITEMS of about `item_s` seconds, in their order; `probe` tells how long files are."""
    duration_s = recordings["duration_s"].to_numpy().copy()
    size = recordings["size"].fill_null(2**62).to_numpy()
    is_row = recordings["row"].is_valid().to_numpy()
    unknown = np.flatnonzero(~is_row & np.isnan(duration_s) & (size >= item_s * LEAST_BYTES_PER_S))
    told = probe(recordings["uri"].take(pa.array(unknown)).to_pylist()) if len(unknown) else []
    duration_s[unknown] = [np.nan if seconds is None else seconds for seconds in told]
    counts = np.maximum(1, np.rint(np.nan_to_num(duration_s) / item_s)).astype(np.int32)
    place = np.repeat(np.arange(len(recordings)), counts)
    index = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_last = index == counts[place] - 1
    ids = _recording_ids(recordings)
    start_s = index * item_s
    chosen = recordings.select(["recording", "uri", "row_group", "row"]).take(pa.array(place))
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


def _recording_ids(recordings: pa.Table) -> pa.Array:
    batches = recordings.select(["recording", "version"]).to_batches(
        max_chunksize=_BLOCK
    )  # Python's strings are large: never all at once
    ids = (
        pa.array(map(recording_id, *(column.to_pylist() for column in batch.columns)), pa.string()) for batch in batches
    )
    return pa.chunked_array(ids, pa.string()).combine_chunks()


def recording_id(name: str, version: str) -> str:
    """A short id of a recording as it is now: of the same name and version always the same."""
    return hashlib.sha256(f"{name}\0{version}".encode()).hexdigest()[:20]


def at_attempts(items: pa.Table, results: pa.Table, *, retry_errors: bool) -> pa.Table:
    """Items under the ids at which they stand by now: those that failed, and are to be tried again, under a new one.

    `results` has `item`, `attempt` and whether it `failed`, of all that is done.
    """
    if not len(results):
        return items
    joined = (
        items.select(["item"])
        .append_column("order", pa.array(np.arange(len(items))))
        .join(last_attempts(results), "item")
    )
    joined = joined.sort_by("order")
    attempts = pc.fill_null(joined["attempt"], 0).to_numpy().copy()
    if retry_errors:
        attempts += joined["failed"].to_numpy(zero_copy_only=False) == True  # noqa: E712 - null is not
    return _identified(items, attempts)


def last_attempts(results: pa.Table) -> pa.Table:
    """Of every item that is done, the last `attempt` and whether that `failed`."""
    rank = pc.add(pc.multiply(results["attempt"].cast(pa.int64()), 2), results["failed"].cast(pa.int64()))
    last = pa.table({"item": results["item"], "rank": rank}).group_by("item").aggregate([("rank", "max")])
    ranks = last["rank_max"].to_numpy()
    return pa.table({"item": last["item"], "attempt": ranks // 2, "failed": ranks % 2 == 1})


def _identified(items: pa.Table, attempts: np.ndarray) -> pa.Table:
    attempt = pa.array(attempts, pa.int32())
    retried = pc.binary_join_element_wise(items["item"], attempt.cast(pa.string()), "~")
    ids = pc.if_else(pa.array(attempts == 0), items["item"], retried)
    return items.set_column(0, "id", ids).set_column(items.schema.get_field_index("attempt"), "attempt", attempt)


def durations(uris: Sequence[str]) -> list[float | None]:
    """Seconds of audio in files, by their headers or, where those don't tell, by decoding all; None for files that can't be read."""
    with ThreadPoolExecutor(PROBES) as pool:
        return list(pool.map(_duration, uris))


def _duration(uri: str) -> float | None:
    try:
        with open_audio(uri) as audio:
            if audio.info.duration_s is not None:
                return audio.info.duration_s
            return sum(map(len, audio.frames())) / audio.info.rate
    except AudioError:
        return None
