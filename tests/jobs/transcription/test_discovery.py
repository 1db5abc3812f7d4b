"""Test discovery: every way to name recordings finds each of them once, under a stable name."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import soundfile

from graft.audio.chunking import ChunkSettings
from graft.audio.vad import SpeechSettings
from graft.data.dataset import write_corpus
from graft.data.settings import Columns
from graft.errors import AudioError, DataError
from graft.storage.local_paths import local_path, utf8_location
from jobs.transcription.discovery import RECORDINGS, discover, find_recordings
from jobs.transcription.reader import ItemReader, Reading
from jobs.transcription.work_items import durations, plan_items
from tests.support import media, s3, speech_corpus


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ["b.flac", "a.WAV", "sub/a.opus", "sub/deep/call.m4a", "sub/readme.md", ".cache/c.wav", "sub/._a.opus"]:
        (tmp_path / "calls" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "calls" / name).write_bytes(b"12345")
    return tmp_path / "calls"


def names(*sources: str) -> list[str]:
    return find_recordings(sources)["recording"].to_pylist()


def test_links_are_followed_but_not_round_in_circles(folder):
    more = folder.parent / "more"
    more.mkdir()
    (more / "d.wav").write_bytes(b"12345")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "self").symlink_to(".")
    (folder / "more").symlink_to(more)
    (more / "back").symlink_to(folder / "sub")
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    own = [
        "a.WAV",
        "b.flac",
        "gone.wav",  # which becomes an error
        "more/back/a.opus",
        "more/back/deep/call.m4a",
        "more/d.wav",
        "sub/a.opus",
        "sub/deep/call.m4a",
    ]
    assert names(str(folder)) == own
    assert names(f"{folder}/**/*.opus") == ["more/back/a.opus", "sub/a.opus"]


def test_a_folder_holds_the_audio_at_any_depth(folder):
    found = find_recordings([str(folder)])
    assert found.schema == RECORDINGS
    assert found["recording"].to_pylist() == ["a.WAV", "b.flac", "sub/a.opus", "sub/deep/call.m4a"]
    assert found["uri"].to_pylist() == [str(folder / name) for name in found["recording"].to_pylist()]
    assert found["size"].to_pylist() == [5] * 4
    assert found["row"].null_count == 4


def test_what_a_folder_holds_besides_is_told(folder):
    for name in ("old.AMR", "video.ts", "what?.wav", "notes.pdf", "no suffix"):
        (folder / name).write_bytes(b"12345")
    found = discover([str(folder), f"{folder}/*.pdf"])
    taken = ["a.WAV", "b.flac", "notes.pdf", "old.AMR", "sub/a.opus", "sub/deep/call.m4a", "video.ts", "what?.wav"]
    assert found.recordings["recording"].to_pylist() == taken
    assert sorted(found.skipped) == [str(folder / name) for name in ("no suffix", "notes.pdf", "sub/readme.md")]


def test_results_inside_the_folder_are_not_transcribed(folder):
    results = folder / "transcripts"
    (results / "recordings").mkdir(parents=True)
    for name in ("recordings/part-00000.parquet", "recipe.yaml", "a.wav"):
        (results / name).write_bytes(b"12345")
    for source, out in (
        (str(folder), "calls/transcripts"),
        (folder.as_uri(), str(results)),
        ("calls/", "calls/transcripts/"),
    ):
        found = discover([source], results=out)
        assert found.recordings["recording"].to_pylist() == ["a.WAV", "b.flac", "sub/a.opus", "sub/deep/call.m4a"]
        assert len(found.skipped) == 1


def test_a_name_of_any_bytes_comes_back_in_utf8_and_its_uri_tells_the_bytes(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"M\xe4rz")
    (folder / "sub").mkdir(parents=True)
    odd = [
        "line\nfeed.wav",
        "tab\t.wav",
        "🎉.wav",
        "esc\x1b[2J.wav",
        "-n.wav",
        "'\".wav",
        "%41.wav",
        "a?b#c.wav",
        "x" * 251,
    ]
    odd = [f"sub/{name}" for name in (*odd, "caf%E9.wav", " a .wav", "\u2028.wav", *map(os.fsdecode, [b"caf\xe9.wav"]))]
    for name in odd:
        (folder / name).with_suffix(".wav").write_bytes(b"12345")
    found = find_recordings([str(folder)])
    paths = [local_path(uri) for uri in found["uri"].to_pylist()]
    assert sorted(paths) == sorted(str((folder / name).with_suffix(".wav")) for name in odd)
    assert all(uri.startswith("file:///") and "M%E4rz" in uri for uri in found["uri"].to_pylist())
    by_path = dict(zip(paths, found["recording"].to_pylist(), strict=True))
    assert by_path[os.fsdecode(os.path.join(os.fsencode(folder), b"sub/caf\xe9.wav"))] == "~sub/caf%E9.wav"
    assert by_path[str(folder / "sub" / "line\nfeed.wav")] == "sub/line\nfeed.wav"
    for given in (found["uri"].to_pylist()[0], f"{utf8_location(str(folder))}/*/*.wav"):
        assert set(find_recordings([given])["uri"].to_pylist()) <= set(found["uri"].to_pylist())
    # A list has a name in each line, in the bytes of the file system, or its URI.
    (folder / "all.txt").write_bytes(b"sub/caf\xe9.wav\r\nsub/caf\xc3\xa9.wav\n" + found["uri"][0].as_py().encode())
    monkeypatch.chdir(folder)
    listed = find_recordings(["all.txt"])
    assert listed["size"].null_count == 1  # caf\xc3\xa9.wav is not there
    assert set(listed["uri"].to_pylist()) < {*found["uri"].to_pylist(), utf8_location(f"{folder}/sub/café.wav")}


def test_a_version_changes_with_the_file_and_with_nothing_else(folder):
    before = find_recordings(["calls"])["version"].to_pylist()
    assert find_recordings(["calls"])["version"].to_pylist() == before
    os.utime(folder / "b.flac", ns=(1, 1))
    after = find_recordings(["calls"])["version"].to_pylist()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True, True]


def test_files_globs_and_uris_name_the_same_files(folder):
    assert names("calls/b.flac") == names(folder.as_uri() + "/b.flac") == ["b.flac"]
    assert names("calls/sub/readme.md") == ["readme.md"]  # named itself
    assert names("calls/*/*.opus") == ["sub/a.opus"]
    assert names("calls/**/*.opus") == ["sub/a.opus"]
    assert names("calls/**/*a*") == ["a.WAV", "b.flac", "sub/a.opus", "sub/deep/call.m4a", "sub/readme.md"]
    assert names("calls", "calls/b.flac", str(folder)) == names("calls")


def test_a_bucket_is_an_archive(tmp_path):
    """A recording there is found, probed for its length, cut into items and read by ranges."""
    (tmp_path / "calls" / "may").mkdir(parents=True)
    soundfile.write(tmp_path / "calls" / "may" / "a b.wav", media.speech(16_000, seconds=25.0, channels=1), 16_000)
    shutil.copy(media.PROMPTS[0], tmp_path / "calls" / "c.flac")
    with s3.serve(tmp_path / "calls", "archive/calls") as address:
        there = f"?endpoint_override={address}&scheme=http"
        found = find_recordings([f"s3://archive/calls{there}"])
        assert found["recording"].to_pylist() == ["c.flac", "may/a b.wav"]
        assert (
            find_recordings([f"s3://archive/calls/**/*.wav{there}"])["uri"].to_pylist() == found["uri"].to_pylist()[1:]
        )
        items = plan_items(found, item_s=12.0, probe=durations)
        assert items["item_count"].to_pylist() == [1, 2, 2]
        reading = Reading(SpeechSettings(detector="energy"), ChunkSettings(skip_silence=False))
        table = pa.concat_tables(ItemReader(reading)(items))
    assert table["error"].to_pylist() == [None] * 3
    assert sum(table["duration_s"].to_pylist()[1:]) == pytest.approx(25.0)


def test_a_list_names_places_relative_to_its_own_folder(folder):
    (folder / "all.txt").write_text(f"# calls of May\nb.flac\n\nsub/a.opus\n{folder}/sub/deep/call.m4a\nsub/gone.mp3\n")
    found = find_recordings(["calls/all.txt"])
    assert found["recording"].to_pylist() == ["b.flac", "sub/a.opus", "sub/deep/call.m4a", "sub/gone.mp3"]
    assert found["uri"].to_pylist() == [str(folder / name) for name in found["recording"].to_pylist()]
    assert found["size"].to_pylist() == [5, 5, 5, None]
    (folder / "bad.lst").write_bytes("a.wav\nb.wav".encode("utf-16"))
    with pytest.raises(DataError, match=r"bad.lst: a list holds a path or URI in each line: byte 3 is zero"):
        names("calls/bad.lst")
    with pytest.raises(AudioError, match=r"none.txt: No such file"):
        names("calls/none.txt")


def test_parquet_rows_are_recordings(folder):
    seconds = [0.5, 1.0, 1.5]
    rows = [
        speech_corpus.row(
            f"talk {place}", place, duration=length, wav={"bytes": speech_corpus.flac(length), "path": ""}
        )
        for place, length in enumerate(seconds)
    ]
    corpus = folder / "talks.parquet"
    write_corpus(rows, corpus, rows_per_group=2)
    found = find_recordings([str(corpus)])
    assert found["recording"].to_pylist() == ["talk 0", "talk 1", "talk 2"]
    assert found["row_group"].to_pylist() == [0, 0, 1]
    assert found["row"].to_pylist() == [0, 1, 0]
    assert found["duration_s"].to_pylist() == seconds
    assert len(find_recordings([str(folder)])) == 4 + 3
    with pytest.raises(DataError, match=r"lacks sound, has ID.*: say under `columns`"):
        find_recordings([str(corpus)], Columns(audio="sound"))


def test_rows_come_as_they_stand_in_their_files_whatever_they_are_called(folder):
    """Each row group is then read once, not once for each of its rows."""
    for file, names in {"x": "dbca", "w": "hefg"}.items():
        rows = [
            speech_corpus.row(name, 0, duration=0.5, wav={"bytes": speech_corpus.flac(0.5), "path": ""})
            for name in names
        ]
        write_corpus(rows, folder / f"{file}.parquet", rows_per_group=2)
    found = find_recordings([str(folder), f"{folder}/x.parquet"])
    assert found["recording"].to_pylist() == ["a.WAV", "b.flac", "sub/a.opus", "sub/deep/call.m4a", *"hefg", *"dbca"]
    assert found["row_group"].to_pylist()[4:] == [0, 0, 1, 1] * 2


def test_two_recordings_never_share_a_name(folder):
    (folder.parent / "more").mkdir()
    (folder.parent / "more" / "b.flac").touch()
    with pytest.raises(DataError, match=r"calls/b.flac and .*more/b.flac would both be called b.flac"):
        names("calls", "more")


def test_what_is_missing_is_a_recording_or_an_error(folder):
    missing = find_recordings(["gone/a.wav", "s3-like.mp3"])
    assert missing["recording"].to_pylist() == ["a.wav", "s3-like.mp3"]
    assert missing["uri"].to_pylist() == [str(folder.parent / "gone" / "a.wav"), str(folder.parent / "s3-like.mp3")]
    with pytest.raises(DataError, match="nowhere"):
        names("nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no audio in calls/empty: give audio or video files by name, or "):
        names("calls/empty")
