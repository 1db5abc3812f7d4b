"""`jobs.transcribe` on a real local Ray: files and folders in, transcripts out, bad files reported."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import yaml

from graft.errors import DataError
from graft.transcriber import load
from jobs.cli import run_job
from jobs.cluster import connect
from jobs.outputs import holds_results
from jobs.transcribe import HOW, TranscribeRecipe, find_recordings, main


def run(*arguments: str) -> int:
    return run_job(TranscribeRecipe, main, summary="", argv=list(arguments))


def write_audio(path: Path, seconds: float, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).standard_normal(int(seconds * 16_000)) * 0.1, 16_000)
    return path


@pytest.fixture(scope="module", autouse=True)
def ray_started():
    """Here and not inside a test: Ray's loggers keep the stderr they first see, and a test's own is closed after it."""
    connect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_tiny_graft(tmp_path_factory.mktemp("transcribe") / "tiny-graft")


def test_good_files_are_transcribed_and_bad_ones_reported(folder, tmp_path, capsys):
    paths = [write_audio(tmp_path / name, 0.4 + place, place) for place, name in enumerate(["talks/a.flac", "talks/deep/b.wav", "c.ogg"])]
    (tmp_path / "talks" / "broken.mp3").write_bytes(b"no audio")
    (tmp_path / "talks" / "notes.txt").write_text("not for us")
    sources, out = [str(tmp_path / "talks"), str(paths[2]), str(tmp_path / "missing.wav")], tmp_path / "out"
    assert run(f"model={folder}", f"audio={sources}", f"out={out}", "files_per_batch=2", "workers=2") == 3

    transcriber = load(folder)
    expected = [transcriber.transcribe(path).to_dict() for path in paths]
    transcriber.close()
    for stem, path, transcript in zip(["a", "deep/b", "c"], paths, expected, strict=True):
        assert (out / f"{stem}.txt").read_bytes().decode() == transcript["text"] + "\n"
        written = json.loads((out / f"{stem}.json").read_text())
        logprob = written["segments"][0].pop("mean_logprob")
        assert logprob == pytest.approx(transcript["segments"][0].pop("mean_logprob"), abs=1e-5)
        assert written == {"file": str(path), **json.loads(json.dumps(transcript))}
    lines = [json.loads(line)["file"] for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert lines == list(map(str, paths))
    errors = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert [error["file"] for error in errors] == [str(tmp_path / "talks" / "broken.mp3"), sources[2]]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == str(folder)
    assert not list(out.rglob("*.tmp"))

    output = capsys.readouterr()
    for path, transcript in zip(paths, expected, strict=True):
        assert f"{path}: {transcript['text']}" in output.out
    reports = [line for line in output.err.splitlines() if line.startswith("graft: ")]
    assert len(reports) == 2
    assert any("broken.mp3: not readable as audio" in line for line in reports)
    assert any("missing.wav: No such file" in line for line in reports)
    assert "Traceback" not in output.err

    # Another recipe may not overwrite these results, the same one may, however fast.
    assert run(f"model={folder}", f"audio={paths[0]}", f"out={out}") == 2
    assert "holds another recipe's results: audio" in capsys.readouterr().err
    assert holds_results(str(out), TranscribeRecipe(model=str(folder), audio=sources, out=str(out), workers=1), ignore=HOW)


def test_without_out_it_prints_only(folder, tmp_path, capsys, monkeypatch):
    path = write_audio(tmp_path / "a.wav", 0.3)
    monkeypatch.chdir(tmp_path)
    assert run(f"model={folder}", "audio=a.wav") == 0
    assert capsys.readouterr().out.startswith("a.wav: ")
    assert list(tmp_path.iterdir()) == [path]


def test_instruction_and_context_reach_the_workers(tmp_path, capsys):
    folder = tiny.save_tiny_graft(tmp_path / "worded", trained_styles=["formatted"], trained_context=True)
    path, words = write_audio(tmp_path / "a.wav", 0.5), {"instruction": "formatted", "context": ["Aachen", "New York"]}
    assert run(f"model={folder}", f"audio={path}", "instruction=formatted", "context=[Aachen, New York]") == 0
    transcriber = load(folder)
    asked, plain = transcriber.transcribe(path, **words).text, transcriber.transcribe(path).text
    transcriber.close()
    assert asked != plain
    assert capsys.readouterr().out.strip() == f"{path}: {asked}".strip()


def test_a_deaf_model_is_refused_in_one_line(folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    deaf = tiny.save_tiny_graft(tmp_path / "deaf")
    state = load_file(deaf / "model.safetensors")
    save_file(
        state | {"audio_projector.linear.weight": state["audio_projector.linear.weight"] * 0}, deaf / "model.safetensors", {"format": "pt"}
    )
    assert run(f"model={deaf}", f"audio={write_audio(tmp_path / 'a.wav', 0.3)}") == 2
    errors = capsys.readouterr().err
    assert "all zeros, so the model is deaf" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model={folder}", "audio=[{empty}]"], "no audio in"),
        (["model={empty}", "audio=a.wav"], "has no config.json"),
        (["model={folder}", "audio=a.wav", "wrokers=2"], "did you mean 'workers'"),
        (["model={folder}", "audio=a.wav", "workers=0"], "workers=0"),
        (["model={folder}"], "key audio is required"),
        (
            ["model={folder}", "audio=a.wav", "instruction=formatted"],
            "instruction 'formatted': this checkpoint was trained for lower: give",
        ),
        (["model={folder}", "audio=a.wav", "instruction=Write a poem."], "instruction 'Write a poem.': this checkpoint was trained for"),
        (["model={folder}", "audio=a.wav", "context=[Aachen]"], "context: this checkpoint was not trained for lists of words"),
    ],
)
def test_what_is_wrong_from_the_start_is_one_line_and_exit_code_2(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    filled = [argument.format(folder=folder, empty=tmp_path / "empty") for argument in arguments]
    assert run(*filled, f"out={out}") == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("graft: error: ")
    assert message in errors
    assert "\n" not in errors
    assert not out.exists()


def test_recordings_are_found_once_and_in_order(tmp_path):
    for name in ["b.flac", "a.WAV", "sub/a.opus", "sub/readme.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_recordings([str(tmp_path), str(tmp_path / "b.flac")])
    assert [(recording.path.relative_to(tmp_path).as_posix(), recording.stem) for recording in found] == [
        ("a.WAV", "a"),
        ("b.flac", "b"),
        ("sub/a.opus", "sub/a"),
    ]
    (tmp_path / "b.mp3").touch()
    with pytest.raises(DataError, match=r"b\.flac and .*b\.mp3 would both become b\.txt"):
        find_recordings([str(tmp_path)])
