"""Plan the batches of a run before it starts, as a pure function of a seed and a few columns of the data.

Row groups are shuffled and read in windows of `window_clips` clips: a window has several row groups, or a slice of one
that is larger. Within a window, clips of similar length share batches of at most `token_budget` padded tokens, and the
batches are shuffled; in the first epoch they may go from short clips to long ones instead. The number of workers
changes neither the batches nor their order, only the fillers that complete a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import overload

import numpy as np

from graft.data.sample_seeds import make_sample_seeds
from graft.errors import DataError

Counts = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Maps samples, given by rows and sample seeds, to their numbers of tokens and of label tokens."""


@dataclass(frozen=True)
class PlanSettings:
    """Settings of the plan; the training recipe's fields of the same names explain them."""

    seed: int = 0
    epochs: int = 1
    token_budget: int = 8192
    """Most tokens of a batch, padding included: number of clips times tokens of the longest."""
    max_batch_clips: int = 64
    window_clips: int = 2048
    """Most clips of a window, which are read and shuffled together."""
    short_first: bool = False
    """In the first epoch each window goes from its shortest clips to its longest."""


@dataclass(frozen=True, eq=False)
class PlanColumns:
    """The columns from which a plan is made, an entry for each row, in file order (rows,).

    Every epoch contains a row as often as its source's weight says. Where a weight has a fraction, the source's rows
    take turns over the epochs, by row groups, so that an epoch reads no more than it trains.
    """

    token_counts: np.ndarray
    label_counts: np.ndarray
    row_groups: np.ndarray
    """Row group of each row; -1 for generated samples, which are not read and go into any window."""
    sources: np.ndarray | None = None
    """Source of each row, an index into `weights`; None for a single source."""
    weights: Sequence[float] = (1.0,)

    def __len__(self) -> int:
        return len(self.token_counts)


@dataclass(frozen=True)
class PlannedBatch:
    """Samples that are padded together, each a row and a sample seed; a filler, which completes a step, has none."""

    rows: tuple[int, ...]
    sample_seeds: tuple[int, ...]
    position: int
    """Number of real batches of the run up to and including this one."""
    step_position: int
    """Number of real batches of the run that are done after this one's step."""
    step_label_count: int
    """Number of label tokens of the whole step, by which its loss is divided."""
    window: int = 0
    """Number of its window, counted over all epochs; a filler is in the window of the batch before it."""


@dataclass(frozen=True, eq=False)
class Batches(Sequence[PlannedBatch]):
    """A sequence of batches in seven arrays, which Ray's workers share: a PlannedBatch is made when it is asked for."""

    rows: np.ndarray  # int32 (samples,)
    sample_seeds: np.ndarray  # int64 (samples,)
    offsets: np.ndarray  # int64 (batches + 1,), into the two above
    positions: np.ndarray  # int64 (batches,), as the two below
    step_positions: np.ndarray
    step_label_counts: np.ndarray
    windows: np.ndarray  # int32 (batches,), ascending

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> PlannedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> "Batches": ...
    def __getitem__(self, index: int | slice) -> "PlannedBatch | Batches":
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        number = range(len(self))[index]
        samples = slice(self.offsets[number], self.offsets[number + 1])
        rows, sample_seeds = self.rows[samples].tolist(), self.sample_seeds[samples].tolist()
        return PlannedBatch(tuple(rows), tuple(sample_seeds), *(int(column[number]) for column in self._numbers))

    def _slice(self, start: int, stop: int, stride: int) -> "Batches":
        if stride != 1:
            raise ValueError(f"batches are sliced without a stride, not with a stride of {stride}")
        stop = max(start, stop)
        samples, batches = slice(self.offsets[start], self.offsets[stop]), slice(start, stop)
        offsets = self.offsets[start : stop + 1] - self.offsets[start]
        numbers = (column[batches] for column in self._numbers)
        return Batches(self.rows[samples], self.sample_seeds[samples], offsets, *numbers)

    @property
    def _numbers(self) -> tuple[np.ndarray, ...]:
        return self.positions, self.step_positions, self.step_label_counts, self.windows


@dataclass(frozen=True, eq=False)
class Epoch:
    """The real batches of one epoch, in order: their samples, the batches' offsets into them, and label counts."""

    rows: np.ndarray
    sample_seeds: np.ndarray
    offsets: np.ndarray  # (batches + 1,)
    label_counts: np.ndarray  # (batches,)
    windows: np.ndarray  # int32 (batches,), ascending from 0
    left_out: np.ndarray  # rows with a sample that alone exceeds the token budget, ascending
    token_count: int
    padded_token_count: int

    def __len__(self) -> int:
        return len(self.label_counts)

    @property
    def window_count(self) -> int:
        return int(self.windows[-1]) + 1


