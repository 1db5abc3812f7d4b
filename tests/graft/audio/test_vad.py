"""Speech detection gives Silero's own scores, and finds all speech and nothing else."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.audio.chunking import ChunkSettings, speech_chunks
from graft.audio.clip import SAMPLE_RATE, AudioClip, read_audio
from graft.audio.silero import REQUIREMENT
from graft.audio.vad import FRAME, SpeechDetector, SpeechSettings, speech_spans
from graft.data.nonspeech import SOUNDS, generate_sounds
from graft.errors import MissingExtra
from tests.support.paths import ROOT

PROMPTS = sorted((ROOT / "jobs" / "data" / "prompts" / "audio").glob("*.flac"))[::4]
"""Files with a minute of speech in all."""

DETECTORS = ("silero", "energy")


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request: pytest.FixtureRequest) -> SpeechDetector:
    return SpeechDetector(SpeechSettings(detector=request.param))


@pytest.fixture(scope="module")
def silero() -> SpeechDetector:
    return SpeechDetector()


def loud(samples: np.ndarray) -> np.ndarray:
    """Mark the samples in those 10 ms that are within 35 dB of the loudest."""
    whole = len(samples) // 160 * 160
    level = 10 * np.log10(np.square(samples[:whole].reshape(-1, 160)).mean(axis=1) + 1e-12)
    return np.pad(np.repeat(level > level.max() - 35, 160), (0, len(samples) - whole))


def recording(
    *, pause_s: tuple[float, float] = (0.3, 6.0), noise_dbfs: float = -90.0, gain_db: float = 0.0
) -> tuple[AudioClip, np.ndarray]:
    """Join prompts with pauses in noise; returns the clip and a mask of its samples with speech."""
    rng = np.random.default_rng(7)
    samples, spoken = [], []
    for path in PROMPTS:
        prompt, pause = read_audio(path).samples, round(rng.uniform(*pause_s) * SAMPLE_RATE)
        samples += [prompt * 10 ** (gain_db / 20), np.zeros(pause)]
        spoken += [loud(prompt), np.zeros(pause, bool)]
    joined = np.concatenate(samples)
    noisy = joined + rng.normal(0, 10 ** (noise_dbfs / 20), len(joined))
    return AudioClip(noisy.astype(np.float32)), np.concatenate(spoken)


def chunk_mask(clip: AudioClip, detector: SpeechDetector) -> np.ndarray:
    """Mark the samples that are in chunks."""
    mask = np.zeros(len(clip.samples), bool)
    for chunk in speech_chunks(clip, detector.find(clip), ChunkSettings(max_pause_s=0.5)):
        start = round(chunk.start_s * SAMPLE_RATE)
        stop = start + len(chunk.clip.samples)
        np.testing.assert_array_equal(clip.samples[start:stop], chunk.clip.samples)
        assert not mask[start:stop].any()
        mask[start:stop] = True
    return mask


def test_scores_are_those_of_sileros_own_model(silero: SpeechDetector) -> None:
    clip, _ = recording(pause_s=(0.1, 0.2))
    samples = clip.samples[: 20 * SAMPLE_RATE + 100]  # This is longer than a block, and no whole number of frames.
    package = importlib.util.find_spec("silero_vad")
    assert package is not None
    assert package.origin is not None
    model = torch.jit.load(str(Path(package.origin).parent / "data" / "silero_vad.jit"))
    padded = torch.from_numpy(np.pad(samples, (0, -len(samples) % FRAME)))
    with torch.no_grad():
        own = torch.cat([model(window, SAMPLE_RATE).flatten() for window in padded.split(FRAME)])
    scores = silero.find(AudioClip(samples)).scores
    assert len(scores) == -(-len(samples) // FRAME)
    np.testing.assert_allclose(scores, own.numpy(), atol=1e-4)
    assert np.ptp(scores) > 0.9


def test_the_package_is_not_imported_and_threads_stay(silero: SpeechDetector) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        SpeechDetector().find(AudioClip(np.zeros(SAMPLE_RATE, np.float32)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert "silero_vad" not in sys.modules


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    SpeechDetector(SpeechSettings(detector="energy"))
    with pytest.raises(MissingExtra, match="pip install --no-deps silero-vad=="):
        SpeechDetector()
    assert f'"{REQUIREMENT}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("changed", [{}, {"noise_dbfs": -50.0}, {"gain_db": -20.0}], ids=str)
def test_all_speech_is_passed_on_and_pauses_are_not(detector: SpeechDetector, changed: dict[str, float]) -> None:
    clip, spoken = recording(**changed)  # type: ignore[arg-type]
    found = chunk_mask(clip, detector)
    assert found[spoken].mean() > 0.998
    count, places = np.concatenate([[0], np.cumsum(spoken)]), np.arange(len(spoken))
    near = count[np.minimum(places + SAMPLE_RATE // 2, len(spoken))] > count[np.maximum(places - SAMPLE_RATE // 2, 0)]
    assert found[~near].mean() < 0.05
    assert (~near).mean() > 0.2


def test_silero_hears_speech_in_loud_noise_and_far_away(silero: SpeechDetector) -> None:
    for changed in ({"noise_dbfs": -30.0}, {"gain_db": -35.0}):
        clip, spoken = recording(**changed)  # type: ignore[arg-type]
        found = chunk_mask(clip, silero)
        assert found[spoken].mean() > 0.99, changed
        assert found[~spoken].mean() < 0.4, changed


@pytest.mark.parametrize("kind", SOUNDS)
def test_silero_finds_no_speech_where_nobody_speaks(
    silero: SpeechDetector, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.data.nonspeech.LENGTHS_S", ((8.0, 12.0),))
    for sound in generate_sounds(kind):
        assert silero.find(sound.clip).spans == (), sound.name


def test_energy_finds_none_in_silence_little_in_noise_and_says_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.data.nonspeech.LENGTHS_S", ((8.0, 12.0),))
    energy = SpeechDetector(SpeechSettings(detector="energy"))
    assert all(energy.find(sound.clip).spans == () for sound in generate_sounds("silence"))
    noises = [sound.clip for sound in generate_sounds("noise")]
    assert np.mean([chunk_mask(clip, energy).mean() for clip in noises]) < 0.1
    assert energy.find(noises[0]).detector == "energy"


def test_the_result_says_who_found_it(detector: SpeechDetector) -> None:
    assert detector.find(AudioClip(np.zeros(0, np.float32))).detector == detector.settings.detector


@pytest.mark.parametrize("count", [0, 1, FRAME - 1, FRAME, FRAME + 1])
def test_next_to_nothing_holds_no_speech(detector: SpeechDetector, count: int) -> None:
    speech = detector.find(AudioClip(np.zeros(count, np.float32)))
    assert speech.spans == ()
    assert len(speech.scores) == -(-count // FRAME)


def test_a_recording_gives_the_same_bits_again(detector: SpeechDetector) -> None:
    clip, _ = recording(pause_s=(0.1, 0.3))
    samples = clip.samples[: 40 * SAMPLE_RATE + 77]
    first, again = detector.find(AudioClip(samples)), detector.find(AudioClip(samples))
    assert first.spans == again.spans
    assert len(first.spans) > 3
    np.testing.assert_array_equal(first.scores, again.scores)


def test_spans_bridge_stops_and_leave_out_clicks() -> None:
    scores = np.zeros(100)
    scores[10:20] = scores[22:30] = 0.9  # 64 ms apart
    scores[40:42] = 1.0  # 64 ms long
    scores[50:60] = 0.45  # never 0.5
    scores[65:67], scores[68:72], scores[73:80] = 0.15, 0.6, 0.3  # begins faintly, and so ends
    scores[90:93] = 0.08
    scores[96:] = 0.7
    found = speech_spans(scores, 100 * FRAME - 5, 0.5)
    assert found == [(10 * FRAME, 30 * FRAME), (65 * FRAME, 80 * FRAME), (96 * FRAME, 100 * FRAME - 5)]


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(0, 1), max_size=60),
    short=st.integers(0, FRAME - 1),
    thresholds=st.tuples(*[st.floats(0.05, 0.95)] * 2),
)
def test_spans_are_ordered_and_apart_and_a_lower_threshold_finds_no_less(
    scores: list[float], short: int, thresholds: tuple[float, float]
) -> None:
    sample_count = max(len(scores) * FRAME - short, 0)
    few, many = (
        speech_spans(np.array(scores), sample_count, threshold) for threshold in sorted(thresholds, reverse=True)
    )
    for spans in (few, many):
        flat = [place for span in spans for place in span]
        assert flat == sorted(set(flat))
        assert all(0 <= place <= sample_count for place in flat)
    assert all(any(start <= inner[0] and inner[1] <= end for start, end in many) for inner in few)
