"""Test the small graft of the package: small files, found by name, and low error rates on speakers it never saw."""

import json
from pathlib import Path

import numpy as np
import pytest

import graft
from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio
from graft.checkpoints.loading import base_checkpoint, model_digest, open_processor
from graft.checkpoints.release import FOLDER, installed_graft, read_pretrained
from graft.text.wer import score
from tests.support.paths import ROOT

SMALL = FOLDER / "small"
PROMPTS = ROOT / "jobs" / "data" / "prompts"


@pytest.fixture(scope="module")
def transcriber(bundled_weights):
    transcriber = graft.load("small")
    yield transcriber
    transcriber.close()


def test_its_files_are_small_and_say_what_they_are() -> None:
    sizes = {path.name: path.stat().st_size for path in SMALL.glob("*.safetensors")}
    assert len(sizes) > 1
    assert max(sizes.values()) < 5e6
    assert sum(sizes.values()) < 40e6
    card = (SMALL / "README.md").read_text()
    for word in ("CC BY 4.0", "CC BY-SA 3.0", "Kokoro", "LibriSpeech"):
        assert word in card
    assert {path.stem for path in (SMALL / "recipes").iterdir()} >= {"build", "stage1", "stage2"}


@pytest.mark.bundled
def test_its_name_opens_the_whole_graft() -> None:
    folder = installed_graft("small")
    assert base_checkpoint("small") == str(folder.resolve())
    assert model_digest("small") == model_digest(folder)
    trained = read_pretrained(SMALL)
    processor = open_processor("small")
    assert processor.text_style == trained.settings["text_style"]
    assert processor.trained_styles == trained.trained_styles


def test_a_folder_of_that_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_checkpoint("small") == str(tmp_path / "small")


def test_it_transcribes_unseen_speakers(transcriber: graft.Transcriber) -> None:
    rows = [json.loads(line) for line in (PROMPTS / "unseen.jsonl").read_text().splitlines()][:8]
    transcripts = transcriber.transcribe_many([read_audio(PROMPTS / row["audio"]) for row in rows])
    errors = score([row["text"] for row in rows], [transcript.text for transcript in transcripts])
    assert errors.wer < 0.35
    swapped = score(
        [row["text"] for row in rows], [transcript.text for transcript in [*transcripts[1:], transcripts[0]]]
    )
    assert swapped.wer > 0.9


def test_silence_has_an_empty_transcript(transcriber: graft.Transcriber) -> None:
    assert transcriber.transcribe(AudioClip(np.zeros(5 * SAMPLE_RATE, np.float32))).text == ""
