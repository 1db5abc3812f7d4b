"""Tests that audio is found beside its manifest, wherever that is, and read from files, tar files and tables."""

import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.audio.clip import AudioClip, encode_flac, read_audio
from graft.data.dataset import clip_row, write_corpus
from graft.errors import AudioError
from jobs.preparation.audio_places import AudioPlace, AudioReader, file_place, location_below


@pytest.mark.parametrize(
    ("manifest", "folder", "path", "found"),
    [
        ("in/rows.jsonl", ".", "a/1.wav", "in/a/1.wav"),
        ("in/rows.jsonl", "clips", "1.wav", "in/clips/1.wav"),
        ("in/rows.jsonl", ".", "/abs/1.wav", "/abs/1.wav"),
        ("in/rows.jsonl", ".", "s3://bucket/1.wav", "s3://bucket/1.wav"),
        ("file:///data/my%20set/rows.jsonl", ".", "1.wav", "/data/my set/1.wav"),
        ("s3://bucket/set/rows.jsonl", ".", "a b/1#.wav", "s3://bucket/set/a%20b/1%23.wav"),
        ("s3://bucket/set/rows.jsonl?region=eu", "../audio", "1.wav", "s3://bucket/audio/1.wav?region=eu"),
        ("s3://bucket/set/rows.jsonl", ".", "/abs/1.wav", "/abs/1.wav"),
        ("hf://datasets/me/set@main/rows.jsonl", "clips", "a b.wav", "hf://datasets/me/set@main/clips/a b.wav"),
        ("https://me:key@host/set/rows.csv?signature=1", ".", "1.wav", "https://me:key@host/set/1.wav"),
    ],
)
def test_paths_are_relative_to_the_place_of_their_manifest(manifest, folder, path, found):
    assert location_below(manifest, path, folder=folder) == found


def test_a_place_has_the_name_of_its_file_and_hides_secrets():
    place = file_place("https://me:key@host/set/a%20b.wav?signature=1")
    assert (place.name, str(place)) == ("a b.wav", "https://host/set/a%20b.wav")
    assert file_place("hf://datasets/me/set/50%25.wav").name == "50%25.wav"
    assert str(AudioPlace("s3://key:secret@bucket/x.tar?region=eu", "1.wav", 512, 40)) == "s3://bucket/x.tar/1.wav"


def clip(number: int) -> bytes:
    return encode_flac(AudioClip(np.full(1600, number / 100, np.float32)))


def content_of(place: AudioPlace, reader: AudioReader | None = None) -> bytes:
    with (reader or AudioReader()).open(place) as file:
        assert read_audio(file).duration_s == 0.1
        file.seek(0)
        return file.read()


def test_members_of_a_tar_file_are_read_in_place(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.flac").write_bytes(clip(number))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for number in range(3):
            tar.add(tmp_path / f"{number}.flac", f"{number}.flac")
    with tarfile.open(tmp_path / "all.tar") as tar:
        members = [(member.name, member.offset_data, member.size) for member in tar]
    places = [AudioPlace(str(tmp_path / "all.tar"), *member) for member in members]
    assert [content_of(place) for place in places] == [clip(number) for number in range(3)]
    late = AudioPlace(str(tmp_path / "all.tar"), "3.flac", 10_000, 10_000)
    with pytest.raises(AudioError, match=r"all\.tar/3\.flac: its tar file ends at byte 10,240"):
        content_of(late)


def test_rows_of_parquet_and_arrow_files_are_read_in_any_order(tmp_path):
    rows = [clip_row(f"r{number}", AudioClip(np.full(1600, number / 100, np.float32)), "x") for number in range(7)]
    write_corpus(rows, tmp_path / "a.parquet", rows_per_group=3)
    table = pa.table({"audio": pa.array([{"bytes": clip(number), "path": None} for number in range(7)])})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    pq.write_table(pa.table({"flat": [clip(number) for number in range(7)]}), tmp_path / "b.parquet")
    reader = AudioReader()
    for name, column in [("a.parquet", "wav"), ("a.arrow", "audio"), ("a.arrow", "audio.bytes"), ("b.parquet", "flat")]:
        places = [AudioPlace(str(tmp_path / name), "x.flac", row=row, column=column) for row in range(8)]
        for row in (0, 1, 5, 6, 2, 2):
            assert content_of(places[row], reader) == clip(row)
        with pytest.raises(AudioError, match="has no row 7, but 7 rows"):
            content_of(places[7], reader)
    with pytest.raises(AudioError, match="row 0 holds no audio bytes in column wav"):
        content_of(AudioPlace(str(tmp_path / "a.arrow"), "x.flac", row=0, column="wav"), reader)
