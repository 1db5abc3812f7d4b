"""The Whisper baseline on the bundled Whisper base: real speech, whatever shares the batch, any length."""

import json
from pathlib import Path

import numpy as np

from graft.audio import AudioClip, read_audio
from graft.engines.whisper import WhisperBaseline
from graft.model.bundled import bundled_whisper
from graft.scoring import score

PROMPTS = Path(__file__).parents[1] / "jobs" / "data" / "prompts"


def test_speech_comes_out_right_batched_alone_and_over_30_s():
    rows = [json.loads(line) for line in (PROMPTS / "unseen.jsonl").read_text().splitlines()[:4]]
    texts = [row["text"] for row in rows]
    clips = [read_audio(PROMPTS / row["audio"]) for row in rows]
    whisper = WhisperBaseline(bundled_whisper(), batch_size=3)
    pause = np.zeros(16_000, np.float32)
    long = AudioClip(np.concatenate([part for clip in clips * 3 for part in (clip.samples, pause)]))
    assert long.duration_s > 30
    *together, long_text = whisper.transcribe_many([*clips, long])
    assert score(texts, together).to_dict()["wer"] < 0.15
    assert score([" ".join(texts * 3)], [long_text]).to_dict()["wer"] < 0.25
    assert whisper.transcribe_many([clips[1]]) == [together[1]]
    assert whisper.transcribe_many([]) == []
