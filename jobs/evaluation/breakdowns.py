"""Group the clips of a test set by what is known of them: speaker, source, length, or any other column."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pairing import Clip

DURATION = "duration"
DURATIONS_S = (2, 5, 10, 20, 30)
"""Limits of the groups by duration, in seconds."""
MOST_VALUES = 12
"""A column with more numbers than this is cut at its quartiles."""
UNKNOWN = "unknown"


def groups_of(clips: Sequence[Clip], column: str) -> dict[str, NDArray[np.bool_]]:
    """Return the clips of each value of a column, as (clips,); nothing where no clip has a value.

    Durations are grouped by DURATIONS_S, other numbers by quartiles where they have many values. Clips without a value
    are a group of their own.
    """
    if column == DURATION:
        durations = [clip.known.duration_s for clip in clips]
        names = [UNKNOWN if value is None else _duration_name(value) for value in durations]
        order = [*map(_duration_name, (0, *DURATIONS_S)), UNKNOWN]
    else:
        names, order = _named([_value(clip, column) for clip in clips])
    if set(names) <= {UNKNOWN}:
        return {}
    column_names = np.array(names)
    return {name: column_names == name for name in order if name in set(names)}


def _duration_name(duration_s: float) -> str:
    above = [limit for limit in DURATIONS_S if duration_s < limit]
    below = [limit for limit in DURATIONS_S if duration_s >= limit]
    if not above:
        return f"{below[-1]} s and more"
    return f"{below[-1]} to {above[0]} s" if below else f"under {above[0]} s"


def _value(clip: Clip, column: str) -> Any:
    if column in ("source", "speaker", "sex", "language"):
        return getattr(clip.known, column)
    return clip.known.more.get(column)


def _named(values: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Name the group of each value, and list the groups in order."""
    numbers = [_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) == sum(value not in (None, "") for value in values) and len(set(known)) > MOST_VALUES:
        limits = [float(f"{limit:.4g}") for limit in np.quantile(known, [0.25, 0.5, 0.75])]
        inner = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(limits)]
        parts = [f"under {limits[0]:g}", *inner, f"{limits[-1]:g} and more"]
        names = [UNKNOWN if one is None else parts[int(np.searchsorted(limits, one, "right"))] for one in numbers]
        return names, [*parts, UNKNOWN]
    names = [UNKNOWN if value in (None, "") else str(value) for value in values]
    return names, [*sorted(set(names) - {UNKNOWN}), UNKNOWN]


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
