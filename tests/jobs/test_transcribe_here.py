"""Test jobs.transcribe without a folder for results: few local files are transcribed in this process and printed."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from graft.audio.chunking import Chunk
from graft.audio.clip import AudioClip
from graft.inference.segments import Segment
from graft.inference.transcriber import open_transcriber
from jobs.transcription.discovery import find_recordings
from jobs.transcription.local import CHUNKS_AT_ONCE, MOST_FILES, _ShowingTranscriber, are_for_ray, needs_ray
from tests.support import media, tiny_models
from tests.support.jobs import transcribe
from tests.support.paths import ROOT

PROMPTS = media.SHORTEST_FIRST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("here")
    return tiny_models.save_tiny_graft(home / "tiny", trained_styles=["formatted"], trained_context=True)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a short recording, a long one, one of two channels, and a broken one."""
    root = tmp_path / "calls"
    root.mkdir()
    shutil.copy(PROMPTS[0], root / "short.flac")
    sound = media.speech(48_000, seconds=25.0)
    (root / "long.webm").write_bytes(media.encode(sound, 48_000, "libopus", "webm", seekable=False))
    one, two = (soundfile.read(path, dtype="float32")[0] for path in PROMPTS[:2])
    silence = np.zeros_like
    left, right = [one, silence(two), one], [silence(one), two, silence(one)]
    soundfile.write(root / "call.wav", np.stack([np.concatenate(left), np.concatenate(right)], axis=1), 16_000)
    (root / "broken.mp3").write_bytes(b"no audio")
    monkeypatch.chdir(root)
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("ray_started")
def test_texts_are_the_same_as_on_ray_with_and_without_a_folder(
    folder: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"model={folder}", "item_s=10", "chunks.max_s=8", "chunks.max_pause_s=0.5"]
    arguments += ["instruction=formatted", "context=[Aachen, New York]"]
    for name, more in [("short.flac", []), ("long.webm", []), ("call.wav", ["channels=split"])]:
        given = [f"audio={name}", *arguments, *more]
        assert transcribe(*given, f"out={calls / f'{name}.out'}", "formats=[txt, json]", "workers=2") == 0
        assert "graft: transcribing on Ray, because workers=2 is more than one process" in capsys.readouterr().out
        assert transcribe(*given, f"out={calls / f'{name}.here'}", "formats=[txt, json]") == 0
        files = calls / f"{name}.out" / "files"
        here = json.loads((calls / f"{name}.here" / "files" / f"{name}.json").read_text())
        row, row_here = (rows_of(calls / f"{name}.{end}")[0] for end in ("out", "here"))
        for part, other in zip(row["segments"], row_here["segments"], strict=True):
            assert part.pop("mean_logprob") == pytest.approx(other.pop("mean_logprob"), abs=1e-5)
        for measured in ("read_s", "heard_s", "confidence"):
            assert row.pop(measured) == pytest.approx(
                row_here.pop(measured), abs=1e-5 if measured == "confidence" else 9
            )
        assert row == row_here
        capsys.readouterr()
        assert transcribe(*given) == 0
        assert capsys.readouterr().out == (files / f"{name}.txt").read_text()
        assert transcribe(*given, "formats=[json]") == 0
        printed = json.loads(capsys.readouterr().out)
        expected = json.loads((files / f"{name}.json").read_text())
        assert here["text"] == expected["text"]
        assert len(printed["segments"]) == len(expected["segments"]) > (name != "short.flac")
        for ours, theirs in zip(printed["segments"], expected["segments"], strict=True):
            assert ours.pop("mean_logprob") == pytest.approx(theirs.pop("mean_logprob"), abs=1e-5)
        assert printed == expected


