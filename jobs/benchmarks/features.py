"""Measure FLAC to log-mel on one core, beside soundfile and transformers' extractor."""

import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.audio.features import Featurizer

from .measuring import Numbers, in_turns, report
from .speech import MEAN_S, write_archive

REPETITIONS = 9


def bench_features(seconds: float) -> Numbers:
    """Measure how many seconds of audio either way takes in a second (the median), and the ratio of the two."""
    torch.set_num_threads(1)
    featurizer, extractor = Featurizer(80), WhisperFeatureExtractor(feature_size=80)

    def by_graft() -> None:
        for path in clips:
            featurizer(read_audio(path))

    def by_transformers() -> None:
        for path in clips:
            samples, _ = soundfile.read(path, dtype="float32")
            extractor(samples, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="np")

    with tempfile.TemporaryDirectory() as folder:
        clips = write_archive(Path(folder, "clips"), max(1, round(seconds / MEAN_S)))
        audio_s = sum(soundfile.info(path).duration for path in clips)
        spent = in_turns({"graft": by_graft, "transformers": by_transformers}, REPETITIONS + 1)
    graft_s, transformers_s = (turns[1:, 0] for turns in spent.values())  # the first turn warms up
    numbers = {
        "clips": len(clips),
        "audio_s": audio_s,
        "graft_rtfx": audio_s / float(np.median(graft_s)),
        "transformers_rtfx": audio_s / float(np.median(transformers_s)),
        "ratio": float(np.median(transformers_s / graft_s)),
    }
    return report("", numbers)
