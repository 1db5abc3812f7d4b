"""Test jobs.label with a tiny Whisper on a local Ray, and a corpus that reads the texts it wrote."""

import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from graft.audio.chunking import windows
from graft.audio.clip import read_audio
from graft.data.dataset import read_rows
from graft.data.settings import Source
from graft.inference.transcriber import open_transcriber
from jobs.common.cli import run_job
from jobs.label import LabelRecipe, doubt
from jobs.label import run as run_label
from jobs.transcription.pipeline import ClipTranscript
from tests.support.speech_corpus import BROKEN, corpus, flac, row, save_tiny_whisper

pytestmark = pytest.mark.usefixtures("ray_started")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    return save_tiny_whisper(tmp_path_factory.mktemp("label") / "whisper")


def clip_of(name: str, seed: int, seconds: float) -> dict[str, Any]:
    return row(name, seed, text="", duration=seconds, wav={"bytes": flac(seconds, seed), "path": f"{name}.flac"})


def run(*arguments: str) -> int:
    return run_job(LabelRecipe, run_label, summary="", argv=list(arguments))


@pytest.mark.slow
def test_a_confident_transcript_becomes_the_text(whisper, tmp_path, capsys):
    clips = [clip_of(f"clip{seed}", seed, 3.0 + 6 * seed) for seed in range(5)]
    transcriber = open_transcriber(whisper, chunker=windows)
    transcripts = transcriber.transcribe_many([read_audio(clip["wav"]["bytes"]) for clip in clips])
    transcriber.close()
    heard = [segment for transcript in transcripts for segment in transcript.segments]  # one of each clip
    logprobs = sorted(hearing.mean_logprob for hearing in heard)
    least = (logprobs[1] + logprobs[2]) / 2
    assert logprobs[2] - logprobs[1] > 1e-3
    data = corpus(
        tmp_path / "clips.parquet", [*clips, row("own", 7, text="Its own."), row("broken", 8, text=" ", **BROKEN)]
    )
    arguments = [f"data={data}", f"out={tmp_path / 'out'}", f"model={whisper}", f"least_confidence={least}"]
    loose = ["most_compression=1000", "least_chars_per_s=0", "most_chars_per_s=1000"]  # it answers at random
    assert run(*arguments, *loose, "batch_clips=2", "part_clips=4") == 0

    lines = {line["ID"]: line for line in pq.read_table(tmp_path / "out" / "texts.parquet").to_pylist()}
    assert list(lines) == [*(clip["ID"] for clip in clips), "own", "broken"]
    for clip, hearing in zip(clips, heard, strict=True):
        line, sure = lines[clip["ID"]], hearing.mean_logprob >= least
        assert (line["heard"], line["state"]) == (hearing.text, "labelled" if sure else "unsure")
        assert line["text"] == (hearing.text if sure else "")
        assert line["mean_logprob"] == pytest.approx(hearing.mean_logprob, abs=1e-3)
        assert line["duration"] == pytest.approx(clip["duration"], abs=0.01)
    assert [lines["own"]["state"], lines["broken"]["state"]] == ["own", "unheard"]
    rows = read_rows(Source(files=data, texts=str(tmp_path / "out" / "texts.parquet")))
    assert {rows.id(place): rows.text(place) for place in range(len(rows))} == {
        name: line["text"] for name, line in lines.items()
    }
    assert (lines["own"]["text"], lines["broken"]["text"]) == ("Its own.", "")

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    kept_s = sum(line["duration"] for line in lines.values() if line["state"] == "labelled")
    assert result == {
        "clips": 7,
        "labelled": 3,
        "own": 1,
        "hours": pytest.approx(kept_s / 3600, abs=1e-4),
        "hours_heard": pytest.approx(sum(clip["duration"] for clip in clips) / 3600, abs=1e-4),
        "rejected": {"silent": 0, "loop": 0, "rate": 0, "unsure": 2, "unheard": 1},
    }
    told = capsys.readouterr()
    assert (
        "label: of 7 clips 3 are labelled, 0.02 of 0.02 h, 1 had a text, rejected 2 unsure, 1 unheard; see" in told.out
    )
    assert "graft: broken: not readable as audio" in told.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"texts.parquet", "result.json", "recipe.yaml"}

    assert run(*arguments, *loose, "batch_clips=2", "part_clips=4", "workers=2") == 0
    assert "is done already" in capsys.readouterr().out
    assert run(*arguments, *loose, "batch_clips=2", "part_clips=5") == 2
    assert run(*arguments[:1], f"out={tmp_path / 'none'}", f"model={data}") == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "duration_s", "mean_logprob", "reason"),
    [
        ("Nobody is available to take your call at the moment.", 3.0, -0.1, None),
        ("", 3.0, -0.1, "silent"),
        (" ... ", 0.2, -0.1, "silent"),
        ("Thank you for watching. " * 8, 20.0, -0.1, "loop"),
        ("You", 30.0, -0.1, "rate"),
        ("Nobody is available to take your call at the moment.", 1.0, -0.1, "rate"),
        ("Nobody is available to take your call at the moment.", 3.0, -1.5, "unsure"),
    ],
)
def test_doubts(text, duration_s, mean_logprob, reason):
    recipe = LabelRecipe(data="unused", out="unused")
    assert doubt(ClipTranscript(text, duration_s=duration_s, mean_logprob=mean_logprob), recipe) == reason
