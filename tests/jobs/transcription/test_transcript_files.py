"""Test the files of transcripts: each recording has its own, inside the folder, and none outlives its recording."""

import os
import re
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graft.errors import OutputError
from graft.inference.subtitles import Format
from jobs.transcription.assembly import done_recordings
from jobs.transcription.transcript_files import (
    LIST_FILE,
    file_stem,
    file_stems,
    listed_files,
    remember_files,
    remove_other_files,
    write_transcript_file,
)

NONE = pa.table({"stem": pa.array([], pa.string()), "recording_id": pa.array([], pa.string())})
HOSTILE = [
    *(
        "/data/calls/1.wav",
        "data/calls/1.wav",
        "../x.wav",
        "x.wav",
        "a/../../b",
        "b",
        "C:\\x",
        "..",
        ".",
        "",
        "/",
        "//",
    ),
    *("a.", "a", "a..", "line\nfeed.wav", "line_feed.wav", "\udcff.wav", "a/./b", "a//b", "a/b", "\0", "ü" * 126),
    *("x" * 220, "x" * 221, "x" * 255, "y/" * 600 + "z", "y/" * 601 + "z", "call.wav", "call.mp3", "call.wav.flac"),
    *("call", "call.wav.srt/a.wav", "call.wav.srt_/a.wav", "call.wav.SRT/a.wav", file_stem("../x.wav")),
]


@pytest.mark.parametrize(
    ("recording", "stem"),
    [
        *((name, name) for name in ("a.wav", "sub/deep/call.m4a", "talk 0", "2026-01-01T10:00:00 é 🎉.wav", "x" * 220)),
        ("/data/calls/1.wav", r"data/calls/1.wav~\w{12}"),
        ("../x.wav", r"_/x.wav~\w{12}"),
        ("C:\\x", r"C:_x~\w{12}"),
        ("line\nfeed.wav", r"line_feed.wav~\w{12}"),
        ("é" * 200 + ".wav", r"é{110}~\w{12}"),
    ],
)
def test_names_are_kept_and_mended_only_where_something_is_wrong(recording, stem):
    assert re.fullmatch(stem, file_stem(recording))


def test_every_recording_has_a_file_of_its_own_inside_the_folder(tmp_path):
    """Files are written for real, which also shows that no file is in the way of a folder and no name too long."""
    folder = tmp_path / "out" / "files"
    for number, name in enumerate(HOSTILE):
        write_transcript_file(folder, file_stem(name), "srt", str(number))
        write_transcript_file(folder, file_stem(name), "json", str(number))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2 * len(HOSTILE)
    assert all(path.is_relative_to(folder) for path in written)
    assert sorted(int(path.read_text()) for path in written if path.suffix == ".srt") == list(range(len(HOSTILE)))
    names = pa.chunked_array([[name for name in HOSTILE if name.isascii()]] * 2)
    assert file_stems(names).to_pylist() == [file_stem(name) for name in names.to_pylist()]


PARTS = st.text(st.sampled_from("a./\\~\n\0\udcff€🎉_"), max_size=8) | st.sampled_from(["..", "/", ".srt", "ab" * 200])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(PARTS, max_size=6).map("".join), min_size=2, max_size=8, unique=True))
@example(["../x.wav", file_stem("../x.wav")])
def test_different_names_have_different_files(names):
    files = [f"{file_stem(name)}.srt" for name in names]
    assert len(set(files)) == len(files)
    for file in files:
        assert os.path.normpath(file) == file
        assert not file.startswith(("/", "../"))
        assert all(0 < len(part.encode()) <= 255 for part in file.split("/"))
        assert file.isprintable()
        assert not any(other.startswith(f"{file}/") for other in files)


ONE_NAME = [
    *(["Call.wav", "call.wav", "CALL.WAV"], ["a/Straße.mp3", "A/STRASSE.mp3"], ["ÉTÉ.wav", "e\u0301te\u0301.wav"]),
    *(["caf\u00e9.wav", "cafe\u0301.wav"], ["σς.wav", "ΣΣ.wav"], ["\u212b.wav", "\u00e5.wav"]),
]
"""Names that are one to file systems which know neither case nor normal forms of Unicode, as macOS' and Windows'."""


@pytest.mark.parametrize("names", ONE_NAME)
def test_names_that_differ_only_by_case_or_normal_form_have_files_of_their_own(names):
    others = ["b.wav", *names, "c.wav"]
    stems = file_stems(pa.chunked_array([others])).to_pylist()
    assert file_stems(pa.chunked_array([others, names])).to_pylist() == [*stems, *stems[1:-1]]
    first, *marked = stems[1:-1]
    assert (stems[0], first, stems[-1]) == ("b.wav", names[0], "c.wav")
    assert [stem.rpartition("~")[0] for stem in marked] == names[1:]
    seen = {unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).upper()).lower() for stem in stems}
    assert len(seen) == len(others)
    # The one that has a file keeps its name, also when one comes that stands before it.
    written = pa.table({"file": [f"{names[1]}.srt"], "recording_id": ["x"]})
    stems = file_stems(pa.chunked_array([names]), written).to_pylist()
    assert stems[1] == names[1]
    assert re.fullmatch(rf"{names[0]}~\w{{12}}", stems[0])


