"""Read corpora from a hub, an S3 server and a web server on loopback ports, with the faults of a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graft.data.dataset import RowReader, read_rows, write_corpus
from graft.errors import DataError
from graft.storage import locations
from graft.storage.locations import list_parquet_files, redact_uri
from tests.support import hub_server, s3

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("train-0.parquet", "train-1 of 2.parquet")

# This runs in its own process, because the hub's client reads its settings on import, and tests set HF_HUB_OFFLINE=1.
READ = """
import hashlib, json, sys
from graft.data.dataset import RowReader, read_rows
from graft.errors import DataError
answers = []
for place in sys.argv[3:]:
    try:
        rows = read_rows(place, cache=sys.argv[2])
        reader = RowReader(rows.files)
        chosen = range(len(rows)) if sys.argv[1] == "all" else json.loads(sys.argv[1])
        files = [reader.wav(rows.file[row], rows.row_group[row], rows.row[row]) for row in chosen]
        audio = [[hashlib.sha256(content).hexdigest(), name] for content, name in files]
        columns = [rows.ids.to_pylist(), rows.texts.to_pylist(), rows.duration_s.tolist()]
        answers.append([[file.uri for file in rows.files], *columns, audio])
    except DataError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write two files with 600 kB of audio in three row groups each."""
    folder = tmp_path_factory.mktemp("hub") / "speech" / "clips" / COMMIT / "large"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for part, name in enumerate(FILES):
        rows = [
            {
                "ID": f"r{part}-{index}",
                "duration": 1 + index / 4,
                "wav": {"bytes": noise.bytes(10_000), "path": f"{index}.wav"},
                "spk_id": None,
                "sex": None,
                "text": f"TEXT {index}",
            }
            for index in range(60)
        ]
        write_corpus(rows, folder / name, rows_per_group=20)
    (folder / "README.md").write_text("no parquet")
    return folder


@pytest.fixture
def hub(folder) -> Iterator[hub_server.Hub]:
    with hub_server.serve(folder.parents[3]) as hub:
        hub.branches["v1"] = COMMIT
        yield hub


def content(place: str | list[str]) -> list:
    """Read everything in a corpus as READ prints it, without the URIs of its files."""
    rows = read_rows(place)
    reader = RowReader(rows.files)
    files = [reader.wav(rows.file[row], rows.row_group[row], rows.row[row]) for row in range(len(rows))]
    audio = [[hashlib.sha256(data).hexdigest(), name] for data, name in files]
    return [rows.ids.to_pylist(), rows.texts.to_pylist(), rows.duration_s.tolist(), audio]


def from_hub(hub: hub_server.Hub, *places: str, chosen: str = "all", cache: object = "", **environment: str) -> list:
    clean = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", READ, chosen, str(cache), *places], env=clean, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def audio_ranges(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Find the byte range of each row group's audio in each file."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for name in FILES:
        footer = pq.read_metadata(folder / name)
        for group in range(footer.num_row_groups):
            columns = [footer.row_group(group).column(column) for column in range(footer.num_columns)]
            (chunk,) = [column for column in columns if column.path_in_schema == "wav.bytes"]
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            ranges.setdefault(name, []).append((start, start + chunk.total_compressed_size))
    return ranges


def overlap(sent: tuple[str, int, int], start: int, end: int) -> int:
    return max(0, min(end, sent[2]) - max(start, sent[1]))


@pytest.mark.processes
def test_the_hub_gives_the_same_rows_through_faults_that_pass(folder, hub):
    hub.faults.update(info=["503"], list=["503", "drop"], data=["503", "drop", "cut", "short"])
    ((files, *rows),) = from_hub(hub, "hf://datasets/speech/clips@v1/large")
    assert rows == content(str(folder))
    # The URIs hold the commit, so they stay the same when v1 moves.
    assert files == [f"hf://datasets/speech/clips@{COMMIT}/large/{name}" for name in FILES]
    assert not any(hub.faults.values())


@pytest.mark.processes
def test_a_second_planning_reads_nothing_where_the_first_is_kept(folder, hub, tmp_path):
    first = from_hub(hub, "hf://datasets/speech/clips@v1/large", chosen="[]", cache=tmp_path)
    assert hub.sent
    hub.sent.clear()
    assert from_hub(hub, "hf://datasets/speech/clips@v1/large", chosen="[]", cache=tmp_path) == first
    assert hub.sent == []


@pytest.mark.processes
def test_planning_reads_no_audio_and_reading_one_row_only_its_row_group(folder, hub):
    ranges = audio_ranges(folder)
    from_hub(hub, "hf://datasets/speech/clips@v1/*/train-?*.parquet", chosen="[]")
    tails = [sent for sent in hub.sent if sent[2] == (folder / sent[0]).stat().st_size]
    assert sorted({name for name, _, _ in tails}) == sorted(FILES)
    assert sum(end - start for _, start, end in tails) <= 2 * 65_536  # Arrow first reads this much for a footer.
    others = [sent for sent in hub.sent if sent not in tails]
    assert others
    assert not any(overlap(sent, *audio) for sent in others for audio in ranges[sent[0]])
    assert sum(end - start for _, start, end in others) < 10_000
    planned = len(hub.sent)
    from_hub(
        hub, "hf://datasets/speech/clips@v1/large", chosen="[25, 39]"
    )  # Both are in the first file's second row group.
    read = [sent for sent in hub.sent[2 * planned :] if sent not in tails]
    assert [sum(overlap(sent, *audio) for sent in read if sent[0] == FILES[0]) for audio in ranges[FILES[0]]][::2] == [
        0,
        0,
    ]
    assert sum(overlap(sent, *ranges[FILES[0]][1]) for sent in read) == ranges[FILES[0]][1][1] - ranges[FILES[0]][1][0]
    assert {sent[0] for sent in read} == {FILES[0]}


@pytest.mark.processes
def test_lasting_faults_of_the_hub_are_one_line(hub):
    hub.faults.update(data=["403"])
    places = ["@v1/large/train-0.parquet", "@v2/large", "@v1/small", "@v1/large/none-*.parquet"]
    forbidden, *missing, empty = from_hub(hub, *(f"hf://datasets/speech/clips{place}" for place in places))
    assert forbidden.startswith(f"hf://datasets/speech/clips@{COMMIT}/large/train-0.parquet: 403 Forbidden")
    assert [message.partition(": ")[2][:25] for message in missing] == ["no such file or folder (a"] * 2
    assert "no *.parquet file found there" in empty
    (malformed,) = from_hub(hub, "hf://clips")
    assert "wants hf://datasets/OWNER/NAME" in malformed
    (offline,) = from_hub(hub, "hf://datasets/speech/clips@v1/large", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in offline
    assert not any("\n" in message for message in (forbidden, *missing, empty, malformed, offline))


def test_a_file_of_a_web_server_gives_the_same_rows(folder, hub):
    places = [f"{hub.url}/files/speech/clips/{COMMIT}/large/{name.replace(' ', '%20')}?token=secret" for name in FILES]
    assert content(places) == content(str(folder))
    with pytest.raises(DataError) as caught:
        read_rows(places[0].replace("train", "none"))
    assert str(caught.value) == f"{hub.url}/files/speech/clips/{COMMIT}/large/none-0.parquet: no such file or folder"


def test_arrow_reads_python_files_in_the_callers_thread_alone(folder, hub, monkeypatch):
    """Arrow's own threads would drop the Python object late, which may abort the process at the interpreter's end."""
    threads = []
    fetch = locations._ExactCache._fetch
    monkeypatch.setattr(
        locations._ExactCache, "_fetch", lambda *args: threads.append(threading.get_ident()) or fetch(*args)
    )
    with locations.open_parquet(f"{hub.url}/files/speech/clips/{COMMIT}/large/{FILES[0]}") as parquet:
        assert len(parquet.read_row_groups([0, 1, 2], columns=["ID", "text"])) == 60
        assert len(parquet.read_row_groups([1], columns=["wav.bytes", "wav.path"])) == 20
    assert set(threads) == {threading.get_ident()}
    assert len(hub.sent) == 6  # footer, the first ID, twice the text and the next ID, the last text, audio and its path


@pytest.mark.seconds
def test_planning_and_reading_are_tried_again_but_not_for_ever(folder, hub, monkeypatch):
    place = f"{hub.url}/files/speech/clips/{COMMIT}/large/{FILES[0]}"
    hub.faults.update(data=["503", "drop", "cut"])
    rows = read_rows(place)
    for fault in ("503", "drop", "cut", "short"):
        hub.faults.update(data=["", fault])  # the first request asks for the file's size
        assert len(RowReader(rows.files).wav(0, 1, 5)[0]) == 10_000
        assert not hub.faults["data"]
    monkeypatch.setattr("graft.storage.locations.RETRY_WAITS_S", (0.01, 0.01))
    for tried, fault in [(3, "503"), (1, "403")]:
        hub.faults.update(data=[fault] * 99)
        hub.kinds.clear()
        with pytest.raises(DataError, match=f"{FILES[0]}: .*{fault}"):
            RowReader(rows.files).wav(0, 1, 5)
        assert len(hub.kinds) == tried * 2  # each try asks for the size in two ways


@pytest.fixture
def bucket(folder) -> Iterator[str]:
    """Serve the corpus by an S3 server; yields its address."""
    with s3.serve(folder, "clips/large") as address:
        yield address


def test_s3_gives_the_same_rows(folder, bucket, monkeypatch):
    here = f"?endpoint_override={bucket}&scheme=http"
    expected = content(str(folder))
    assert content(f"s3://clips/large{here}") == expected
    assert content(f"s3://key:secret@clips/*/train-*.parquet{here}") == expected
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{bucket}")
    assert content("s3://clips/large?region=us-east-1") == expected
    for place, words in [
        (f"s3://key:secret@clips/small{here}", "s3://clips/small: no such file or folder"),
        (
            f"s3://key:secret@clips/large/x*.parquet{here}",
            "corpus s3://clips/large/x*.parquet: no *.parquet file found there",
        ),
        ("s3://key:secret@clips/large?nonsense=1", "s3://clips/large: not a location"),
    ]:
        with pytest.raises(DataError) as caught:
            read_rows(place)
        assert str(caught.value).startswith(words)


def test_messages_hold_no_secret():
    for place in [
        "s3://key:se/cret@b/k",
        "s3://key:se cret@b/k?region=x",
        "odd://key:secret@b/k",
        "s3://key:secret@b/k?odd=cret",
    ]:
        with pytest.raises(DataError) as caught:
            list_parquet_files([place])
        assert "cret" not in str(caught.value).replace("user or secret", "")
        assert "key" not in str(caught.value)
    assert redact_uri("hf://datasets/a/b@v1/c") == "hf://datasets/a/b@v1/c"
    assert redact_uri("/a@b/c?d") == "/a@b/c?d"