@pytest.mark.seconds
def test_files_are_named_and_a_bad_one_does_not_end_the_run(
    folder: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(open_transcriber(folder)) as transcriber:
        text = transcriber.transcribe("short.flac").text
    given = ["short.flac", "broken.mp3", "call.wav", f"model={folder}"]
    assert transcribe(*given) == 0
    printed = capsys.readouterr()
    assert [line.partition(": ")[0] for line in printed.out.splitlines()] == ["short.flac", "call.wav"]
    assert printed.out.startswith(f"short.flac: {text}\n")
    choice, first, *others = printed.err.splitlines()
    assert choice.startswith("graft: transcribing in this process, on ")
    assert first.startswith("graft: broken.mp3: not readable as audio")
    assert others[0].startswith("2 recordings done, 1 failed; 0.00 h of audio, ")
    assert others[1:] == ["  failed: 1 x not readable as audio", *others[2:]]
    assert transcribe(*given, "--strict") == 3
    assert transcribe("short.flac", f"model={folder}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == text
    Path("other").mkdir()
    shutil.copy("short.flac", "other")
    assert transcribe("short.flac", "other/short.flac", f"model={folder}") == 0
    assert capsys.readouterr().out == f"short.flac: {text}\nother/short.flac: {text}\n"


def test_subtitles_are_printed_of_one_recording(folder: Path, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transcribe("short.flac", f"model={folder}", "formats=[srt]") == 0
    assert capsys.readouterr().out.startswith("1\n00:00:00,")
    for arguments, words in [
        (["short.flac", "formats=[srt, txt]"], "formats=srt,txt needs out="),
        (["short.flac", "call.wav", "formats=[srt]"], "formats=srt prints one recording, not 2: give out="),
    ]:
        assert transcribe(*arguments, f"model={folder}") == 2
        assert words in capsys.readouterr().err


def test_silence_is_told(folder: Path, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write("silence.wav", np.zeros(16_000), 16_000)
    assert transcribe("silence.wav", f"model={folder}") == 0
    printed = capsys.readouterr()
    assert printed.out == "\n"
    assert "\ngraft: silence.wav: nobody speaks in it\n" in printed.err


@pytest.mark.seconds
def test_of_several_audio_tracks_one_is_taken(folder: Path, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (soundfile.read(path, dtype="float32")[0] for path in PROMPTS[:2])
    Path("film.mkv").write_bytes(media.tracks({"eng": two, "ger": one}, 16_000))
    soundfile.write("eng.wav", two, 16_000)
    printed = []
    for arguments in (["short.flac"], ["film.mkv", "audio_track=deu"], ["eng.wav"], ["film.mkv"]):
        assert transcribe(*arguments, f"model={folder}", "formats=[json]") == 0
        printed.append(capsys.readouterr())
    german, track, english, default = (json.loads(one.out) for one in printed)
    assert german == track
    assert english["segments"] == default["segments"] != german["segments"]
    assert default["defects"] == [{"flag": "several_tracks", "start_s": 0.0, "end_s": 0.0}]
    assert "several" not in printed[1].err
    assert "\n  1 recording has several audio tracks (several_tracks): the default one is taken" in printed[3].err
    assert transcribe("film.mkv", "audio_track=fre", f"model={folder}") == 2
    assert "film.mkv: has no audio track fre: give one of its tracks 1 (eng), 2 (ger)" in capsys.readouterr().err
    assert transcribe("film.mkv", "short.flac", "audio_track=2", f"model={folder}") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("film.mkv: ")
    assert (
        "graft: short.flac: has no audio track 2: give one of its tracks 1\n1 recording done, 1 failed" in printed.err
    )


def rows_of(out: Path) -> list[dict]:
    return [row for path in sorted((out / "recordings").glob("*")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.seconds
def test_a_folder_is_filled_and_added_to_in_this_process(
    folder: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move("call.wav", "..")
    shutil.move("long.webm", "..")
    given = ["audio=.", "out=out", f"model={folder}", "formats=[txt, srt]"]
    assert transcribe(*given, "--strict") == 3
    output = capsys.readouterr().out
    assert output.startswith("graft: transcribing in this process, on the CPU with ")
    assert "2/2 recordings " in output
    assert "1 recording done, 1 failed; " in output
    assert [(row["id"], bool(row["text"]), row["error"]) for row in rows_of(Path("out"))][1:] == [
        ("short.flac", True, None)
    ]
    assert {path.name for path in Path("out", "files").iterdir()} == {"short.flac.txt", "short.flac.srt"}
    assert json.loads(Path("out", "errors.jsonl").read_text())["recording"] == "broken.mp3"
    assert json.loads(Path("out", "summary.json").read_text())["done"] == 1
    (before,) = (path for path in Path("out", "work", "items").iterdir() if pq.read_table(path)["segments"][0].as_py())

    shutil.move("../call.wav", ".")
    assert transcribe(*given) == 0
    assert "2 recordings done, 1 failed; " in capsys.readouterr().out
    assert before.exists()
    assert len([*Path("out", "work", "items").iterdir()]) == len([*Path("out", "work", "done").iterdir()]) == 3
    assert [row["id"] for row in rows_of(Path("out"))] == ["broken.mp3", "call.wav", "short.flac"]
    assert transcribe(*given) == 0
    assert "nothing was left to do" in capsys.readouterr().out


def test_what_is_more_than_a_few_local_recordings_goes_to_ray(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recordings, home = find_recordings(["."]), calls / "out" / "work"
    assert are_for_ray(recordings, "auto", home) is None
    assert are_for_ray(recordings, 2, home) == "workers=2 is more than one process"
    several = pa.concat_tables([recordings] * 3)
    assert are_for_ray(several, 1, home) == f"these are more than {MOST_FILES} recordings"
    (calls / "list.txt").write_text("http://127.0.0.1:1/a.flac\n")
    assert are_for_ray(find_recordings(["list.txt"]), 1, home) == "these are not only local files"
    (home / "reading").mkdir(parents=True)
    (home / "reading" / "note").write_text("batch of a")
    assert are_for_ray(recordings, 1, home) == "an earlier run was killed while it read a recording"
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert are_for_ray(recordings, 1, home) == "RAY_ADDRESS names a cluster"


WITHOUT = """
import sys
from jobs.__main__ import main

assert main(["transcribe", *sys.argv[1:]]) == 0
heavy = {"ray", "pyarrow.dataset", "fastapi"} & set(sys.modules)
assert not heavy, heavy
assert main(["transcribe", *sys.argv[1:], "out=out"]) == 0
heavy = {"ray", "fastapi"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.processes
def test_ray_is_not_imported(folder: Path, calls: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, "short.flac", f"model={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr


def test_what_is_more_than_a_few_local_files_goes_to_ray(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs_ray(["short.flac", "call.wav"], 1) is None
    Path("list.txt").write_text("short.flac\n")
    for sources in (["."], ["*.flac"], ["http://127.0.0.1:1/a.flac"], ["list.txt"]):
        assert needs_ray(sources, 1) == "these are not only local files that are named one by one"
    assert needs_ray(["short.flac"] * (MOST_FILES + 1), 1) == f"these are more than {MOST_FILES} files"
    assert needs_ray(["short.flac"], 2) == "workers=2 is more than one process"
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert needs_ray(["short.flac"], 1) == "RAY_ADDRESS names a cluster"


@pytest.mark.slow
@pytest.mark.bundled
@pytest.mark.processes
def test_a_clip_takes_little_processor_time_and_one_process(tmp_path: Path) -> None:
    samples = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in sorted(media.PROMPTS)])
    soundfile.write(tmp_path / "clip.flac", samples[:160_000], 16_000)  # 10 s
    command = [sys.executable, "-m", "jobs", "transcribe", str(tmp_path / "clip.flac")]
    seconds = []
    for _ in range(3):  # the first one may have to write the small graft into the cache
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            watched, children = psutil.Process(process.pid), []
            while process.poll() is None:
                children += watched.children()
                used = watched.cpu_times()
                time.sleep(0.05)
            assert process.stdout
            assert len(process.stdout.read().split()) > 10
        assert not children
        seconds.append(used.user + used.system)
    assert min(seconds) < 11, seconds


class Turns:
    """A ChunkTranscriber that writes each chunk's number, and one chunk only when an earlier one was shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.running = self.most = 0

    async def find_language(self, chunks: list[Chunk]) -> str | None:
        return None

    async def transcribe_chunks(self, chunks: list[Chunk]) -> list[Segment]:
        (chunk,) = chunks
        self.running += 1
        self.most = max(self.most, self.running)
        while len(self.shown) < chunk.start_s - CHUNKS_AT_ONCE + 1:
            await asyncio.sleep(0)
        self.running -= 1
        return [Segment(chunk.start_s, chunk.start_s + 1, f"{chunk.start_s:g}")]


def test_a_segment_is_shown_before_the_last_ones_are_decoded() -> None:
    model, clip = Turns(), AudioClip(np.zeros(16_000, np.float32))
    showing = _ShowingTranscriber(model, lambda segment: model.shown.append(segment.text))
    chunks = [Chunk(float(number), clip) for number in range(10)]

    async def transcribe_all() -> list[Segment]:
        async with asyncio.timeout(10):
            return await showing.transcribe_chunks(chunks)

    segments = asyncio.run(transcribe_all())
    assert model.shown == [segment.text for segment in segments] == [str(number) for number in range(10)]
    assert model.most == CHUNKS_AT_ONCE


@pytest.mark.slow
@pytest.mark.processes
def test_files_that_vanish_grow_or_shrink_during_a_run_have_one_row_each(folder: Path, tmp_path: Path) -> None:
    sound = media.speech(16_000, seconds=40.0, channels=1)
    data = media.write(sound, 16_000, "WAV"), media.encode(sound, 16_000, "libmp3lame", "mp3")
    (tmp_path / "calls").mkdir()
    files = [tmp_path / "calls" / f"{number}.{('wav', 'mp3')[number % 2]}" for number in range(MOST_FILES)]
    for number, path in enumerate(files):
        path.write_bytes(data[number % 2])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs", "transcribe", f"model={folder}", f"audio={tmp_path / 'calls'}"]
    with subprocess.Popen(
        [*command, f"out={out}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        while not list((out / "work" / "items").glob("[!.]*.parquet")):
            assert run.poll() is None
            time.sleep(0.02)
        for path in files[2:4]:
            path.unlink()
        for path in files[4:6]:
            with path.open("ab") as file:
                file.write(path.read_bytes()[44:200_000])
        for path in files[6:]:
            os.truncate(path, 30_000)
        said, warned = run.communicate(timeout=200)
    assert (run.returncode, "Traceback" in said + warned) == (0, False)
    rows = pq.read_table(out / "recordings", partitioning=None).to_pylist()
    assert [row["id"] for row in rows] == [path.name for path in files]
    assert [row["id"] for row in rows if row["error"]] == [path.name for path in files[2:4]]
    assert all("No such file or directory" in row["error"] for row in rows[2:4])
    assert all("truncated_file" in row["flags"] for row in rows[6:])
    assert (out / "errors.jsonl").read_text().count("\n") == 2
