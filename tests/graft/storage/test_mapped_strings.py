"""Strings in a mapped file are those that were added."""

import gc
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from graft.errors import DataError
from graft.storage.mapped_strings import HELD_BYTES, MappedStrings

SOME = pa.array(["a", "", "éx", "long one"], pa.large_string())


def test_chunks_and_slices_become_one_array():
    strings = MappedStrings()
    for part in (SOME, SOME[:0], pa.chunked_array([SOME[2:], SOME[1:3]])):
        strings.add(part)
    array = strings.array()
    array.validate(full=True)
    assert array.to_pylist() == ["a", "", "éx", "long one", "éx", "long one", "", "éx"]
    assert MappedStrings().array().to_pylist() == []


def test_a_full_temporary_folder_is_named(monkeypatch):
    monkeypatch.setattr("graft.storage.mapped_strings.HELD_BYTES", 1)
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda size: full)
        with pytest.raises(DataError, match=r"cannot hold the corpus's ids and texts \(No space left on device\)"):
            MappedStrings().add(SOME)


@pytest.mark.seconds
def test_many_strings_take_no_memory_and_outlive_their_file():
    strings, long = MappedStrings(), "ü" * 2**19
    count = HELD_BYTES // 2**20 + 4
    before = pa.total_allocated_bytes()
    for number in range(count):
        strings.add(pa.array([long, str(number)], pa.large_string()))
    array = strings.array()
    del strings
    gc.collect()
    assert array.nbytes > HELD_BYTES
    assert pa.total_allocated_bytes() - before < 2**20
    assert (array[0].as_py() == long, array[2 * count - 1].as_py()) == (True, str(count - 1))
    buffers: list[pickle.PickleBuffer] = []
    inline = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    assert len(inline) < 1000
    assert pickle.loads(inline, buffers=buffers).equals(array)
