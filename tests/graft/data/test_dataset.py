"""Corpora are read row by row from any parquet files, and written whole."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.data.dataset import SCHEMA, CorpusFile, RowReader, read_rows, write_corpus
from graft.data.settings import Columns, Source
from graft.errors import DataError
from tests.support.speech_corpus import flac


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
    assert [Path(file.uri).name for file in table.files] == ["a.parquet", "b.parquet"]
    assert len(table) == 253
    assert table.ids[:4].to_pylist() == ["a0000", "a0001", "a0002", "b0000"]
    assert table.text(3) == "TEXT 0"
    assert table.duration_s.dtype == np.float64
    assert np.array_equal(table.duration_s[3:], 0.5 + np.arange(250))
    assert {array.dtype for array in (table.file, table.row_group, table.row)} == {np.dtype(np.int32)}
    reader = RowReader(table.files, cache_row_groups=2)
    for index in [252, 0, 102, 103, 202, 3, 252]:
        name, number = table.id(index)[0], int(table.id(index)[1:])
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
        assert RowReader(table.files).wav(0, 0, 1)[1] == "1.flac"


def test_relative_paths_become_absolute(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert [file.uri for file in read_rows(".").files] == [str(corpus / "a.parquet"), str(corpus / "b.parquet")]


def test_rows_that_only_training_refuses_are_kept(tmp_path):
    table = pa.Table.from_pylist(rows(4), schema=SCHEMA).set_column(
        1, "duration", pa.array([1.0, None, float("nan"), 0.0])
    )
    pq.write_table(table.set_column(5, "text", pa.array([None, "", " ", "a"])), tmp_path / "x.parquet")
    read = read_rows(str(tmp_path))
    assert np.array_equal(read.duration_s, [1.0, np.nan, np.nan, 0.0], equal_nan=True)
    assert read.texts.to_pylist() == ["", "", " ", "a"]


def test_chosen_rows_keep_their_places(corpus):
    table = read_rows(str(corpus))
    for chosen in [np.array([252, 3, 102]), np.isin(np.arange(253), [0, 5]), np.array([], np.int64)]:
        part = table.select(chosen)
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        assert len(part) == len(indices)
        reader = RowReader(part.files)
        for row, index in enumerate(indices):
            assert (part.id(row), part.text(row)) == (table.id(index), table.text(index))
            assert reader.wav(part.file[row], part.row_group[row], part.row[row])[0].decode().split()[-1] == str(
                int(part.id(row)[1:])
            )


def test_texts_are_composed_and_languages_are_those_of_columns_sources_and_the_command(tmp_path):
    table = pa.Table.from_pylist([{**row, "text": "E\u0301te\u0301"} for row in rows(4)], schema=SCHEMA)
    spoken = table.append_column("lang", pa.array(["de-AT", None, "French", ""]))
    pq.write_table(spoken, tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(table, tmp_path / "b.parquet")
    named = Source(files=str(tmp_path / "a.parquet"), columns=Columns(language="lang"), language="vi")
    read = read_rows([named, str(tmp_path / "b.parquet")], language="hi")
    assert set(read.texts.to_pylist()) == {"Été"}
    assert [read.language_of(row) for row in range(8)] == ["de", "vi", "fr", "vi", *["hi"] * 4]
    assert [read.select(np.array([4, 2])).language_of(row) for row in (0, 1)] == ["hi", "fr"]
    assert {read.without_languages().language_of(row) for row in range(8)} == {None}
    assert {read_rows(str(tmp_path / "b.parquet")).language_of(row) for row in range(4)} == {None}
    with pytest.raises(DataError, match="language 'Klingon' is none that is known"):
        read_rows(str(tmp_path / "b.parquet"), language="Klingon")
    with pytest.raises(DataError, match="lacks lang, has ID"):
        read_rows(Source(files=str(tmp_path / "b.parquet"), columns=Columns(language="lang")))


def test_a_pickled_table_is_buffers_and_a_list_of_files(corpus):
    buffers: list[pickle.PickleBuffer] = []
    table = read_rows(str(corpus))
    inline = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
    assert len(inline) < 2000 + sum(len(file.uri) for file in table.files)
    copy = pickle.loads(inline, buffers=buffers)
    assert copy.ids.equals(table.ids)
    assert copy.ids.buffers()[2].address == table.ids.buffers()[2].address  # no copy
    assert np.shares_memory(copy.row, table.row)


def other_table(count: int = 5, name: str = "o") -> pa.Table:
    """Make rows with the columns of another corpus, without ids."""
    audio = [
        {"bytes": flac(0.5 + index / 10, index), "path": f"{name}{index}.flac", "rate": 16_000}
        for index in range(count)
    ]
    meta = [{"text": f"Said {index}.", "seconds": 500 + index} for index in range(count)]
    return pa.table({"clip": audio, "meta": meta, "number": list(range(count))})


def test_columns_map_any_other_audio_parquet(tmp_path):
    pq.write_table(other_table(), tmp_path / "other.parquet", row_group_size=2)
    named = {"id": "number", "duration": "meta.seconds", "text": "meta.text"}
    table = read_rows(Source(files=str(tmp_path), columns=Columns(**named, audio="clip")))
    assert table.ids.to_pylist() == ["0", "1", "2", "3", "4"]
    assert table.texts.to_pylist() == [f"Said {index}." for index in range(5)]
    assert table.duration_s.tolist() == [500, 501, 502, 503, 504]
    assert RowReader(table.files).wav(0, 1, 1) == (flac(0.8, 3), "o3.flac")
    leaf = read_rows(Source(files=str(tmp_path), columns=Columns(**named, audio="clip.bytes")))
    assert RowReader(leaf.files).wav(0, 1, 1) == (flac(0.8, 3), "")
    flat = other_table().append_column(
        "mp3", pa.array([flac(0.5 + index / 10, index) for index in range(5)], pa.large_binary())
    )
    pq.write_table(flat.drop_columns(["clip"]), tmp_path / "other.parquet")
    table = read_rows(Source(files=str(tmp_path), columns=Columns(**named, audio="mp3")))
    assert RowReader(table.files).wav(0, 0, 3) == (flac(0.8, 3), "")


def test_ids_and_durations_that_a_corpus_lacks_are_made(tmp_path, caplog):
    broken = other_table().to_pylist()
    broken[1]["clip"], broken[2]["clip"] = None, {"bytes": b"no audio", "path": None, "rate": 0}
    pq.write_table(pa.Table.from_pylist(broken), tmp_path / "part-7.parquet", row_group_size=2)
    columns = Columns(id=None, duration=None, text="meta.text", audio="clip")
    table = read_rows(Source(files=str(tmp_path), columns=columns))
    assert table.ids.to_pylist() == [f"part-7:{index}" for index in range(5)]
    assert np.allclose(table.duration_s, [0.5, np.nan, np.nan, 0.8, 0.9], equal_nan=True)
    assert "reading all of its audio" in caplog.text


def test_a_corpus_may_have_no_texts(tmp_path):
    corpus = tmp_path / "speech.parquet"
    pq.write_table(pa.table({"ID": ["a", "b"], "duration": [1.0, 2.0], "wav": [b"RIFF", b"RIFF"]}), corpus)
    with pytest.raises(DataError, match="lacks text"):
        read_rows(str(corpus))
    assert read_rows(Source(files=str(corpus), columns=Columns(text=None))).texts.to_pylist() == ["", ""]


def test_sources_keep_their_order_weights_and_columns(tmp_path):
    for name in ("b", "a"):
        write_corpus(rows(2, name), tmp_path / f"{name}.parquet")
    pq.write_table(other_table(1), tmp_path / "o.parquet")
    other = Source(
        files=str(tmp_path / "o.parquet"),
        weight=0.5,
        columns=Columns(id=None, duration=None, text="meta.text", audio="clip"),
    )
    table = read_rows(
        [
            other,
            str(tmp_path / "b.parquet"),
            Source(files=[str(tmp_path / "[c-n]*.parquet"), str(tmp_path / "a.parquet")], weight=3),
        ]
    )
    assert table.ids.to_pylist() == ["o:0", "b0000", "b0001", "a0000", "a0001"]
    assert table.source.tolist() == [0, 1, 1, 2, 2]
    assert table.source.dtype == np.int16
    assert table.weights == [0.5, 1.0, 3.0]
    reader = RowReader(table.files)
    assert [reader.wav(table.file[row], table.row_group[row], table.row[row])[1] for row in range(5)] == [
        "o0.flac", "0.flac", "1.flac", "0.flac", "1.flac",
    ]  # fmt: skip
    assert "stands in two sources" in fault(
        [str(tmp_path / "a.parquet"), Source(files=str(tmp_path / "a.parquet"), weight=2)]
    )
    assert "no source" in fault([])


def test_metadata_is_kept_until_a_file_or_its_columns_change(tmp_path):
    write_corpus(rows(250), tmp_path / "a.parquet")
    cache = tmp_path / "cache" / "rows"
    first = read_rows(str(tmp_path), cache=cache)
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    second = read_rows(str(tmp_path), cache=cache)
    assert file.stat().st_mtime_ns == before
    assert (second.ids, second.texts) == (first.ids, first.texts)
    for name in ("duration_s", "file", "row_group", "row"):
        assert np.array_equal(getattr(second, name), getattr(first, name))
    assert read_rows(Source(files=str(tmp_path), columns=Columns(text="ID")), cache=cache).text(3) == "r0003"
    assert read_rows(str(tmp_path), cache=cache).text(3) == "TEXT 3"
    file.write_bytes(file.read_bytes()[:100])  # cut off
    assert read_rows(str(tmp_path), cache=cache).ids == first.ids
    write_corpus(rows(3, "new"), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path), cache=cache).id(0) == "new0000"


def test_given_texts_take_the_place_of_the_corpus_own(tmp_path):
    write_corpus(rows(3, "a"), tmp_path / "a.parquet")
    write_corpus(rows(2, "b"), tmp_path / "b.parquet")
    pq.write_table(
        pa.table({"ID": ["a0002", "b0000", "a0000"], "text": ["Two.", "Not b's.", None]}), tmp_path / "texts.parquet"
    )
    given = Source(files=str(tmp_path / "a.parquet"), texts=str(tmp_path / "texts.parquet"))
    assert read_rows([given, str(tmp_path / "b.parquet")]).texts.to_pylist() == ["", "", "Two.", "TEXT 0", "TEXT 1"]
    pq.write_table(pa.table({"ID": ["x"], "text": ["y"]}), tmp_path / "texts.parquet")
    assert "holds none of the corpus's IDs" in fault(given)
    pq.write_table(pa.table({"ID": ["x"]}), tmp_path / "texts.parquet")
    assert "lacks text" in fault(given)


def test_same_rows_same_bytes(tmp_path):
    digests = set()
    for name in ["one", "two"]:
        write_corpus(iter(rows(30)), tmp_path / name, rows_per_group=7)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    assert pq.read_schema(tmp_path / "one").equals(SCHEMA)
    assert pq.ParquetFile(tmp_path / "one").num_row_groups == 5


def test_columns_beyond_the_schema_and_null_texts_are_read(tmp_path):
    table = pa.Table.from_pylist([{**row, "text": None} for row in rows(4)], schema=SCHEMA).append_column(
        "lang", pa.array(["en"] * 4)
    )
    pq.write_table(table.drop_columns(["spk_id", "sex"]), tmp_path / "x.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "without rows.parquet")
    assert read_rows(str(tmp_path)).texts.to_pylist() == [""] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop_columns(["text", "wav"]), "lacks text, wav"),
        (lambda t: t.set_column(2, "wav", pa.array(["x"] * len(t))), "column wav is string"),
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
    reader = RowReader([CorpusFile(str(tmp_path / name)) for name in ("x.parquet", "gone.parquet")])
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
