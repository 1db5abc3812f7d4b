"""Test jobs.transcribe on files with hostile names: each is transcribed or an error, and the terminal stays whole."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.storage.local_paths import local_path
from jobs.transcription.discovery import find_recordings
from tests.support import media, speech_corpus, tiny_models
from tests.support.jobs import transcribe

NAMES = [
    *(b"caf\xe9.wav", b"line\nfeed.wav", b"tab\t.wav", b"\x1b]0;title\x07.wav", b"\x1b[2Jgraft: all is well.wav"),
    *("🎉.wav".encode(), b"x" * 216 + b".wav", b"y" * 251 + b".wav", b"-dash.wav", b"'quotes\".wav", b"caf%E9.wav"),
    *("\u2028\x85.wav".encode(), "\u202egpj.wav".encode(), b" .wav", b"#.wav", b"a=b.wav", b"model=c.wav", b"[0].wav"),
]
BROKEN = [b"\xffbroken.wav", b"broken\n\x1b[31m.wav"]
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("names") / "tiny")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "calls"
    root.mkdir()
    for name in NAMES:
        shutil.copy(media.SHORTEST_FIRST[0], os.path.join(os.fsencode(root), name))
    for name in BROKEN:
        Path(os.fsdecode(os.path.join(os.fsencode(root), name))).write_bytes(b"no audio")
    monkeypatch.chdir(root)
    return root


@pytest.mark.seconds
def test_in_this_process(folder: Path, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [*NAMES[:3], NAMES[4], BROKEN[1], NAMES[6]]
    assert transcribe(*map(os.fsdecode, names), f"model={folder}") == 0
    printed = capsys.readouterr()
    starts = ["caf%E9.wav: ", "line\\nfeed.wav: ", "tab\\t.wav: ", "\\x1b[2Jgraft: all is well.wav: ", "xxx"]
    for line, start in zip(printed.out.splitlines(), starts, strict=True):
        assert line.startswith(start)
    assert "\ngraft: broken\\n\\x1b[31m.wav: not readable as audio" in printed.err
    assert not CONTROLS.search(printed.err)
    for name in NAMES:
        assert transcribe(f"./{os.fsdecode(name)}", f"model={folder}") == 0
    capsys.readouterr()
    assert transcribe("-dash.wav", f"model={folder}") == 2
    assert "(the file is ./-dash.wav)" in capsys.readouterr().err
    assert transcribe(os.fsdecode(b"gone\xe9\x1b.wav"), f"model={folder}") == 2
    error = capsys.readouterr().err
    assert error.startswith("graft: error: no such file or folder: audio=file:///")
    assert error.count("\n") == 1
    assert not CONTROLS.search(error)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_started")
def test_an_archive(folder: Path, calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wav = {"bytes": speech_corpus.flac(0.5), "path": ""}
    rows = [speech_corpus.row("%d", number, duration=0.5, wav=wav) for number in range(2)]
    ids = pa.array([b"row \xff", b"row\n\x1b[2J"]).cast(pa.binary())
    corpus = pa.Table.from_pylist(rows).drop_columns(["ID"]).append_column("ID", ids)
    pq.write_table(corpus, calls / "corpus.parquet")
    (calls / "notes\x1b[2J.\x1b[2J").write_text("no audio")
    out = tmp_path / "out"
    assert transcribe(f"model={folder}", f"audio={calls}", f"out={out}") == 0
    printed = capsys.readouterr()
    assert not CONTROLS.search(printed.out + printed.err), printed
    found = [row for part in (out / "recordings").iterdir() for row in pq.read_table(part).to_pylist()]
    files = {os.fsencode(local_path(row["uri"]) or ""): row for row in found if not row["uri"].endswith(".parquet")}
    assert files.keys() == {os.path.join(os.fsencode(calls), name) for name in (*NAMES, *BROKEN)}
    assert {os.path.basename(path) for path, row in files.items() if row["error"]} == set(BROKEN)
    assert {row["id"] for row in found if row["uri"].endswith(".parquet")} == {"row%20%FF", "row\n\x1b[2J"}
    texts = [path.read_text().strip() for path in (out / "files").rglob("*.txt")]
    assert len(texts) == len(NAMES) + 2
    assert len(list(filter(None, texts))) == len(NAMES)
    for name, count in (("errors.jsonl", len(BROKEN)), ("skipped.jsonl", 1)):
        lines = (out / name).read_bytes().decode().splitlines()
        assert len([json.loads(line) for line in lines]) == count
    assert transcribe(f"model={folder}", f"audio={calls}", f"out={out}") == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert len(find_recordings([str(calls)])) == len(found)
