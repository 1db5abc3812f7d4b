"""Tests that audio files are fetched and decoded once, on Ray as in one process, and that a bad one costs its rows."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from graft.audio import decoding
from graft.data.dataset import RowReader, read_rows
from jobs.preparation.clip_tasks import BATCH_ROWS, ReadingProgress, check_batch, read_all_clips
from jobs.preparation.clips import ClipChecker, ClipLimits
from jobs.preparation.manifests import DroppedLine, Row, read_manifests
from jobs.preparation.recipe import Manifest
from jobs.prepare import PrepareRecipe, run
from jobs.transcription.tasks import RayTasks, TasksHere
from tests.support import hub_server, media, s3

LIMITS = ClipLimits(0.1, 30.0, 40.0)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def parts(name: str, starts: list[float], length_s: float = 1.5) -> list[dict]:
    return [
        {"audio_filepath": name, "offset": start, "duration": length_s, "text": f"part of {name} at {start}"}
        for start in starts
    ]


def rows_of(place: str) -> list[Row]:
    rows = list(read_manifests([Manifest(manifest=place)]))
    assert not any(isinstance(row, DroppedLine) for row in rows)
    return [row for row in rows if isinstance(row, Row)]


def check(rows: list[Row], folder: Path) -> list[Row | DroppedLine]:
    """Read the clips of rows in this process; copies go to `folder`."""
    folder.mkdir(exist_ok=True)
    return read_all_clips(
        rows, ClipChecker(LIMITS, folder, os.getcwd()), TasksHere(check_batch), 1, ReadingProgress(len(rows))
    )


def samples_of(row: Row) -> np.ndarray:
    assert row.copy
    start, size = row.copy.start, row.copy.size
    return soundfile.read(io.BytesIO(Path(row.copy.uri).read_bytes()[start : start + (size or 0)]), dtype="float32")[0]


@pytest.mark.parametrize(("codec", "kind", "name"), [("libmp3lame", "mp3", "talk.mp3"), ("aac", "ipod", "talk.m4a")])
def test_overlapping_parts_in_any_order_are_cut_in_one_pass(tmp_path, monkeypatch, codec, kind, name):
    (tmp_path / name).write_bytes(media.encode(media.speech(44_100, seconds=20), 44_100, codec, kind))
    passes = Counter[str]()
    decode = decoding.OpenAudio.frames

    def counted(audio, *arguments, **more):
        passes[audio.name] += 1
        return decode(audio, *arguments, **more)

    monkeypatch.setattr(decoding.OpenAudio, "frames", counted)
    starts = [7.0, 0.0, 12.25, 1.0, 7.5, 18.0, 12.0]
    found = check(rows_of(manifest(tmp_path / "nemo.json", parts(name, starts))), tmp_path / "copies")
    assert passes == {str(tmp_path / name): 1}
    with decoding.open_audio(tmp_path / name) as audio:
        whole = np.concatenate(list(decode(audio)))
    assert {row.id for row in found} == {f"{name}@{start}" for start in starts}
    for row in found:
        start = round(row.offset_s * 44_100)
        assert np.abs(samples_of(row) - whole[start : start + 66_150]).max() <= 2**-16


def test_far_parts_of_a_file_that_can_be_sought_are_reached_by_seeks(tmp_path):
    """What lies behind a damage is cut, too."""
    noise = np.random.default_rng(0).integers(-20_000, 20_000, 60 * 16_000).astype(np.int16)
    soundfile.write(tmp_path / "talk.flac", noise, 16_000)
    content = bytearray((tmp_path / "talk.flac").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2_000] = bytes(2_000)
    (tmp_path / "talk.flac").write_bytes(content)
    lines = parts("talk.flac", [0, 2, 28.5, 29.5, 31, 33, 50])
    found = check(rows_of(manifest(tmp_path / "nemo.json", lines)), tmp_path / "copies")
    kept = {row.offset_s: row for row in found if isinstance(row, Row)}
    assert set(kept) >= {0, 2, 33, 50}
    assert 29.5 not in kept
    for start, row in kept.items():
        assert np.array_equal(samples_of(row), noise[int(start * 16_000) :][:24_000] / np.float32(2**15))


def test_a_file_on_a_network_is_fetched_once_however_many_rows_it_has(tmp_path):
    home = tmp_path / "speech" / "talks" / "main"
    home.mkdir(parents=True)
    soundfile.write(home / "talk.wav", media.speech(44_100, seconds=20), 44_100)
    size = (home / "talk.wav").stat().st_size
    assert size > 3 * 2**20
    manifest(home / "nemo.json", parts("talk.wav", [float(start) for start in range(0, 18, 2)]))
    with hub_server.serve(tmp_path) as hub:
        rows = rows_of(f"{hub.url}/files/speech/talks/main/nemo.json")
        hub.sent.clear()
        found = check(rows, tmp_path / "copies")
        assert len(found) == 9
        assert all(isinstance(row, Row) for row in found)
        assert hub.bytes_sent() <= size + 1  # its length is asked for by the first byte or by HEAD


def test_what_does_not_answer_is_tried_again_at_the_end_and_then_dropped_by_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr("graft.storage.locations.RETRY_WAITS_S", (0.01,))
    home = tmp_path / "speech" / "talks" / "main"
    home.mkdir(parents=True)
    for name in ("a", "b"):
        soundfile.write(home / f"{name}.wav", media.speech(16_000, seconds=1.0, channels=1), 16_000)
    lines = [{"id": name, "audio": f"{name}.wav", "text": f"text of {name}"} for name in ("a", "b", "gone")]
    manifest(home / "rows.jsonl", lines)
    for fault_count, reasons in [
        (4, {"gone": "unreadable audio"}),
        (400, {name: "unreachable audio" for name in ("a", "b", "gone")}),
    ]:
        with hub_server.serve(tmp_path) as hub:
            rows = rows_of(f"{hub.url}/files/speech/talks/main/rows.jsonl")
            hub.faults["data"] = ["503"] * fault_count
            found = check(rows, tmp_path / f"copies{fault_count}")
        dropped = {row.id: row.reason for row in found if isinstance(row, DroppedLine)}
        assert dropped == reasons


def crash_on_bad(checker: ClipChecker, rows: list[Row]) -> list:
    """Read a batch, with a decoder that ends its process on some files."""
    if any("crash" in row.id for row in rows):
        os._exit(1)
    return check_batch(checker, rows)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_started")
def test_a_file_that_crashes_its_process_is_dropped_alone(tmp_path):
    soundfile.write(tmp_path / "a.wav", media.speech(16_000, seconds=1.0, channels=1), 16_000)
    names = [f"{number}.wav" for number in range(BATCH_ROWS + 20)]
    for name in names:
        os.link(tmp_path / "a.wav", tmp_path / name)
    lines = [{"id": name, "audio": name, "text": "some text"} for name in names]
    lines[7]["id"] = "crash"
    (tmp_path / "copies").mkdir()
    rows = rows_of(manifest(tmp_path / "rows.jsonl", lines))
    checker = ClipChecker(LIMITS, tmp_path / "copies", os.getcwd())
    found = read_all_clips(rows, checker, RayTasks(crash_on_bad), 2, ReadingProgress(len(lines)))
    (dropped,) = (row for row in found if isinstance(row, DroppedLine))
    assert (dropped.id, dropped.reason) == ("crash", "unreadable audio")
    assert "its decoder crashes" in dropped.detail
    assert len(found) == len(lines)


@pytest.mark.seconds
@pytest.mark.usefixtures("ray_started")
def test_buckets_web_servers_and_disks_give_the_same_bytes_on_ray_and_here(tmp_path):
    home = tmp_path / "speech" / "talks" / "main"
    (home / "clips").mkdir(parents=True)
    lines = parts("clips/long 1.mp3", [0.0, 3.0, 1.0])
    (home / "clips" / "long 1.mp3").write_bytes(
        media.encode(media.speech(44_100, seconds=6), 44_100, "libmp3lame", "mp3")
    )
    for number in range(12):
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, 8_000 + 3_000 * number)
        soundfile.write(home / "clips" / f"{number}.flac", noise, 16_000)
        lines.append({"id": f"r{number}", "audio": f"clips/{number}.flac", "text": f"text {number}"})
    lines.append({"id": "gone", "audio": "clips/gone.flac", "text": "gone"})
    manifest(home / "rows.jsonl", lines)
    options = {"splits": {"train": 0.6, "dev": 0.4}, "rows_per_file": 4, "joined": {"share": 0.3, "shortest_s": 2}}
    prepare = functools.partial(PrepareRecipe, **options)
    run(prepare(sources=[str(home / "rows.jsonl")], out=str(tmp_path / "here")))
    with hub_server.serve(tmp_path) as hub, s3.serve(home, "bucket/set") as address:
        there = f"s3://bucket/set/rows.jsonl?endpoint_override={address}&scheme=http"
        run(prepare(sources=[there], out=str(tmp_path / "s3"), workers=2))
        run(prepare(sources=[f"{hub.url}/files/speech/talks/main/rows.jsonl"], out=str(tmp_path / "web"), workers=3))
    told = ("recipe.yaml", "dropped.jsonl")  # they name the manifest
    here = {name: data for name, data in tree(tmp_path / "here").items() if name not in told}
    assert len(here) > 4
    for other in ("s3", "web"):
        assert {name: data for name, data in tree(tmp_path / other).items() if name not in told} == here
        (dropped,) = map(json.loads, (tmp_path / other / "dropped.jsonl").read_text().splitlines())
        assert (dropped["id"], dropped["reason"]) == ("gone", "unreadable audio")
        assert "scheme=http" not in str(dropped)


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_that_is_killed_leaves_nothing_that_hinders_the_next(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-0.3, 0.3, 160_000), 16_000)
    lines = [{"id": f"r{number}", "audio": f"{number}.flac", "text": f"text {number}"} for number in range(3000)]
    for number in range(3000):
        os.link(tmp_path / "a.flac", tmp_path / f"{number}.flac")
    manifest(tmp_path / "rows.jsonl", lines)
    command = [sys.executable, "-m", "jobs.prepare", f"sources={tmp_path}/rows.jsonl", f"out={tmp_path}/out"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    partial = tmp_path / ".out.partial"
    try:
        deadline = time.monotonic() + 120
        while not list(partial.glob("*/part-*.parquet")) and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert list(partial.glob("*/part-*.parquet"))
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not partial.exists()
    rows = read_rows([f"{tmp_path}/out/train", f"{tmp_path}/out/dev"])
    assert len(rows) == 3000
    content, _ = RowReader(rows.files).wav(rows.file[0], rows.row_group[0], rows.row[0])
    assert content == (tmp_path / "a.flac").read_bytes()
