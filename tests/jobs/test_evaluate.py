"""Test jobs.evaluate: it scores what jobs.transcribe writes, or windows, and on request more than the clips."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graft.audio.chunking import Chunker, ChunkSettings, windows
from graft.audio.clip import AudioClip, read_audio
from graft.audio.vad import SpeechSettings
from graft.data import nonspeech
from graft.data.dataset import clip_row
from graft.inference.transcriber import open_transcriber
from graft.text.wer import score
from jobs.common.cli import run_job
from jobs.evaluate import EvaluateRecipe
from jobs.evaluate import _check_models as check_models
from jobs.evaluate import run as run_evaluate
from tests.support import media, tiny_models
from tests.support.jobs import left_by_evaluate, transcribe
from tests.support.speech_corpus import BROKEN, corpus, row, save_tiny_whisper

pytestmark = pytest.mark.usefixtures("ray_started")


def run(*arguments: str) -> int:
    return run_job(EvaluateRecipe, run_evaluate, summary="", argv=list(arguments))


def spoken_corpus(folder: Path) -> str:
    """Write real speech, one clip of it longer than a chunk, a clip that cannot be decoded and one of silence."""
    long = clip_row("long", AudioClip(media.speech(16_000, seconds=40.0, channels=1)[:, 0]), "forty seconds")
    rows = [clip_row(path.stem, read_audio(path), path.stem) for path in media.SHORTEST_FIRST[:6]]
    silence = clip_row("silence", AudioClip(np.zeros(32_000, np.float32)), "nothing")
    return corpus(folder / "spoken.parquet", [*rows[:4], row("broken", 1, **BROKEN), long, silence, *rows[4:]])


def test_texts_are_those_that_transcribe_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graft, whisper = tiny_models.save_tiny_graft(tmp_path / "graft"), save_tiny_whisper(tmp_path / "whisper")
    data = spoken_corpus(tmp_path)
    settings = ["chunks.max_pause_s=0.4", "speech.threshold=0.4"]
    assert transcribe(f"model={graft}", f"audio={data}", f"out={tmp_path / 'transcripts'}", *settings) == 0
    table = pq.read_table(tmp_path / "transcripts" / "recordings")
    transcripts = {one["id"]: one for one in table.to_pylist()}
    given = [f"model={graft}", f"data.test={data}", f"baseline={whisper}", "expected.test.wer_raw=[0, 99]"]
    assert run(*given, f"out={tmp_path / 'out'}", "checks=4", "pictures=1", "batch_clips=3", *settings) == 0
    report, predictions = left_by_evaluate(tmp_path / "out")
    assert report["pipeline"] == "speech"
    assert [verdict["agrees"] for verdict in report["expected"]] == [True]
    assert "pipeline: speech (detected and cut into chunks, as graft transcribe does)" in capsys.readouterr().out
    heard = {line["id"]: line for line in predictions if line["set"] == "test"}
    assert heard.keys() == transcripts.keys()
    for name, line in heard.items():
        assert line["graft"] == (transcripts[name]["text"] if name != "broken" else None)
    assert len(transcripts["long"]["segments"]) > 1
    assert len({line["graft"] for line in heard.values()}) > 5
    assert heard["silence"]["graft"] == heard["silence"]["whisper"] == ""
    systems = report["sets"]["test"]["systems"]
    for kind in ("graft", "whisper"):  # what could not be read counts, too
        assert (systems[kind]["clips"], systems[kind]["answered"]) == (len(heard), len(heard) - 1)
        assert systems[kind]["failed"] == {"broken": transcripts["broken"]["error"]}
    checks = {one["name"]: one for one in report["honesty"]["checks"]}
    assert [name for name, one in checks.items() if one["ok"] is None] == [
        "overlap",
        "swapped_audio",  # the tiny model hears nothing
        "context_words",
    ]
    assert checks["duplicates"]["ok"]
    assert checks["overlap"]["verdict"].startswith("It was not checked: the model's folder does not say")
    assert "the references have too few rare words" in checks["context_words"]["verdict"]
    assert report["vision"]["verdict"].endswith("was built on: give vision_base.")
    answers = [json.loads(line) for line in (tmp_path / "out" / "checks.jsonl").open()]
    assert {line["system"] for line in answers} == {"graft"}
    assert sum(line["set"] == "swapped" for line in answers) == checks["swapped_audio"]["numbers"]["clips"] == 4

    # Whisper transcribes the same chunks.
    chunker = Chunker(SpeechSettings(threshold=0.4), ChunkSettings(max_pause_s=0.4))
    baseline = open_transcriber(whisper, chunker=chunker)
    for one in pq.read_table(data).to_pylist():
        if one["ID"] != "broken":
            assert heard[one["ID"]]["whisper"] == baseline.transcribe(one["wav"]["bytes"]).text
    baseline.close()


@pytest.mark.slow
def test_windows_instructions_and_recordings_are_scored_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1, because two of the rates are not as expected."""
    graft = tiny_models.save_tiny_graft(tmp_path / "graft", trained_styles=["formatted"])
    rows = [row(f"t{seed}", seed) for seed in range(26)]
    rows.insert(3, row("broken", 30, **BROKEN))
    data = corpus(tmp_path / "test.parquet", rows)
    other = spoken_corpus(tmp_path)
    given = [f"model={graft}", f"data={{test: {data}, a/b: {other}}}", f"out={tmp_path / 'out'}", "baseline="]
    expected = {"wer_raw": [0.5, 99], "cer_raw": [98.5, 99], "wer": [0, 0.001]}
    given += [f"expected.a/b.{rate}={bounds}" for rate, bounds in expected.items()]
    assert run(*given, "instructions=[formatted]", "recordings_s=31", "windows=true", "checks=0") == 1
    report, predictions = left_by_evaluate(tmp_path / "out")
    printed = capsys.readouterr().out
    kinds = {"graft", "graft formatted"}
    sets = {"test", "test joined", "a/b", "a/b joined"}
    assert {name: one["systems"].keys() for name, one in report["sets"].items()} == dict.fromkeys(sets, kinds)
    for name, one in report["sets"].items():
        heard = [line for line in predictions if line["set"] == name]
        for kind in kinds:
            wanted = score([line["text"] for line in heard], [line[kind] or "" for line in heard])
            for rate in ("wer", "cer", "wer_raw", "cer_raw", "words", "clips"):
                assert one["systems"][kind][rate] == pytest.approx(getattr(wanted, rate))

    # Recordings are the readable clips in their order; each instruction gives what the Transcriber gives for it.
    readable = [one for one in rows if one["ID"] != "broken"]
    clips = [read_audio(one["wav"]["bytes"]) for one in readable]
    recordings = [line for line in predictions if line["set"] == "test joined"]
    assert len(recordings) == 2
    assert " ".join(line["text"] for line in recordings) == " ".join(one["text"] for one in readable)
    first = next(place for place, one in enumerate(readable, start=1) if recordings[0]["id"] == f"t0..{one['ID']}")
    parts = [piece for clip in clips[:first] for piece in (clip.samples, np.zeros(8000, np.float32))]
    recording = AudioClip(np.concatenate(parts))
    assert 31 <= recording.duration_s < 33
    transcriber = open_transcriber(graft, chunker=windows)
    plain = [line for line in predictions if line["set"] == "test" and line["id"] != "broken"]
    for kind, instruction in (("graft", None), ("graft formatted", "formatted")):
        assert [line[kind] for line in plain] == [
            one.text for one in transcriber.transcribe_many(clips, instruction=instruction)
        ]
        assert recordings[0][kind] == transcriber.transcribe(recording, instruction=instruction).text
    assert any(line["graft"] != line["graft formatted"] for line in plain)
    lines = [line.split() for line in printed.splitlines()]
    shown = [line[:4] for line in lines if line[:3] == ["test", "joined", "graft"]]
    assert shown == [["test", "joined", "graft", "2"], ["test", "joined", "graft", "formatted"]]

    # Windows are of all of a clip, its silence and what is over 30 s included, and the report says so.
    assert report["pipeline"] == "windows"
    assert "pipeline: windows (all of each clip, without the speech detector)" in printed
    assert report["sets"]["a/b"]["systems"]["graft"]["failed"].keys() == {"broken"}
    spoken = {one["ID"]: one["wav"]["bytes"] for one in pq.read_table(other).to_pylist()}
    heard = {line["id"]: line["graft"] for line in predictions if line["set"] == "a/b"}
    assert heard.keys() == spoken.keys()
    assert heard.pop("broken") is None
    assert heard["silence"]
    assert heard == {name: transcriber.transcribe(spoken[name]).text for name in heard}
    transcriber.close()

    found = report["sets"]["a/b"]["systems"]["graft"]
    assert report["expected"] == [
        {"set": "a/b", "rate": "wer_raw", "found": found["wer_raw"], "low": 0.5, "high": 99, "agrees": True},
        {"set": "a/b", "rate": "cer_raw", "found": found["cer_raw"], "low": 98.5, "high": 99, "agrees": False},
        {"set": "a/b", "rate": "wer", "found": found["wer"], "low": 0, "high": 0.001, "agrees": False},
    ]
    assert f"a/b: wer_raw {found['wer_raw']:.2%} agrees with the expected 50.00% to 9900.00%" in printed
    assert f"a/b: cer_raw {found['cer_raw']:.2%} does not agree with the expected" in printed