def test_a_recording_keeps_its_file_when_one_comes_that_differs_by_case(tmp_path):
    assert run_once(tmp_path, ("txt",), call="1") == ["call.txt"]
    stems = file_stems(pa.chunked_array([["Call", "call"]]), listed_files(tmp_path)).to_pylist()
    assert stems[1] == "call"
    assert run_once(tmp_path, ("txt",), **dict.fromkeys(stems, "1")) == sorted(f"{stem}.txt" for stem in stems)
    # A file that was called otherwise goes, but not where it is another name of one that was just written.
    (tmp_path / "files" / "CALL.txt").hardlink_to(tmp_path / "files" / "call.txt")
    listed = listed_files(tmp_path)
    for old in ("CALL.txt", "gone.txt"):
        (tmp_path / "files" / old).touch()
        listed = pa.concat_tables([listed, pa.table({"file": [old], "recording_id": ["call-1"]})])
    done = recordings({"call": "1"})
    remove_other_files(tmp_path, tmp_path / "files", listed, done, ("txt",))
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["CALL.txt", "call.txt"]


def test_a_link_never_leads_a_transcript_out(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "sub").symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"files/sub/a.txt leads out of .*files: remove the link"):
        write_transcript_file(tmp_path / "files", "sub/a", "txt", "text")
    (tmp_path / "files" / "b").write_text("a file of the user")
    with pytest.raises(OutputError, match=r"files/b/a.txt cannot be written: .*: mend that, then run the same command"):
        write_transcript_file(tmp_path / "files", "b/a", "txt", "text")
    assert not (tmp_path / "a.txt").exists()


def recordings(versions: dict[str, str | None]) -> pa.Table:
    """List the recordings that are done, by their names and versions; that of one that failed is None."""
    done = {name.replace("__", "/"): version for name, version in versions.items() if version}
    ids = [f"{name}-{version}" for name, version in done.items()]
    return pa.table({"stem": pa.array(done, pa.string()), "recording_id": pa.array(ids, pa.string())})


def run_once(home: Path, formats: tuple[Format, ...], before: pa.Table = NONE, **versions: str | None) -> list[str]:
    """Write the files of recordings; returns what is in files/ afterwards.

    `before` are those that the run before this one had in its plan, where that did not come to its end.
    """
    folder, done = home / "files", recordings(versions)
    earlier = remember_files(home, before, formats)
    for stem, recording_id in zip(*(column.to_pylist() for column in done.columns), strict=True):
        for form in formats:
            write_transcript_file(folder, stem, form, recording_id.rpartition("-")[2])
    remove_other_files(home, folder, earlier, done, formats)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_follow_the_recordings(tmp_path):
    assert run_once(tmp_path, ("txt",), a="1", sub__b="1", c="1") == ["a.txt", "c.txt", "sub/b.txt"]
    (tmp_path / "files" / "mine.txt").write_text("a note of the user")
    # a has changed and now fails, b is gone with its folder, and d has come.
    assert run_once(tmp_path, ("txt",), a=None, c="1", d="1") == ["c.txt", "d.txt", "mine.txt"]
    assert not (tmp_path / "files" / "sub").exists()
    # Files in another format stay, unless their recording is another one now.
    assert run_once(tmp_path, ("srt",), c="1", d="2") == ["c.srt", "c.txt", "d.srt", "mine.txt"]
    assert (tmp_path / "files" / "d.srt").read_text() == "2"
    assert run_once(tmp_path, ("srt",)) == ["mine.txt"]
    # What the user writes under the name of a failed recording is the user's.
    (tmp_path / "files" / "a.txt").write_text("typed by hand")
    assert run_once(tmp_path, ("txt",), a=None) == ["a.txt", "mine.txt"]


def test_what_a_run_that_was_killed_has_written_is_known_to_the_next_one(tmp_path):
    assert run_once(tmp_path, ("txt",), b="1") == ["b.txt"]
    remember_files(tmp_path, NONE, ("txt", "srt"))
    for name in ("c.txt", "c.srt", "d.txt", "d.srt"):
        (tmp_path / "files" / name).write_text("of a run that was killed")
    (tmp_path / "files" / "e.txt").write_text("typed by hand")  # e was in its plan, but not transcribed
    before = recordings({"b": "1", "c": "1", "d": "1"})
    assert run_once(tmp_path, ("txt",), before, b="1", d="1") == ["b.txt", "d.srt", "d.txt", "e.txt"]
    assert run_once(tmp_path, ("txt",), before, b="1", e=None) == ["b.txt", "e.txt"]
    # A list that is lost names no files: nobody knows whose they are.
    (tmp_path / LIST_FILE).unlink()
    assert run_once(tmp_path, ("txt",), d="1") == ["b.txt", "d.txt", "e.txt"]


def test_a_file_that_is_as_it_should_be_is_left_alone(tmp_path):
    write_transcript_file(tmp_path, "a", "txt", "text")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    write_transcript_file(tmp_path, "a", "txt", "text")
    assert (tmp_path / "a.txt").stat().st_mtime_ns == 1
    write_transcript_file(tmp_path, "a", "txt", "other")
    assert (tmp_path / "a.txt").read_text() == "other"


def test_a_recording_is_done_when_all_of_its_items_are_and_none_failed():
    plan = pa.table(
        {
            "stem": ["a", "a", "b", "c", "d", "d"],
            "item": ["x-0", "x-1", "y-0", "z-0", "w-0", "w-1"],
            "id": ["x-0", "x-1~1", "y-0", "z-0~2", "w-0", "w-1"],
            "index": [0, 1, 0, 0, 0, 1],
        }
    )
    ids = ["z-0~2", "y-0", "x-1", "x-1~1", "x-0", "w-0"]
    index = pa.table({"id": ids, "failed": [False, False, False, True, False, False]})
    assert done_recordings(plan, index).to_pydict() == {"stem": ["b", "c"], "recording_id": ["y", "z"]}
