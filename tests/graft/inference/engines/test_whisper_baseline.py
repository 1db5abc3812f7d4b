"""The Whisper baseline transcribes real speech of any length, in any batch, with correct log-probabilities."""

import json

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from graft.audio.chunking import windows
from graft.audio.clip import AudioClip, read_audio
from graft.checkpoints.bundled.cache import bundled_whisper
from graft.inference.engines.whisper_baseline import MAX_TOKENS, WhisperBaseline
from graft.text.wer import score
from tests.support.paths import ROOT
from tests.support.speech_corpus import flac, save_tiny_whisper

PROMPTS = ROOT / "jobs" / "data" / "prompts"


@pytest.mark.slow
@pytest.mark.bundled
def test_speech_comes_out_right_batched_alone_and_over_30_s():
    rows = [json.loads(line) for line in (PROMPTS / "unseen.jsonl").read_text().splitlines()[:4]]
    texts = [row["text"] for row in rows]
    clips = [read_audio(PROMPTS / row["audio"]) for row in rows]
    whisper = WhisperBaseline(bundled_whisper(), batch_size=3)
    pause = np.zeros(16_000, np.float32)
    long = AudioClip(np.concatenate([part for clip in clips * 3 for part in (clip.samples, pause)]))
    assert long.duration_s > 30
    transcripts = whisper.transcribe_many([*clips, long])
    *together, long_text = [transcript.text for transcript in transcripts]
    assert all(-1 < transcript.mean_logprob < 0 for transcript in transcripts)
    assert score(texts, together).to_dict()["wer"] < 0.15
    assert score([" ".join(texts * 3)], [long_text]).to_dict()["wer"] < 0.25
    assert [transcript.text for transcript in whisper.transcribe_many([clips[1]])] == [together[1]]
    assert whisper.transcribe_many([]) == []


def test_confidence_is_the_mean_log_probability_of_teacher_forced_tokens(tmp_path):
    folder = save_tiny_whisper(tmp_path / "whisper")
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    clips = [read_audio(flac(seconds, seed)) for seed, seconds in enumerate((0.5, 12.0, 33.0, 29.0))]
    model.generation_config.suppress_tokens = [int(_answer(model, _features(extractor, clips[0]))[5])]
    model.generation_config.eos_token_id = int(_answer(model, _features(extractor, clips[3]))[3])
    model.save_pretrained(folder)

    answers = [[_teacher_forced(model, _features(extractor, chunk.clip)) for chunk in windows(clip)] for clip in clips]
    assert len(answers[2]) == 2
    # Some answers end before others of their batch.
    assert len({len(logprobs) for answer in answers for logprobs in answer}) > 1
    expected = [torch.cat(answer).mean().item() for answer in answers]
    together = WhisperBaseline(folder, batch_size=3).transcribe_many(clips)
    alone = WhisperBaseline(folder, batch_size=1).transcribe_many(clips)
    np.testing.assert_allclose([transcript.mean_logprob for transcript in together], expected, atol=1e-3)
    assert [transcript.text for transcript in together] == [transcript.text for transcript in alone]


def _features(extractor, clip: AudioClip) -> torch.Tensor:
    return extractor(clip.samples, sampling_rate=16_000, return_tensors="pt")["input_features"]


def _answer(model, features: torch.Tensor) -> torch.Tensor:
    """Return the tokens that stock Whisper writes, its start and end tokens included."""
    return model.generate(features, do_sample=False, num_beams=1, max_length=MAX_TOKENS, return_dict_in_generate=True)[
        "sequences"
    ][0]


@torch.inference_mode()
def _teacher_forced(model, features: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of stock Whisper's answer to a window, end token included, from a single pass."""
    ids = _answer(model, features)
    logits = model(features, decoder_input_ids=ids[None, :-1]).logits[0]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
