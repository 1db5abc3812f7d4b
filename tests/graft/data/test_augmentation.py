"""Augmentation follows from sample seeds alone, and keeps clips within the limits of the plan and of Whisper."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.audio.clip import AudioClip, read_audio
from graft.audio.features import Features, Featurizer
from graft.config import read_recipe
from graft.data.augmentation import (
    NOISE_KINDS,
    Augmenter,
    NoiseClip,
    change_speed,
    generate_noise,
    limit_band,
    no_speech_clip,
    no_speech_durations,
    reverberate,
    room_response,
    sample_speeds,
    telephone,
)
from graft.data.row_groups import StoredAudio
from graft.data.settings import AugmentRecipe, SpecAugmentRecipe
from graft.errors import DataError, RecipeError
from tests.support.paths import ROOT
from tests.support.speech_corpus import flac

EVERYTHING = {
    "speed": [0.9, 1.0, 1.1],
    "gain_db": (-6, 6),
    "room": {"share": 0.5},
    "noise": {"share": 0.5, "snr_db": (5, 20)},
    "band": {"share": 0.5},
    "telephone": 0.5,
    "specaugment": {"time_masks": 2, "time_s": 0.3, "freq_masks": 2, "freq_bins": 15},
}


def tone(hertz: float = 440.0, seconds: float = 1.0, level: float = 0.3) -> AudioClip:
    return AudioClip((level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * 16_000)) / 16_000)).astype(np.float32))


def loudest_hertz(samples: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples))


def digest(sample_seed: int) -> str:
    """Digest a clip and its features after all augmentations."""
    augmenter = Augmenter(AugmentRecipe(**EVERYTHING))
    clip = augmenter.clip(read_audio(flac(2.0, 1)), sample_seed, duration_s=2.0)
    features = augmenter.features(Featurizer()(clip), sample_seed)
    return hashlib.sha256(clip.samples.tobytes() + features.mel.tobytes()).hexdigest()


@pytest.mark.processes
def test_equal_seeds_give_equal_bits_in_another_process_too():
    code = "from tests.graft.data.test_augmentation import digest; print(*[digest(seed) for seed in range(8)])"
    here = [digest(sample_seed) for sample_seed in range(8)]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == here
    assert len(set(here)) == 8


def test_without_a_recipe_nothing_changes():
    augmenter, clip = Augmenter(AugmentRecipe()), read_audio(flac(1.0))
    features = Featurizer()(clip)
    assert augmenter.clip(clip, 5, duration_s=1.0).samples is clip.samples
    assert augmenter.features(features, 5) is features


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_speed_changes_length_and_pitch(factor):
    clip = change_speed(tone(), factor)
    assert clip.samples.dtype == np.float32
    assert len(clip.samples) == round(16_000 / factor)
    assert loudest_hertz(clip.samples) == pytest.approx(440 * factor, abs=2)
    assert np.abs(clip.samples).max() == pytest.approx(0.3, rel=0.05)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([0.5, 0.8, 0.9, 1.0, 1.1, 1.5]), min_size=1, max_size=4),
    st.floats(0.08, 30.0),
    st.integers(0, 2**63 - 1),
)
def test_no_clip_is_slowed_down_past_whispers_window(factors, duration_s, sample_seed):
    speed = sample_speeds(factors, np.array([duration_s]), np.array([sample_seed]))[0]
    assert duration_s / speed <= max(29.9, duration_s) + 1e-9
    assert speed in [*factors, 1.0]
    if max(factors) >= 1:
        assert speed in factors


def test_every_factor_that_fits_is_drawn_as_often():
    sample_seeds = np.arange(30_000)
    for seconds, shares in ((10.0, [1 / 3, 1 / 3, 1 / 3]), (28.0, [0, 1 / 2, 1 / 2])):
        speeds = sample_speeds([0.9, 1.0, 1.1], np.full(30_000, seconds), sample_seeds)
        assert [(speeds == factor).mean() for factor in (0.9, 1.0, 1.1)] == pytest.approx(shares, abs=0.01)
    assert set(sample_speeds([0.9], np.array([29.0, 10.0]), np.arange(2))) == {1.0, 0.9}


def test_noise_stands_at_the_ratio_that_was_asked_for():
    clip = read_audio(flac(2.0, 3))
    augmenter = Augmenter(AugmentRecipe(noise={"share": 1.0, "snr_db": (10, 10)}))
    for sample_seed in range(12):  # These cover all kinds of noise.
        added = augmenter.clip(clip, sample_seed, duration_s=2.0).samples - clip.samples
        assert 10 * np.log10(np.mean(clip.samples**2) / np.mean(added**2)) == pytest.approx(10, abs=0.05)


def test_noises_have_the_spectrum_of_their_name():
    speech, rng = tone(1000, 4.0).samples, np.random.default_rng(0)
    power = {kind: np.abs(np.fft.rfft(generate_noise(kind, speech, rng))) ** 2 for kind in NOISE_KINDS}
    low, high = slice(400, 4000), slice(16_000, 19_600)  # bins of a quarter Hz: 100 to 1000 Hz, 4000 to 4900
    assert power["white"][low].mean() == pytest.approx(power["white"][high].mean(), rel=0.1)
    assert power["pink"][low].mean() > 5 * power["pink"][high].mean()
    assert int(power["speech-shaped"].argmax()) == 4000


def test_noise_is_added_to_its_share_of_samples():
    augmenter, clip = Augmenter(AugmentRecipe(noise={"share": 0.25})), tone(seconds=0.1)
    noisy = sum(
        augmenter.clip(clip, sample_seed, duration_s=0.1).samples is not clip.samples for sample_seed in range(400)
    )
    assert 70 <= noisy <= 130


def test_noise_is_that_of_a_clip_where_one_is_given():
    clip, recipe = tone(seconds=1.0), AugmentRecipe(noise={"share": 1.0, "snr_db": (0, 0)})
    for sample_seed, seconds in enumerate((0.3, 3.0, 0.3, 3.0)):
        noise = NoiseClip("n", StoredAudio(flac(seconds, sample_seed), "n.flac"))
        added = Augmenter(recipe).clip(clip, sample_seed, duration_s=1.0, noise=noise).samples - clip.samples
        source = noise.audio.clip().samples
        assert np.abs(np.correlate(added[:2000], source, "full")).max() > 0.5 * np.sum(added[:2000] ** 2) ** 0.5
        one, other = (no_speech_clip(1.0, sample_seed, noise).samples for _ in range(2))
        assert np.array_equal(one, other)
    broken = NoiseClip("bad", StoredAudio(b"no audio", "broken.flac"))
    with pytest.raises(DataError, match=r"noise clip bad: broken\.flac: not readable as audio"):
        Augmenter(recipe).clip(clip, 1, duration_s=1.0, noise=broken)


def test_gain_amplifies_within_its_limits_and_never_past_full_scale():
    augmenter, clip = Augmenter(AugmentRecipe(gain_db=(-12, 12))), tone(level=0.5)
    peaks = np.array(
        [np.abs(augmenter.clip(clip, sample_seed, duration_s=1.0).samples).max() for sample_seed in range(200)]
    )
    assert peaks.max() == pytest.approx(1.0, abs=1e-6)
    assert 0.5 * 10 ** (-12 / 20) <= peaks.min() < 0.16
    assert len(np.unique(peaks)) > 100


def test_masks_stay_in_the_clip_and_hold_its_mean():
    mel = np.random.default_rng(0).normal(size=(80, 402)).astype(np.float32)
    before = mel.copy()
    augmenter = Augmenter(
        AugmentRecipe(specaugment=SpecAugmentRecipe(time_masks=1, time_s=5, freq_masks=1, freq_bins=10))
    )
    widths, heights = [], []
    for sample_seed in range(100):
        masked = augmenter.features(Features(mel, 400), sample_seed)
        changed = masked.mel != before
        assert masked.frame_count == 400
        assert not changed[:, 400:].any()  # The tail after the clip stays.
        assert (masked.mel[changed] == before[:, :400].mean()).all()
        widths.append(int(changed.all(axis=0).sum()))
        heights.append(int(changed[:, :400].all(axis=1).sum()))
    assert np.array_equal(mel, before)
    assert 0 <= min(widths) < 10
    assert 70 < max(widths) <= 80  # This is a fifth of the clip.
    assert (min(heights), max(heights)) == (0, 10)


def test_clips_without_speech_have_their_length_and_any_loudness():
    durations_s = no_speech_durations(300, seed=0)
    assert 0.5 <= durations_s.min() < 1 < 14 < durations_s.max() <= 15
    assert not np.array_equal(durations_s, no_speech_durations(300, seed=1))
    clips = [no_speech_clip(float(seconds), sample_seed).samples for sample_seed, seconds in enumerate(durations_s)]
    assert [len(clip) for clip in clips] == [round(float(seconds) * 16_000) for seconds in durations_s]
    power = np.array([np.mean(clip.astype(np.float64) ** 2) for clip in clips])
    assert 0.15 < (power == 0).mean() < 0.35
    loudness = 10 * np.log10(power[power > 0])
    assert -80.1 < loudness.min() < -70
    assert -30 < loudness.max() < -19.9


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("speed=[]", "speed"),
        ("speed=[3.0]", "speed"),
        ("gain_db=[6, -6]", r"gain_db is \[6.0, -6.0\]: give the smaller number first"),
        ("noise.snr_db=[20, 5]", "noise.snr_db"),
        ("noise.share=1.5", "noise.share"),
        ("noise.level=1", "noise.level"),
    ],
)
def test_wrong_settings_are_refused(override, words):
    with pytest.raises(RecipeError, match=words):
        read_recipe(AugmentRecipe, None, [override])


def power_db(samples: np.ndarray) -> float:
    return 10 * float(np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-20))


@pytest.mark.parametrize(("rt60_s", "direct_db"), [(0.2, 10.0), (0.8, -3.0)])
def test_a_click_decays_as_in_the_room(rt60_s: float, direct_db: float):
    response = room_response(rt60_s, direct_db, np.random.default_rng(0))
    click = np.zeros(2 * 16_000, np.float32)
    click[1000] = 0.5
    heard = reverberate(click, response)
    assert len(heard) == len(click)
    assert np.abs(heard).argmax() == 1000  # the words stay where they are
    assert power_db(heard) == pytest.approx(power_db(click), abs=0.1)
    tail = heard[1001:].astype(np.float64)
    assert 10 * np.log10(heard[1000] ** 2 / np.sum(tail**2)) == pytest.approx(direct_db, abs=0.5)
    # Half of the reverberation time takes half of the 60 dB.
    early, late = (
        power_db(heard[1000 + start : 1000 + start + 400]) for start in (200, 200 + round(rt60_s * 16_000 / 2))
    )
    assert early - late == pytest.approx(30, abs=3)


def test_bands_and_telephones_keep_what_is_inside_of_them():
    speech, hiss = tone(1003.7), tone(6000)
    assert power_db(limit_band(speech.samples, 0.0, 4000.0)) == pytest.approx(power_db(speech.samples), abs=0.1)
    assert power_db(limit_band(hiss.samples, 0.0, 4000.0)) < power_db(hiss.samples) - 40
    for mu_law in (True, False):
        heard = telephone(speech.samples, mu_law=mu_law)
        assert len(heard) == len(speech.samples)
        noise_db = power_db(heard[2000:-2000] - speech.samples[2000:-2000]) - power_db(speech.samples)
        assert -45 < noise_db < -30  # 8 companded bits have a noise of about -38 dB
        for hertz in (60, 6000):
            assert power_db(telephone(tone(hertz).samples, mu_law=mu_law)) < power_db(speech.samples) - 30


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shares_of_rooms_and_lines_are_met(share: float):
    augmenter = Augmenter(AugmentRecipe(room={"share": share}, band={"share": share}, telephone=share))
    clip = tone(seconds=0.2)
    changed = np.mean([augmenter.clip(clip, seed, duration_s=0.2).samples is not clip.samples for seed in range(400)])
    assert changed == pytest.approx(1 - (1 - share) ** 3, abs=0.06)