def test_a_model_is_named_by_its_kind_and_is_no_baseline_of_its_own(tmp_path: Path) -> None:
    graft, whisper = str(tiny_models.save_tiny_graft(tmp_path / "graft")), save_tiny_whisper(tmp_path / "whisper")
    other = save_tiny_whisper(tmp_path / "other")
    for model, baseline, named in [
        (graft, whisper, {"graft": graft, "whisper": whisper}),
        (whisper, other, {"whisper": whisper, "baseline": other}),
        (whisper, whisper, {"whisper": whisper}),
        (whisper, graft, {"whisper": whisper, "graft": graft}),
        (graft, None, {"graft": graft}),
    ]:
        recipe = EvaluateRecipe(model=model, data={}, out="unused", baseline=baseline)
        assert list(check_models(recipe).items()) == list(named.items())


@pytest.mark.slow
def test_a_whisper_is_scored_as_a_graft_is(tmp_path: Path) -> None:
    whisper = save_tiny_whisper(tmp_path / "whisper")
    data = corpus(tmp_path / "test.parquet", [row("t0", 0), row("t1", 1)])
    given = [f"model={whisper}", f"data.test={data}", f"out={tmp_path / 'out'}", "baseline=", "windows=true"]
    assert run(*given, "checks=2", "expected.test.wer_raw=[0, 99]") == 0
    report, predictions = left_by_evaluate(tmp_path / "out")
    assert {(name, *one["systems"]) for name, one in report["sets"].items()} == {("test", "whisper")}
    transcriber = open_transcriber(whisper, chunker=windows)
    texts = [transcriber.transcribe(wav["bytes"]).text for wav in pq.read_table(data)["wav"].to_pylist()]
    transcriber.close()
    assert [line["whisper"] for line in predictions] == texts
    answers = [json.loads(line) for line in (tmp_path / "out" / "checks.jsonl").open()]
    assert [line["hypothesis"] for line in answers if line["set"] == "swapped"] == list(reversed(texts))
    assert all(texts)