@dataclass(frozen=True, eq=False)
class Plan:
    """All batches of a run; `counts` replaces the columns' token counts where a row's samples vary."""

    columns: PlanColumns
    settings: PlanSettings
    counts: Counts | None = None

    @cached_property
    def epochs(self) -> list[Epoch]:
        """The batches of each epoch, without samples that alone exceed the token budget.

        Raises DataError when an epoch has no clips, or none that is within the token budget.
        """
        return [_plan_epoch(self, number) for number in range(self.settings.epochs)]

    @property
    def left_out(self) -> np.ndarray:
        """Rows with a sample that alone exceeds the token budget, and is in no batch: int64 (rows,)."""
        return np.unique(np.concatenate([epoch.left_out for epoch in self.epochs]))

    def batches(self, *, position: int, step_batches: int, slots: int | None = None) -> Batches:
        """List the batches after `position` real ones, in order, with fillers.

        A step has `slots` batches (by default `step_batches`), of which at most `step_batches` are real. A step ends
        with its epoch; fillers complete it.
        """
        slots = step_batches if slots is None else slots
        if slots < step_batches:
            raise ValueError(f"{step_batches} batches do not fit the {slots} slots of a step")
        first, windows, parts = 0, 0, []
        for epoch in self.epochs:
            part = _epoch_batches(epoch, first, max(0, position - first), step_batches, slots)
            parts.append(replace(part, windows=part.windows + np.int32(windows)))
            first += len(epoch)
            windows += epoch.window_count
        names = [field.name for field in fields(Batches) if field.name != "offsets"]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        return Batches(**columns, offsets=np.concatenate([[0], sizes.cumsum()]))

    def step_count(self, step_batches: int) -> int:
        return sum(-(-len(epoch) // step_batches) for epoch in self.epochs)

    def padding_waste(self) -> float:
        """Compute the share of padding in the run's padded tokens."""
        return 1 - sum(epoch.token_count for epoch in self.epochs) / sum(
            epoch.padded_token_count for epoch in self.epochs
        )


def _epoch_batches(epoch: Epoch, first: int, start: int, step_batches: int, slots: int) -> Batches:
    """Lay out an epoch's batches from `start` on in steps, with fillers; `first` real batches precede the epoch."""
    count = len(epoch)
    starts = np.arange(start, count, step_batches)  # (steps,)
    ends = np.minimum(starts + step_batches, count)
    numbers = starts[:, None] + np.arange(slots)  # (steps, slots)
    real = numbers < ends[:, None]  # (steps, slots); the others are fillers
    sizes = np.where(real, np.diff(epoch.offsets)[np.minimum(numbers, count - 1)], 0).ravel()
    labels = np.add.reduceat(epoch.label_counts, starts) if len(starts) else epoch.label_counts[:0]
    samples = slice(epoch.offsets[min(start, count)], None)
    return Batches(
        epoch.rows[samples],
        epoch.sample_seeds[samples],
        np.concatenate([[0], sizes.cumsum()]),
        (first + np.where(real, numbers + 1, ends[:, None])).ravel(),
        np.repeat(first + ends, slots),
        np.repeat(labels, slots),
        epoch.windows[np.minimum(numbers, ends[:, None] - 1).ravel()],
    )


def _plan_epoch(plan: Plan, number: int) -> Epoch:
    columns, settings = plan.columns, plan.settings
    if not len(columns):
        raise DataError("the plan has no clips: check the data and its filters")
    times = _repetitions(columns, settings.seed, number)
    rows = np.repeat(np.arange(len(columns), dtype=np.int32), times)
    if not len(rows):
        raise DataError(f"epoch {number} has no clips: raise the weights of the sources")
    sample_seeds = make_sample_seeds(
        settings.seed, number, rows, np.arange(len(rows)) - np.repeat(times.cumsum() - times, times)
    )
    token_counts, label_counts = columns.token_counts[rows], columns.label_counts[rows]
    if plan.counts:
        token_counts, label_counts = plan.counts(rows, sample_seeds)
    fits = token_counts <= settings.token_budget
    if not fits.any():
        raise DataError(
            f"every clip makes at least {int(token_counts.min())} tokens, more than "
            f"token_budget={settings.token_budget}: raise it or shorten the clips"
        )
    left_out = np.unique(rows[~fits])
    if len(left_out):
        rows, sample_seeds = rows[fits], sample_seeds[fits]
        token_counts, label_counts = token_counts[fits], label_counts[fits]
    rng = np.random.default_rng([settings.seed, number])
    batches, windows = _window_batches(
        columns.row_groups[rows], rows, token_counts, settings, rng, is_sorted=settings.short_first and number == 0
    )
    order = np.concatenate(batches)
    offsets = np.concatenate([[0], np.cumsum([len(batch) for batch in batches])])
    padded = np.maximum.reduceat(token_counts[order], offsets[:-1]) * np.diff(offsets)
    label_counts = np.add.reduceat(label_counts[order], offsets[:-1])
    return Epoch(
        rows[order],
        sample_seeds[order],
        offsets,
        label_counts,
        windows,
        left_out,
        int(token_counts.sum(dtype=np.int64)),
        int(padded.sum(dtype=np.int64)),
    )


def _repetitions(columns: PlanColumns, seed: int, number: int) -> np.ndarray:
    """Compute how often an epoch contains each row (rows,).

    A source's row groups are shuffled once and laid along a circle; with a weight's fraction, each epoch takes the arc
    that follows the last epoch's.
    """
    times = np.zeros(len(columns), np.int64)
    sources = np.zeros(len(columns), np.int16) if columns.sources is None else columns.sources
    for source, weight in enumerate(columns.weights):
        rows = np.flatnonzero(sources == source)
        if weight == int(weight) or not len(rows):
            times[rows] = int(weight)
            continue
        groups = columns.row_groups[rows]
        shuffled = np.random.default_rng([seed, source]).permutation(groups.max() + 2)
        places = np.empty(len(rows))
        places[np.argsort(shuffled[groups + 1], kind="stable")] = (np.arange(len(rows)) + 0.5) / len(rows)
        times[rows] = np.floor((number + 1) * weight + places) - np.floor(number * weight + places)
    return times


def _window_batches(
    groups: np.ndarray,
    rows: np.ndarray,
    token_counts: np.ndarray,
    settings: PlanSettings,
    rng: np.random.Generator,
    *,
    is_sorted: bool,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Pack samples into batches window by window; returns the batches and the window of each, int32 (batches,).

    `groups` are the samples' row groups, and `rows` their rows, ascending. The batches of a window are shuffled, or go
    from short clips to long ones where `is_sorted`.
    """
    windows = _windows(groups, rows, settings.window_clips, rng)
    order = np.argsort(windows, kind="stable")
    batches: list[np.ndarray] = []
    counts = []
    for window in np.split(order, np.flatnonzero(np.diff(windows[order])) + 1):
        in_window = _pack(rng.permutation(window), token_counts, settings)
        places = range(len(in_window) - 1, -1, -1) if is_sorted else rng.permutation(len(in_window)).tolist()
        batches += [in_window[place] for place in places]
        counts.append(len(in_window))
    return batches, np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _windows(groups: np.ndarray, rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Assign a window of at most `most` samples to each sample: int32 (samples,).

    Row groups are shuffled and fill windows one after the other. A row group of more samples is cut into slices of
    successive rows, which are successive windows. Generated samples are spread evenly over the windows.
    """
    read = groups >= 0
    # A group's samples stand together, as the rows do in their files.
    starts = np.flatnonzero(np.diff(groups[read], prepend=-2))  # (groups,)
    sizes = np.diff(starts, append=np.count_nonzero(read))
    order = rng.permutation(len(starts))
    firsts, parts = _fill_windows(sizes[order], most)
    first, part = np.empty(len(order), np.int32), np.empty(len(order), np.int32)
    first[order], part[order] = firsts, parts
    windows = np.zeros(len(groups), np.int32)
    windows[read] = np.repeat(first, sizes)
    places = np.flatnonzero(read)
    for group in np.flatnonzero(part > 1):
        samples = places[starts[group] : starts[group] + sizes[group]]
        ranks = np.cumsum(np.diff(rows[samples], prepend=-1) > 0) - 1  # A row that occurs twice stays in one slice.
        windows[samples] += (ranks * part[group] // (ranks[-1] + 1)).astype(np.int32)
    free = np.flatnonzero(~read)
    if len(free) and len(places):
        windows[rng.permutation(free)] = np.sort(windows[read])[
            (np.arange(len(free)) + 0.5).astype(int) * len(places) // len(free)
        ]
    return windows


def _fill_windows(sizes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill windows with groups of these sizes, in order; returns each group's first window and number of windows."""
    ends = sizes.cumsum()
    firsts, parts = np.empty(len(sizes), np.int32), -(-sizes // most)
    start, window = 0, 0
    while start < len(sizes):
        fitting = np.searchsorted(ends, ends[start] - sizes[start] + most, side="right")
        stop = max(start + 1, int(fitting))
        firsts[start:stop] = window
        window += int(parts[start])  # 1, except for a group that is larger than a window
        start = stop
    return firsts, parts


def _pack(samples: np.ndarray, token_counts: np.ndarray, settings: PlanSettings) -> list[np.ndarray]:
    """Cut samples into batches within the budget, longest first; equal lengths keep their order."""
    samples = samples[np.argsort(-token_counts[samples], kind="stable")]
    lengths = token_counts[samples].tolist()
    batches, start = [], 0
    while start < len(samples):
        fitting = min(settings.token_budget // lengths[start], settings.max_batch_clips)
        batches.append(samples[start : start + fitting])
        start += fitting
    return batches
