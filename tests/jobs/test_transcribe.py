"""Test jobs.transcribe on a local Ray: archives in, transcripts out, bad files reported, nothing done twice."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from ray.data._internal.planner.planner import Planner
from safetensors.torch import load_file, save_file

from graft.errors import install_command
from graft.inference.transcriber import Transcriber, open_transcriber
from graft.inference.transcript import Transcript
from jobs.common.outputs import holds_results
from jobs.transcribe import EXECUTION_KEYS, TranscribeRecipe
from jobs.transcription.assembly import whole_files
from tests.support import hub_server, media, tiny_models
from tests.support.jobs import transcribe
from tests.support.paths import ROOT
from tests.support.speech_corpus import save_tiny_whisper

pytestmark = pytest.mark.usefixtures("ray_started")

PROMPTS = sorted(media.PROMPTS, key=lambda path: path.stat().st_size)
"""Real speech, the shortest clip first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("transcribe") / "tiny-graft")


@pytest.fixture(scope="module")
def transcriber(folder) -> Iterator[Transcriber]:
    opened = open_transcriber(folder)
    yield opened
    opened.close()


@pytest.fixture
def calls(tmp_path) -> Path:
    """A folder of three recordings, one of them long, a broken one, and a file that is not audio."""
    root = tmp_path / "calls"
    (root / "deep").mkdir(parents=True)
    shutil.copy(PROMPTS[0], root / "a.flac")
    (root / "deep" / "b.webm").write_bytes(
        media.encode(media.speech(48_000, seconds=25.0), 48_000, "libopus", "webm", seekable=False)
    )
    soundfile.write(root / "a.wav", np.zeros(16_000), 16_000)
    (root / "broken.mp3").write_bytes(b"no audio")
    (root / "notes.md").write_text("not for us")
    return root


