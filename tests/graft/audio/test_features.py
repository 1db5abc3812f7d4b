"""Compare Featurizer with transformers' WhisperFeatureExtractor, which pads every clip to 30 s."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.audio.features import HOP_LENGTH, TAIL_FRAMES, WINDOW_FRAMES, Features, Featurizer
from graft.errors import AudioError
from jobs.bench import main as bench

WINDOW = WINDOW_FRAMES * HOP_LENGTH
TOLERANCE = 1e-5

# Whole hops, one sample more and less; lengths at which the last frames' windows end before, at and past the clip; and
# lengths around the end of the 30 s window.
SAMPLE_COUNTS = [
    *(1, 39, 159, 160, 161, 1119, 1120, 1279, 1280, 1281),
    *(16_000, 16_001, 16_039, 16_040, 16_041, 16_119, 16_120, 16_121, 16_159),
    *(47_999, 123_456, 320_000, 479_599, 479_600, 479_601, 479_680),
    *(479_799, 479_840, 479_841, 479_959, 479_960, 479_961),
    *(WINDOW - 1, WINDOW),
]


def speech_like(sample_count: int, *, seed: int = 0, level: float = 0.3) -> AudioClip:
    rng = np.random.default_rng(seed)
    envelope = np.abs(np.sin(np.arange(sample_count) / 4000)) ** 3
    return AudioClip((level * envelope * rng.uniform(-1, 1, sample_count)).astype(np.float32))


def whisper(clip: AudioClip, mel_count: int = 80) -> np.ndarray:
    extractor = WhisperFeatureExtractor(feature_size=mel_count)
    return extractor(clip.samples, sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"][0]


def silence_value(largest: float) -> float:
    """Compute the feature of digital silence by Whisper's normalisation, from a clip's largest feature."""
    return (max(-10.0, 4 * float(largest) - 12) + 4) / 4


def assert_equals_whisper(features: Features, clip: AudioClip, mel_count: int) -> None:
    expected = whisper(clip, mel_count)
    length = min(features.frame_count + TAIL_FRAMES, WINDOW_FRAMES)
    assert features.frame_count == max(-(-len(clip.samples) // HOP_LENGTH), 8)  # 0.08 s
    assert features.mel.shape == (mel_count, length)
    assert features.mel.dtype == np.float32
    np.testing.assert_allclose(features.mel, expected[:, :length], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(expected[:, length:], silence_value(features.mel.max()), rtol=0, atol=TOLERANCE)


@pytest.mark.seconds
@pytest.mark.parametrize("mel_count", [80, 128])
@pytest.mark.parametrize("sample_count", SAMPLE_COUNTS)
def test_equals_whisper_at_every_kind_of_length(sample_count: int, mel_count: int) -> None:
    clip = speech_like(sample_count)
    assert_equals_whisper(Featurizer(mel_count)(clip), clip, mel_count)


@pytest.mark.parametrize("mel_count", [80, 128])
@pytest.mark.parametrize("level", [1.0, 1e-3, 1e-4, 1e-5, 1e-6, 1e-9, 0.0])
def test_equals_whisper_from_full_scale_to_digital_silence(level: float, mel_count: int) -> None:
    for sample_count in (20_000, 31_999):
        clip = speech_like(sample_count, level=level)
        assert_equals_whisper(Featurizer(mel_count)(clip), clip, mel_count)


def test_equals_whisper_on_a_click_at_either_end() -> None:
    for position in (0, 1, 199, 200, -200, -2, -1):
        for sample_count in (16_000, 16_100, WINDOW):
            clip = AudioClip(np.zeros(sample_count, np.float32))
            clip.samples[position] = 1
            assert_equals_whisper(Featurizer()(clip), clip, 80)


def test_the_tail_frames_are_needed_and_enough() -> None:
    clip = AudioClip(np.ones(16_000, np.float32))
    features = Featurizer()(clip)
    silence = silence_value(features.mel.max())
    assert np.abs(features.mel[:, features.frame_count] - silence).max() > 0.1
    assert np.abs(whisper(clip)[:, features.frame_count + TAIL_FRAMES :] - silence).max() <= TOLERANCE


def test_over_30_s_is_refused_with_both_lengths() -> None:
    with pytest.raises(AudioError, match=r"30\.01 s .* 30 s"):
        Featurizer()(AudioClip(np.zeros(WINDOW + 160, np.float32)))


def test_the_clip_is_left_as_it_was_and_may_be_read_only() -> None:
    clip = speech_like(10_000)
    before = clip.samples.copy()
    clip.samples.flags.writeable = False
    Featurizer()(clip)
    np.testing.assert_array_equal(clip.samples, before)


def test_a_featurizer_survives_pickling_and_gives_ordinary_arrays() -> None:
    clip = speech_like(10_000)
    features = pickle.loads(pickle.dumps(Featurizer()))(clip)
    np.testing.assert_array_equal(features.mel, Featurizer()(clip).mel)
    torch.from_numpy(features.mel).add_(1)


@pytest.mark.usefixtures("thread_count")
def test_the_benchmark_writes_the_numbers_that_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["features", "--seconds", "20", "--json", str(tmp_path / "features.json")]) == 0
    numbers = json.loads((tmp_path / "features.json").read_text())
    table = capsys.readouterr().out.partition("with the default options\n")[2]
    printed = {line.split()[0]: float(line.split()[1].replace(",", "")) for line in table.splitlines()}
    assert printed == {name: round(value, 2) for name, value in numbers.items()}
    assert numbers["graft_rtfx"] > 300  # the floor is 600; a shared machine stutters in so short a run
    assert numbers["ratio"] > 0.5


@pytest.mark.usefixtures("thread_count")
def test_the_benchmark_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    path = tmp_path / "file" / "a.json"
    assert bench(["features", "--seconds", "1", "--json", str(path)]) == 2
    assert capsys.readouterr().err == f"graft: error: {path} cannot be written: File exists: name another --json file\n"


def test_clips_in_a_scale_of_their_own_are_scaled_to_full_scale() -> None:
    samples = speech_like(SAMPLE_RATE).samples
    scaled = [Featurizer()(AudioClip(samples * np.float32(scale))).mel for scale in (2.0**15, 1e30)]
    np.testing.assert_allclose(scaled[0], scaled[1], atol=1e-4)
    np.testing.assert_allclose(scaled[0].mean(), Featurizer()(AudioClip(samples)).mel.mean(), atol=0.3)
    # A damaged spot in another scale is only clipped.
    clicked = samples.copy()
    clicked[5_000] = 1e9
    plain = samples.copy()
    plain[5_000] = 1.0
    np.testing.assert_array_equal(Featurizer()(AudioClip(clicked)).mel, Featurizer()(AudioClip(plain)).mel)