@pytest.mark.slow
def test_what_is_written_where_nobody_speaks_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nonspeech, "LENGTHS_S", ((2.0, 2.5),))  # a model of any size takes minutes for the real ones
    graft, whisper = tiny_models.save_tiny_graft(tmp_path / "graft"), save_tiny_whisper(tmp_path / "whisper")
    data = corpus(tmp_path / "test.parquet", [row("t0", 0)])
    given = [f"model={graft}", f"data.test={data}", f"out={tmp_path / 'out'}", f"baseline={whisper}"]
    assert run(*given, "sounds=true", "windows=true", "checks=0") == 0
    report, predictions = left_by_evaluate(tmp_path / "out")
    made = [sound for kind in nonspeech.SOUNDS for sound in nonspeech.generate_sounds(kind)]
    assert report["sets"].keys() == {"test", *nonspeech.SOUNDS}
    assert [line["id"] for line in predictions] == ["t0", *(sound.name for sound in made)]
    for kind in nonspeech.SOUNDS:
        minutes = sum(sound.clip.duration_s for sound in made if sound.kind == kind) / 60
        for model in ("graft", "whisper"):
            written = [len(line[model]) for line in predictions if line["set"] == kind]
            found = report["sets"][kind]["systems"][model]
            assert "wer" not in found
            assert (found["clips"], found["share_with_text"]) == (len(written), np.mean(np.array(written) > 0))
            assert found["minutes"] == pytest.approx(minutes)
            assert found["chars_per_minute"] == pytest.approx(sum(written) / minutes)
    assert report["sets"]["noise"]["systems"]["graft"]["chars_per_minute"] > 0  # it is not trained to keep silent
    texts = {line["graft"] for line in predictions}
    assert len(texts) > 3  # it hears which sound it is
    printed = capsys.readouterr().out.splitlines()
    below = printed[next(place for place, line in enumerate(printed) if line.startswith("no speech")) :]
    assert [line.split()[:2] for line in below[1:9]] == [
        [kind, model] for kind in nonspeech.SOUNDS for model in ("graft", "whisper")
    ]


def test_what_can_not_be_scored_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graft = tiny_models.save_tiny_graft(tmp_path / "graft", trained_styles=["formatted"])
    data = corpus(tmp_path / "test.parquet", [row("t0", 0)])
    given = [f"model={graft}", f"data.test={data}", f"out={tmp_path / 'out'}", "baseline="]
    capsys.readouterr()  # progress of saving the graft
    for arguments, words in [
        (
            ["instructions=[formatted, raw]"],
            "instruction 'raw': this checkpoint was trained for lower, formatted: give one of these",
        ),
        (["recordings_s=20"], "recordings_s=20: give a number over 30 or null"),
        (["expected.nothing.wer=[0, 1]"], "expected=nothing is no set of data (test)"),
        (["sounds=true", f"data.noise={data}"], "data.noise: that name is taken by a set which is made here"),
        (["recordings_s=60", f"data.test joined={data}"], "data.test joined: that name is taken"),
        ([f"data.swapped={data}"], "data.swapped: that name is taken"),
    ]:
        assert run(*given, *arguments) == 2
        errors = capsys.readouterr().err
        assert words in errors
        assert errors.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"graft", "test.parquet"}