def rows_of(out: Path) -> dict[str, dict]:
    rows = [row for path in sorted((out / "recordings").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def is_as(row: dict, transcript: Transcript) -> None:
    expected = transcript.to_dict()
    assert row["text"] == expected["text"]
    assert row["duration_s"] == pytest.approx(expected["duration_s"], abs=1e-3)
    for part, segment in zip(row["segments"], expected["segments"], strict=True):
        assert part["mean_logprob"] == pytest.approx(segment["mean_logprob"], abs=1e-5)
        exact = {"flags": list(segment["flags"]), "words": list(segment["words"]), "mean_logprob": part["mean_logprob"]}
        assert part == segment | exact


@pytest.fixture
def later(tmp_path) -> Iterator[tuple[str, Path]]:
    """Give the URL of a recording that is not there yet, and the file that a test puts there."""
    (tmp_path / "files").mkdir()
    with hub_server.serve(tmp_path / "files") as hub:
        yield f"{hub.url}/files/later.flac", tmp_path / "files" / "later.flac"


def test_an_archive_is_transcribed_once_and_what_failed_is_tried_again_only_when_asked(
    folder, calls, later, tmp_path, capsys, transcriber
):
    out, (url, file) = tmp_path / "out", later
    arguments = [f"model={folder}", f"audio=[{calls}, {url}]", f"out={out}", "item_s=10", "formats=[txt, vtt, json]"]
    assert transcribe(*arguments, "price=3") == 0
    rows = rows_of(out)
    assert list(rows) == ["a.flac", "a.wav", "broken.mp3", "deep/b.webm", "later.flac"]
    is_as(rows["a.flac"], transcriber.transcribe(calls / "a.flac"))
    assert (rows["a.wav"]["text"], rows["a.wav"]["segments"], rows["a.wav"]["error"]) == ("", [], None)
    assert rows["a.wav"]["duration_s"] == 1.0
    assert rows["deep/b.webm"]["duration_s"] == pytest.approx(25.0, abs=0.1)
    assert rows["deep/b.webm"]["segments"][-1]["start_s"] > 5  # of its second item
    assert "truncated" in rows["deep/b.webm"]["flags"]
    assert 0 < rows["deep/b.webm"]["confidence"] < 1
    assert rows["broken.mp3"]["error"].startswith("not readable as audio")
    written = sorted(path.relative_to(out / "files").as_posix() for path in (out / "files").rglob("*.*"))
    assert written == sorted(
        f"{stem}.{kind}" for stem in ("a.flac", "a.wav", "deep/b.webm") for kind in ("txt", "vtt", "json")
    )
    assert (out / "files" / "deep" / "b.webm.txt").read_bytes().decode() == rows["deep/b.webm"]["text"] + "\n"
    assert json.loads((out / "files" / "a.flac.json").read_text())["text"] == rows["a.flac"]["text"]
    faults = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert [(fault["recording"], fault["uri"]) for fault in faults] == [
        ("broken.mp3", str(calls / "broken.mp3")),
        ("later.flac", url),
    ]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == str(folder)
    assert not [path for path in out.rglob("*") if "partial" in path.name or path.suffix == ".tmp"]
    output = capsys.readouterr()
    assert "5/5 recordings  0.01 h  RTFx " in output.out
    assert "3 recordings done, 2 failed; 0.01 h of audio" in output.out
    assert "  failed: 1 x not readable as audio\n" in output.out
    assert "  broken.mp3: not readable as audio" in output.out
    assert f"  {out}/errors.jsonl lists all that failed\n" in output.out
    assert f"1 file is no audio by suffix and left out (1 .md): {out}/skipped.jsonl lists them" in output.err
    assert json.loads((out / "skipped.jsonl").read_text()) == {"uri": str(calls / "notes.md")}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["cost_per_audio_hour"] == pytest.approx(3 / summary["rtfx"])
    assert "Traceback" not in output.err

    # What failed is left alone, even where it is there now.
    shutil.copy(PROMPTS[0], file)
    assert transcribe(*arguments, "--strict") == 3
    assert "3 recordings done, 2 failed; 0.01 h of audio, nothing was left to do" in capsys.readouterr().out

    # The next run transcribes new and changed files, and on request what failed; one more run has nothing to do.
    items = set((out / "work" / "items").iterdir())
    shutil.copy(PROMPTS[1], calls / "new.flac")
    shutil.copy(PROMPTS[2], calls / "broken.mp3")
    (calls / "a.wav").rename(calls / "moved.wav")
    (out / "files" / "a.wav.note").write_text("the user's own")
    assert transcribe(*arguments, "items_per_batch=1", "--strict", "--retry-errors") == 0
    written = {path.name for path in (out / "files").glob("*.wav.*")}
    assert written == {"a.wav.note", "moved.wav.txt", "moved.wav.vtt", "moved.wav.json"}
    assert "nothing was left to do" not in capsys.readouterr().out
    assert (
        len(set((out / "work" / "items").iterdir()) - items) == 4
    )  # new.flac, moved.wav, later.flac, and broken.mp3, which is another file now
    again = rows_of(out)
    mended = {"a.wav", "broken.mp3", "later.flac"}
    assert {name: row for name, row in again.items() if name in rows and name not in mended} == {
        name: row for name, row in rows.items() if name not in mended
    }
    is_as(again["broken.mp3"], transcriber.transcribe(calls / "broken.mp3"))
    is_as(again["later.flac"], transcriber.transcribe(PROMPTS[0]))
    assert not (out / "errors.jsonl").read_text()
    assert transcribe(*arguments, "--strict") == 0
    assert "6 recordings done, 0 failed; 0.01 h of audio, nothing was left to do" in capsys.readouterr().out


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    return Path(save_tiny_whisper(tmp_path_factory.mktemp("transcribe") / "tiny-whisper"))


@pytest.mark.slow
def test_a_whisper_transcribes_as_a_graft_does(whisper, calls, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"model={whisper}", f"audio={calls}", f"out={out}", "item_s=10", "formats=[txt, srt, vtt, json]"]
    assert transcribe(*arguments, "--strict") == 3
    opened = open_transcriber(whisper)
    rows = rows_of(out)
    is_as(rows["a.flac"], opened.transcribe(calls / "a.flac"))
    opened.close()
    assert (rows["a.wav"]["text"], rows["a.wav"]["segments"]) == ("", [])
    assert rows["deep/b.webm"]["segments"][-1]["start_s"] > 5  # of its second item
    assert "truncated" in rows["deep/b.webm"]["flags"]
    assert rows["broken.mp3"]["error"].startswith("not readable as audio")
    for kind in ("txt", "srt", "vtt", "json"):
        assert (out / "files" / "deep" / f"b.webm.{kind}").stat().st_size > 0
    assert json.loads((out / "files" / "a.flac.json").read_text())["model"] == "tiny-whisper"
    assert "3 recordings done, 1 failed; 0.01 h of audio" in capsys.readouterr().out


@pytest.fixture(scope="module")
def call(folder, tmp_path_factory) -> list[str]:
    """Transcribe a call of two channels with a model of its own; returns the arguments."""
    home = tmp_path_factory.mktemp("call")
    one, two = (soundfile.read(path, dtype="float32")[0] for path in PROMPTS[:2])
    silence = np.zeros_like
    apart = np.stack(
        [np.concatenate([one, silence(two), one]), np.concatenate([silence(one), two, silence(one)])], axis=1
    )
    soundfile.write(home / "call.wav", apart, 16_000)
    shutil.copytree(folder, home / "model")
    arguments = [f"model={home / 'model'}", f"audio={home / 'call.wav'}", f"out={home / 'out'}", "channels=split"]
    arguments += ["chunks.max_pause_s=0.5", "formats=[txt, srt]"]
    assert transcribe(*arguments) == 0
    return arguments


def test_channels_are_told_apart_and_ordered_by_time(call):
    out = Path(call[2].removeprefix("out="))
    segments = rows_of(out)["call.wav"]["segments"]
    assert [segment["channel"] for segment in segments] == [1, 2, 1]
    assert [segment["start_s"] for segment in segments] == sorted(segment["start_s"] for segment in segments)
    text = (out / "files" / "call.wav.txt").read_text()
    assert [line.partition(":")[0] for line in text.splitlines()] == ["channel 1", "channel 2", "channel 1"]
    assert "channel 2: " in (out / "files" / "call.wav.srt").read_text()


def test_results_of_another_model_or_recipe_never_mix(folder, call, tmp_path, capsys):
    model, out = (Path(call[place].partition("=")[2]) for place in (0, 2))
    before = rows_of(out)
    for changed in [f"audio={PROMPTS[1]}", "item_s=60", "chunks.max_s=20", f"model={folder}"]:
        assert transcribe(*call, changed) == 2
        key, _, value = changed.partition("=")
        assert f"holds another recipe's results: {key} was " in (message := capsys.readouterr().err)
        assert f"is {value!r} now" in message or f"is {value} now" in message or f"is {float(value)} now" in message
    shutil.rmtree(model)
    tiny_models.save_tiny_graft(model, seed=1)
    assert transcribe(*call) == 2
    message = capsys.readouterr().err
    assert "holds another recipe's results: model_digest was '" in message
    assert rows_of(out) == before
    assert transcribe(*call, "model_digest=abc", f"out={tmp_path / 'new'}") == 2
    assert "is not the one that model_digest=abc names" in capsys.readouterr().err
    known = TranscribeRecipe(**yaml.safe_load((out / "recipe.yaml").read_text()) | {"workers": 3, "formats": ["srt"]})
    assert holds_results(str(out), known, ignore=EXECUTION_KEYS)


def test_a_run_without_checkpoints_is_an_error(folder, tmp_path, monkeypatch):
    """Ray only warns, and a run that is killed would begin anew."""
    monkeypatch.setattr(Planner, "_check_supports_checkpointing", lambda planner, plan: False)
    with pytest.raises(UserWarning, match="Checkpointing will be disabled"):
        transcribe(f"model={folder}", f"audio={PROMPTS[0]}", f"out={tmp_path / 'out'}", "workers=2")


@pytest.mark.slow
def test_without_out_it_prints_only_and_instruction_and_context_reach_the_workers(tmp_path, capsys, monkeypatch):
    (tmp_path / "calls").mkdir()
    shutil.copy(PROMPTS[0], tmp_path / "calls" / "a.flac")
    (tmp_path / "calls" / "broken.mp3").write_bytes(b"no audio")
    monkeypatch.chdir(tmp_path / "calls")
    folder = tiny_models.save_tiny_graft(tmp_path / "worded", trained_styles=["formatted"], trained_context=True)
    words = {"instruction": "formatted", "context": ["Aachen", "New York"]}
    opened = open_transcriber(folder)
    asked, plain = opened.transcribe(PROMPTS[0], **words), opened.transcribe(PROMPTS[0])
    opened.close()
    assert asked.text != plain.text
    arguments = [f"model={folder}", "audio=.", "instruction=formatted", "context=[Aachen, New York]"]
    assert transcribe(*arguments) == 0
    output = capsys.readouterr()
    assert output.out == f"a.flac: {asked.text}\n"
    assert "graft: transcribing on Ray, because these are not only local files" in output.err
    assert "graft: broken.mp3: not readable as audio" in output.err
    assert sorted(path.name for path in Path().iterdir()) == ["a.flac", "broken.mp3"]


@pytest.fixture
def deaf(tmp_path) -> Path:
    graft = tiny_models.save_tiny_graft(tmp_path / "deaf")
    state = load_file(graft / "model.safetensors")
    state["audio_projector.linear.weight"].zero_()
    save_file(state, graft / "model.safetensors", {"format": "pt"})
    return graft


def test_a_deaf_model_is_refused_in_one_line(deaf, capsys):
    assert transcribe(f"model={deaf}", f"audio={PROMPTS[0]}") == 2
    errors = capsys.readouterr().err
    assert "all zeros, so audio has no effect" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_the_command_prints_nothing_else_on_stderr(deaf, tmp_path):
    command = [sys.executable, "-m", "jobs.transcribe", f"model={deaf}", f"audio={PROMPTS[0]}"]
    result = subprocess.run(
        [*command, f"out={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("graft: error: ")
    assert lines[0].endswith("is all zeros, so audio has no effect: train stage 1 or build it again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model={folder}", "audio=[{empty}]"], "no audio in"),
        (["model={empty}", "audio={sound}"], "has no config.json"),
        (["model={folder}", "audio={sound}", "wrokers=2"], "did you mean 'workers'"),
        (["model={folder}", "audio={sound}", "workers=0"], "workers=0"),
        (["model={folder}"], "key audio is required"),
        (["model={folder}", "audio={sound}", "quantization=fp8"], "quantization=fp8 goes with engine=vllm"),
        (["model={folder}", "audio={sound}", "dtype=int8", "gpus_per_worker=1"], "dtype=int8 computes on CPUs only"),
        (["model={folder}", "audio={sound}", "engine=vllm"], f"vllm is not installed: {install_command('vllm')}"),
        (
            ["model={folder}", "audio={sound}", "instruction=formatted"],
            "instruction 'formatted': this checkpoint was trained for lower: give",
        ),
        (
            ["model={folder}", "audio={sound}", "instruction=Write a poem."],
            "instruction 'Write a poem.': this checkpoint was trained for",
        ),
        (
            ["model={folder}", "audio={sound}", "context=[Aachen]"],
            "context: this checkpoint was not trained for lists of words",
        ),
        (
            ["model={whisper}", "audio={sound}", "engine=vllm"],
            "is a whisper checkpoint, which engine=vllm does not run",
        ),
        (
            ["model={whisper}", "audio={sound}", "instruction=lower"],
            "instruction 'lower': this checkpoint was trained for",
        ),
    ],
)
def test_what_is_wrong_from_the_start_is_one_line_and_exit_code_2(
    folder, whisper, tmp_path, capsys, arguments, message
):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    places = {"folder": folder, "whisper": whisper, "empty": tmp_path / "empty", "sound": tmp_path / "a.wav"}
    places["sound"].touch()
    assert transcribe(*(argument.format(**places) for argument in arguments), f"out={out}") == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("graft: error: ")
    assert message in errors
    assert "\n" not in errors
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_run_has_written_the_recordings_that_were_done(folder, tmp_path):
    calls, out = tmp_path / "many", tmp_path / "out"
    calls.mkdir()
    soundfile.write(calls / "000.flac", media.speech(16_000, seconds=40.0, channels=1), 16_000)
    for number in range(1, 200):
        shutil.copy(PROMPTS[number % 8], calls / f"{number:03}.flac")
    arguments = [
        f"audio={calls}",
        f"model={folder}",
        f"out={out}",
        "items_per_batch=1",
        "item_s=10",
        "chunks.padding_s=0",
    ]
    command = [sys.executable, "-m", "jobs", "transcribe", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        while len(rows_of(out)) < 5 and run.poll() is None:
            time.sleep(0.05)
        run.kill()
    written = {path.name: path.read_bytes() for path in (out / "files").glob("[!.]*")}
    before = rows_of(out)
    assert 5 <= len(before) < 200
    assert {f"{name}.txt" for name in before} <= written.keys()
    assert {path.name for path in (out / "files").glob("*.txt")} <= {f"{path.name}.txt" for path in calls.iterdir()}
    assert transcribe(*arguments) == 0
    after = rows_of(out)
    assert list(after) == sorted(path.name for path in calls.iterdir())
    assert {name: after[name] for name in before} == before
    for name, content in written.items():
        assert (out / "files" / name).read_bytes() == content
    assert len(list((out / "files").glob("*"))) == 2 * 200


@pytest.mark.slow
@pytest.mark.processes
def test_an_interrupted_run_says_how_to_go_on(folder, tmp_path, capsys):
    calls, out = tmp_path / "many", tmp_path / "out"
    calls.mkdir()
    for number in range(60):
        shutil.copy(PROMPTS[number % 8], calls / f"{number:02}.flac")
    arguments = [f"audio={calls}", f"model={folder}", f"out={out}", "items_per_batch=1"]
    command = [sys.executable, "-m", "jobs", "transcribe", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while len(whole_files(out / "work")) < 2 and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=100)
    assert run.returncode == 130
    said = r"graft: (\d+) of 60 work items are kept in (.*): the same command goes on from there\ngraft: interrupted\n"
    assert (found := re.search(said, errors)), errors
    assert 2 <= int(found[1]) < 60
    assert found[2] == str(out)
    kept = set(whole_files(out / "work"))
    assert transcribe(*arguments) == 0
    assert "60 recordings done, 0 failed" in capsys.readouterr().out
    assert kept < set(whole_files(out / "work"))
