"""Test jobs.transcribe with an aligner on a local Ray: rows and files have words with times, in each channel."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import webvtt

from graft.inference.segments import Word
from tests.support import tiny_models
from tests.support.jobs import transcribe
from tests.support.spoken_words import concatenate, in_order, spoken

pytestmark = pytest.mark.usefixtures("ray_started")


@pytest.fixture(scope="module")
def graft(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("words") / "tiny-graft")


@pytest.mark.slow
@pytest.mark.bundled
def test_words_stand_in_rows_and_files_of_split_channels(graft, tmp_path):
    one, _, _ = concatenate(spoken("monday", "seven", "tuesday"), [0.3] * 4)
    two, _, _ = concatenate(spoken("three", "friday"), [0.3] * 3)
    sides = np.zeros((len(one.samples) + len(two.samples), 2), np.float32)
    sides[: len(one.samples), 0] = one.samples
    sides[len(one.samples) :, 1] = two.samples
    soundfile.write(tmp_path / "call.wav", sides, 16_000)
    out = tmp_path / "out"
    arguments = [f"model={graft}", f"audio={tmp_path / 'call.wav'}", f"out={out}", "channels=split", "aligner=whisper"]
    assert transcribe(*arguments, "formats=[json, srt, vtt]", "cues.duration_s=0.5") == 0
    (row,) = pq.read_table(out / "recordings").to_pylist()
    assert (row["error"], row["aligner"]) == (None, "whisper-base, cross-attention")
    assert [segment["channel"] for segment in row["segments"]] == [1, 2]
    for segment in row["segments"]:
        words = [Word(**word) for word in segment["words"]]
        assert " ".join(word.text for word in words) == segment["text"]
        assert in_order(words, segment["text"], segment["start_s"], segment["end_s"])
    told = json.loads((out / "files" / "call.wav.json").read_text())
    assert (told["segments"], told["aligner"]) == (row["segments"], row["aligner"])
    starts_s = [word["start_s"] for segment in row["segments"] for word in segment["words"]]
    for cues in (webvtt.read(out / "files" / "call.wav.vtt"), webvtt.from_srt(out / "files" / "call.wav.srt")):
        starts = [seconds(cue.start) for cue in cues]
        assert len(starts) >= 2
        assert all(min(abs(start - word) for word in starts_s) < 0.002 for start in starts)
        for channel in ("channel 1:", "channel 2:"):
            own = [cue for cue in cues if cue.text.startswith(channel)]
            assert own
            assert all(seconds(earlier.end) <= seconds(later.start) for earlier, later in pairwise(own))


def seconds(clock: str) -> float:
    hours, minutes, rest = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def test_what_is_no_aligner_is_one_line_before_anything_starts(graft, tmp_path, capsys):
    (tmp_path / "a.wav").write_bytes(b"not read")
    given = [f"model={graft}", f"audio={tmp_path / 'a.wav'}", f"aligner={graft}", f"out={tmp_path / 'out'}"]
    assert transcribe(*given) == 2
    assert "tiny-graft is a graft checkpoint, no aligner: give whisper" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
