"""Describe the clips of test sets: how long they are, how much is said, and what a cut at 30 s would lose.

    {set: {"clips", "hours", "words", "words_per_s", "duration_s": {quantile: s}, "words_per_clip": {quantile: words},
           "histogram": {"edges_s", "clips"}, "cut": {"limit_s", "clips", "seconds", "words", "word_share"}}}

A reader speaks about as fast at the end of a clip as at its beginning, so that the words which a cut loses are
estimated by its share of the time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .predictions import Prediction

LIMIT_S = 30.0
"""Longest input of Whisper's encoder, at which systems cut that know no longer audio."""
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
BINS = 20


def describe_sets(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Describe each set by its clips, of which each counts once, whatever the number of systems."""
    sets: dict[str, dict[str, Prediction]] = {}
    for one in predictions:
        if one.duration_s and (one.reference or "").strip():
            sets.setdefault(str(one.set_name), {})[one.id] = one
    return {name: describe_clips(list(clips.values())) for name, clips in sets.items()}


def describe_clips(clips: Sequence[Prediction]) -> dict[str, Any]:
    """Describe clips with references and durations."""
    seconds = np.array([clip.duration_s for clip in clips], float)  # (clips,)
    words = np.array([len((clip.reference or "").split()) for clip in clips])  # (clips,)
    lost_s = np.maximum(0.0, seconds - LIMIT_S)
    lost_words = words * lost_s / seconds
    counts, edges = np.histogram(seconds, bins=BINS, range=(0, max(float(seconds.max()), 1.0)))
    return {
        "clips": len(clips),
        "hours": float(seconds.sum() / 3600),
        "words": int(words.sum()),
        "words_per_s": float(words.sum() / seconds.sum()),
        "duration_s": _quantiles(seconds),
        "words_per_clip": _quantiles(words),
        "histogram": {"edges_s": edges.tolist(), "clips": counts.tolist()},
        "cut": {
            "limit_s": LIMIT_S,
            "clips": int((lost_s > 0).sum()),
            "seconds": float(lost_s.sum()),
            "words": round(float(lost_words.sum()), 1),
            "word_share": float(lost_words.sum() / max(1, words.sum())),
        },
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{share:g}": float(np.quantile(values, share)) for share in QUANTILES}
