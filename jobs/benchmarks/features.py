"""Measure what reading costs on one core: decoding, finding speech, features, and transformers' way beside them."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from graft.audio.chunking import Chunker
from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.audio.features import Featurizer
from graft.audio.spans import read_span

from .measuring import Numbers, in_turns, report
from .speech import MEAN_S, write_archive

# Mel bands that the encoder of a 7B graft takes.
MEL_COUNT = 128
REPETITIONS = 9


def bench_features(seconds: float) -> Numbers:
    """Measure how many seconds of audio graft and transformers decode and featurize in a second, and the ratio."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = write_archive(Path(folder, "clips"), max(1, round(seconds / MEAN_S)))
        costs = reading_costs(files, REPETITIONS)
    graft, transformers = costs["decode"] + costs["features"], costs["transformers"]
    rates = {"graft_rtfx": 1 / graft, "transformers_rtfx": 1 / transformers, "ratio": transformers / graft}
    return report("", {"clips": len(files)} | rates)


def reading_costs(files: Sequence[Path], repetitions: int) -> dict[str, float]:
    """Measure the CPU seconds that parts of reading take for a second of audio: medians, after a turn to warm up."""
    chunker, featurizer, extractor = Chunker(), Featurizer(MEL_COUNT), WhisperFeatureExtractor(feature_size=MEL_COUNT)
    clips = [read_audio(path) for path in files]

    def by_transformers() -> None:
        for path in files:
            samples, _ = soundfile.read(path, dtype="float32")
            extractor(samples, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="np")

    ways: dict[str, Callable[[], object]] = {
        "decode": lambda: [list(read_span(str(path))) for path in files],
        "detection": lambda: [chunker(clip) for clip in clips],
        "features": lambda: [featurizer(clip) for clip in clips],
        "transformers": by_transformers,
    }
    audio_s = sum(clip.duration_s for clip in clips)
    spent = in_turns(ways, repetitions + 1)
    return {name: float(np.median(turns[1:, 1])) / audio_s for name, turns in spent.items()}
