"""Test work items: recordings are cut at estimated borders under stable ids; only a retry gets a new one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from jobs.transcription.discovery import RECORDINGS
from jobs.transcription.work_items import ITEMS, LEAST_BYTES_PER_S, at_attempts, durations, plan_items


def recordings(*rows: dict) -> pa.Table:
    blank = dict.fromkeys(RECORDINGS.names) | {"version": "1"}
    return pa.Table.from_pylist([blank | {"uri": f"/{row['recording']}"} | row for row in rows], RECORDINGS)


def plan(*rows: dict, told: dict[str, float | None] | None = None, item_s: float = 100.0) -> pa.Table:
    asked: list[str] = []

    def probe(uris: Sequence[str]) -> list[float | None]:
        asked.extend(uris)
        return [(told or {})[uri] for uri in uris]

    items = plan_items(recordings(*rows), item_s=item_s, probe=probe)
    assert items.schema == ITEMS
    assert sorted(asked) == sorted(told or {})
    return items


def spans(items: pa.Table) -> list[tuple[float, float | None]]:
    return [(row["start_s"], row["end_s"]) for row in items.to_pylist()]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, [(0, None)]),
        (0.0, [(0, None)]),
        (149.0, [(0, None)]),
        (151.0, [(0, 100), (100, None)]),
        (430.0, [(0, 100), (100, 200), (200, 300), (300, None)]),
    ],
)
def test_a_recording_is_cut_into_items_of_about_a_length_and_the_last_is_open(seconds, expected):
    items = plan({"recording": "a", "size": 10**9}, told={"/a": seconds})
    assert spans(items) == expected
    assert items["item_count"].to_pylist() == [len(expected)] * len(expected)
    assert items["index"].to_pylist() == list(range(len(expected)))
    assert (
        sum(items["expected_s"].to_pylist()) == seconds
        if seconds is not None
        else items["expected_s"].to_pylist() == [None]
    )


def test_only_files_that_may_be_long_are_opened():
    short = {"recording": "short", "size": 100 * LEAST_BYTES_PER_S - 1}
    row = {"recording": "row", "row_group": 3, "row": 4, "duration_s": 250.0}
    unknown = {"recording": "unknown", "size": None}
    items = plan(short, row, unknown, told={"/unknown": 500.0})
    assert items["recording"].to_pylist() == ["short", "row", "row", *["unknown"] * 5]
    assert items["row_group"].to_pylist()[:4] == [None, 3, 3, None]


def test_ids_stay_whatever_else_is_there_and_change_with_the_file():
    a, b = {"recording": "a", "duration_s": 200.0, "row": 0, "row_group": 0}, {"recording": "b", "size": 1}
    alone, both = plan(b), plan(a, b)
    assert both["id"].to_pylist()[-1:] == alone["id"].to_pylist()
    assert len(set(both["id"].to_pylist())) == 3
    assert plan(b | {"version": "2"})["id"] != alone["id"]


def results(*rows: tuple[str, int, bool]) -> pa.Table:
    return pa.table(
        {
            name: pa.array(column)
            for name, column in zip(["item", "attempt", "failed"], zip(*rows, strict=True), strict=True)
        }
    )


def test_what_failed_is_tried_again_under_a_new_id_only_when_asked():
    items = plan(*({"recording": name, "size": 1} for name in "abcd"))
    a, b, c, d = items["item"].to_pylist()
    done = results((a, 0, False), (b, 0, True), (c, 1, False), (c, 0, True))
    as_is = at_attempts(items, done, retry_errors=False)
    assert as_is["id"].to_pylist() == [a, b, f"{c}~1", d]
    again = at_attempts(items, done, retry_errors=True)
    assert again["id"].to_pylist() == [a, f"{b}~1", f"{c}~1", d]
    assert again["attempt"].to_pylist() == [0, 1, 1, 0]
    assert again.drop_columns(["id", "attempt"]) == items.drop_columns(["id", "attempt"])
    assert at_attempts(items, done.slice(0, 0), retry_errors=True) == items


def test_durations_are_told_by_headers_or_counted(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(24_000, np.float32), 16_000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    assert durations([str(tmp_path / "a.wav"), str(tmp_path / "broken.wav"), str(tmp_path / "gone.wav")]) == [
        1.5,
        None,
        None,
    ]
