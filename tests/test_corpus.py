import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.corpus import SCHEMA, RowReader, read_rows, write_corpus
from graft.errors import DataError


def rows(count: int, name: str = "r") -> list[dict]:
    return [
        {
            "ID": f"{name}{index:04}",
            "duration": 0.5 + index,
            "wav": {"bytes": f"{name} audio {index}".encode(), "path": f"{index}.flac"},
            "spk_id": "s" if index % 2 else None,
            "sex": None,
            "text": f"TEXT {index}",
        }
        for index in range(count)
    ]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "a folder"
    (folder / "below").mkdir(parents=True)
    assert write_corpus(rows(250, "b"), folder / "b.parquet", rows_per_group=100) == 250
    assert write_corpus(rows(3, "a"), folder / "a.parquet") == 3
    write_corpus(rows(2, "c"), folder / "below" / "c.parquet")
    (folder / ".hidden.parquet").write_text("half written")
    return folder


def test_rows_of_a_folder_are_found_again_one_by_one(corpus):
    table = read_rows(str(corpus))
    assert [Path(uri).name for uri in table.uris] == ["a.parquet", "b.parquet"]
    assert len(table) == 253
    assert table.ids[:4] == ["a0000", "a0001", "a0002", "b0000"]
    assert table.texts[3] == "TEXT 0"
    assert table.duration_s.dtype == np.float64
    assert np.array_equal(table.duration_s[3:], 0.5 + np.arange(250))
    assert {array.dtype for array in (table.file, table.row_group, table.row)} == {np.dtype(np.int32)}
    reader = RowReader(table.uris, cache_row_groups=2)
    for index in [252, 0, 102, 103, 202, 3, 252]:
        name, number = table.ids[index][0], int(table.ids[index][1:])
        assert reader.wav(table.file[index], table.row_group[index], table.row[index]) == (
            f"{name} audio {number}".encode(),
            f"{number}.flac",
        )


def test_files_globs_and_uris_name_the_same_rows(corpus):
    uri = corpus.as_uri()  # with %20 for the space
    for where, count in [
        ([str(corpus), str(corpus / "a.parquet")], 253),
        (str(corpus / "b.parquet"), 250),
        (str(corpus / "*.parquet"), 253),
        (str(corpus.parent / "*" / "[ab].parquet"), 253),
        (str(corpus / "*" / "*.parquet"), 2),
        (uri, 253),
        (f"{uri}/b*.parquet", 250),
        (f"{uri}/a.parquet", 3),
    ]:
        table = read_rows(where)
        assert len(table) == count, where
        assert RowReader(table.uris).wav(0, 0, 1)[1] == "1.flac"


def test_relative_paths_become_absolute(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert read_rows(".").uris == [str(corpus / "a.parquet"), str(corpus / "b.parquet")]


def test_same_rows_same_bytes(tmp_path):
    digests = set()
    for name in ["one", "two"]:
        write_corpus(iter(rows(30)), tmp_path / name, rows_per_group=7)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    assert pq.read_schema(tmp_path / "one").equals(SCHEMA)
    assert pq.ParquetFile(tmp_path / "one").num_row_groups == 5


def test_columns_beyond_the_schema_and_null_texts_are_read(tmp_path):
    table = pa.Table.from_pylist([{**row, "text": None} for row in rows(4)], schema=SCHEMA).append_column("lang", pa.array(["en"] * 4))
    pq.write_table(table.drop_columns(["spk_id", "sex"]), tmp_path / "x.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "without rows.parquet")
    assert read_rows(str(tmp_path)).texts == [""] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop_columns(["text", "wav"]), "lacks text, wav"),
        (lambda t: t.set_column(2, "wav", pa.array([b"x"] * len(t))), "column wav is binary"),
        (
            lambda t: t.set_column(1, "duration", pa.array([1.0, None, float("nan"), 0.0])),
            "3 rows without a positive duration, the first is r0001",
        ),
        (lambda t: t.set_column(1, "duration", pa.array(["long"] * 4)), "long"),
        (lambda t: t.set_column(0, "ID", pa.array(["a", None, "b", None])), "2 of 4 rows have no ID"),
        (lambda t: t.slice(0, 0), "no rows"),
    ],
)
def test_a_file_of_another_shape_is_a_data_error(tmp_path, change, words):
    pq.write_table(change(pa.Table.from_pylist(rows(4), schema=SCHEMA)), tmp_path / "x.parquet")
    message = fault(str(tmp_path))
    assert words in message
    assert str(tmp_path) in message


def fault(uris) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(uris)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_places_and_other_files_are_data_errors(tmp_path):
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "empty").mkdir()
    assert "no such file or folder" in fault(str(tmp_path / "none"))
    assert "no *.parquet file" in fault(str(tmp_path / "empty"))
    assert "not a parquet file" in fault(str(tmp_path / "text.parquet"))
    assert "not a location" in fault("nowhere://x/y")
    assert "no *.parquet file" in fault(str(tmp_path / "*" / "x.parquet"))
    assert "no such file or folder" in fault(str(tmp_path / "none" / "*"))


def test_a_folder_with_brackets_in_its_name_is_no_glob(tmp_path):
    (tmp_path / "[old]").mkdir()
    write_corpus(rows(2), tmp_path / "[old]" / "x.parquet")
    assert len(read_rows(str(tmp_path / "[old]"))) == 2


def test_a_row_without_audio_and_a_vanished_file_are_data_errors(tmp_path):
    write_corpus([{**rows(1)[0], "wav": None}], tmp_path / "x.parquet")
    reader = RowReader([str(tmp_path / "x.parquet"), str(tmp_path / "gone.parquet")])
    with pytest.raises(DataError, match="row 0 of row group 0 holds no audio"):
        reader.wav(0, 0, 0)
    with pytest.raises(DataError, match="no such file"):
        reader.wav(1, 0, 0)


def test_write_refuses_other_rows_and_leaves_nothing_behind(tmp_path):
    for bad, words in [
        ([], "no rows"),
        ([*rows(150), {"ID": "x"}], "row 'x' has keys"),
        ([{**rows(1)[0], "duration": "long"}], "r0000"),
        ([{**rows(1)[0], "extra": 1}], "extra"),
    ]:
        with pytest.raises(DataError, match=words):
            write_corpus(bad, tmp_path / "x.parquet")
        assert list(tmp_path.iterdir()) == []
