"""Put the frames that FFmpeg decodes where their timestamps say: gaps become silence, overlaps are dropped.

packets -> frames, None for a packet that is lost -> frames that follow each other without gaps
"""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from graft.audio.defects import DAMAGED, GAP

JITTER_S = 0.05
"""Deviation of timestamps that is not followed: containers round them, and Vorbis's are off by 10 ms."""
START_JITTER_S = 0.1
"""Time before the first frame that is not silence: encoders' delays are stated in several ways, or not at all."""
LOSS_JITTER_S = 0.002
"""Deviation that is not followed behind a packet that is lost; one packet of AAC lasts 0.02 s."""
LEAST_GAP_S = 1.0
"""Shortest gap that is reported; encoders for speech leave out short pauses."""
LONGEST_OVERLAP_S = 0.5
"""Longest step back in time that is an overlap; a longer one begins another recording, whose times count from 0."""
MOST_SILENCE_S = 86_400.0
"""Seconds of silence that gaps may add to a recording; timestamps that ask for more are not believed."""

Report = Callable[[str, float, float], None]
"""Takes a defect's flag, start and end in seconds."""


def on_timeline(
    frames: Iterable[Any], origin_s: Fraction | None, report: Report, *, is_loss: Callable[[], bool] = lambda: False
) -> Iterator[Any]:
    """Yield decoded frames (av.AudioFrame) in a row, by their timestamps less `origin_s`, the start of the media.

    None among the frames stands for a packet that is lost; one that is lost at the end is not reported. Without an
    `origin_s`, frames are taken one after the other. `is_loss` tells whether a gap before the last frame is a loss.
    """
    end_s, silence_s, lost_at_s, is_first = Fraction(0), 0.0, None, True
    for frame in frames:
        if frame is None:
            lost_at_s = end_s if lost_at_s is None else lost_at_s
            continue
        gap_s = Fraction(0)
        if origin_s is not None and frame.pts is not None:
            gap_s = frame.pts * frame.time_base - origin_s - end_s
        jitter_s = START_JITTER_S if is_first else JITTER_S if lost_at_s is None else LOSS_JITTER_S
        if jitter_s < gap_s <= MOST_SILENCE_S - silence_s:
            silence_s += float(gap_s)
            for part in _silence(frame, gap_s):
                end_s += Fraction(part.samples, part.sample_rate)
                yield part
            if lost_at_s is None and is_loss():
                lost_at_s = end_s - gap_s
            elif lost_at_s is None and gap_s >= LEAST_GAP_S and not is_first:
                report(GAP, float(end_s - gap_s), float(end_s))
        elif -LONGEST_OVERLAP_S <= gap_s < -jitter_s:
            frame = _without_start(frame, round(-gap_s * frame.sample_rate))
        elif abs(gap_s) > jitter_s and origin_s is not None:
            origin_s += gap_s
        if lost_at_s is not None:
            report(DAMAGED, float(lost_at_s), float(end_s))
            lost_at_s = None
        is_first = False
        if frame is not None:
            end_s += Fraction(frame.samples, frame.sample_rate)
            yield frame


def _silence(like: Any, seconds: Fraction) -> Iterator[Any]:
    """Make silent frames of at most a second in the form of another."""
    import av

    left = round(seconds * like.sample_rate)
    zero = b"\x80" if like.format.name.startswith("u8") else b"\0"  # the middle of unsigned samples
    while left > 0:
        frame = av.AudioFrame(like.format.name, like.layout.name, min(left, like.sample_rate))
        for plane in frame.planes:
            plane.update(zero * plane.buffer_size)
        frame.sample_rate, frame.time_base = like.sample_rate, like.time_base
        left -= frame.samples
        yield frame


def _without_start(frame: Any, count: int) -> Any | None:
    """Return a frame without its first samples; None if none are left."""
    import av

    if count >= frame.samples:
        return None
    samples = frame.to_ndarray()
    width = samples.shape[1] // frame.samples
    rest = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples[:, count * width :]), format=frame.format.name, layout=frame.layout.name
    )
    rest.sample_rate, rest.time_base = frame.sample_rate, frame.time_base
    return rest
