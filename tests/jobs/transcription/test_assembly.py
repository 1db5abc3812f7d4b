"""Test that results which overlapping, killed and earlier runs left are whole, and count once."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.transcription.assembly import PENDING, join_items, open_results, read_index, recordings_in, with_files
from tests.support.work_items import planned, write_results


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("items", "done"):
        (tmp_path / name).mkdir()
    return tmp_path


def mark(home: Path, name: str, *ids: str) -> None:
    pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), home / "done" / f"{name}.parquet")


def marks(home: Path) -> dict[str, list[str]]:
    """Return the ids that Ray Data will skip, by the names of the marks."""
    found = {path.name: pq.read_table(path, partitioning=None)["id"] for path in (home / "done").glob("*.parquet")}
    return {name.removesuffix(".parquet"): ids.to_pylist() for name, ids in found.items()}


def test_the_first_result_of_an_item_counts_and_what_was_cut_off_is_done_again(home: Path) -> None:
    write_results(home, "1_0-0", ("a-0", 1, 10.0, None))
    write_results(home, "2_0-0", ("a-0", 1, 20.0, "an engine that was killed"), ("b-0", 1, 10.0, None))
    write_results(home, "3_0-0", ("c-0", 1, 10.0, None))
    write_results(home, "4_0-0", ("d-0", 1, 10.0, None))
    mark(home, "1_0", "a-0")  # of 2_0, another run took the mark away
    mark(home, "3_0", "c-0")
    mark(home, "5_0", "e-0")  # and the results of 5_0
    (home / "done" / "1_0.parquet").write_bytes(b"")  # the power failed
    path = home / "items" / "3_0-0.parquet"
    path.write_bytes(path.read_bytes()[:100])
    (home / "items" / "6_0-0.parquet").write_bytes(b"")
    mark(home, f"4_0{PENDING.removesuffix('.parquet')}", "d-0")  # Ray Data removes both
    for _ in range(2):
        index = open_results(home)
        assert sorted(zip(*index.select(["id", "file", "failed"]).to_pydict().values(), strict=True)) == [
            ("a-0", "1_0-0.parquet", False),
            ("b-0", "2_0-0.parquet", False),
        ]
        assert marks(home) == {"1_0": ["a-0"], "2_0": ["a-0", "b-0"], "4_0.pending": ["d-0"]}
        assert read_index(home).equals(index)
    plan = with_files(planned(("b", [10.0]), ("a", [10.0])), index)
    found = [
        (one["id"], one["duration_s"], one["error"]) for part in recordings_in(plan, home / "items") for one in part
    ]
    assert found == [("b-0", 10.0, None), ("a-0", 10.0, None)]


def test_results_of_earlier_versions_are_joined_with_those_of_this_one(home: Path) -> None:
    for name, ids in (("1_0-0", ["a-0"]), ("2_0-0", ["a-1", "b-0"])):
        write_results(home, name, *((one, 2 if one[0] == "a" else 1, 10.0, None) for one in ids))
    old = home / "items" / "1_0-0.parquet"
    pq.write_table(pq.read_table(old, partitioning=None).drop_columns(["defects", "started_at"]), old)
    plan = with_files(planned(("a", [10.0, 10.0]), ("b", [10.0])), open_results(home))
    first, second = recordings_in(plan, home / "items")
    assert [item["defects"] for item in (*first, *second)] == [[], [], []]
    assert join_items(first).duration_s == 20.0


def test_a_folder_without_results_is_empty(tmp_path: Path) -> None:
    assert len(open_results(tmp_path)) == 0
