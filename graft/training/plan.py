"""The epoch is a plan: which clips stand together in which batch, in which order, as a pure function of a seed and three columns.

Row groups are shuffled and read a window at a time; within a window clips of like length share batches of at most `token_budget` padded
tokens, and the batches are shuffled. The number of workers changes neither the batches nor their order, only where an epoch is filled up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from graft.errors import DataError


@dataclass(frozen=True)
class PlanSettings:
    """What the order depends on, besides the columns."""

    seed: int = 0
    epochs: int = 1
    token_budget: int = 8192
    """Tokens of a batch, padding included: its clips times its longest."""
    max_batch_clips: int = 64
    window_row_groups: int = 16


@dataclass(frozen=True, eq=False)
class PlanColumns:
    """What is known of each clip before it is read: its tokens, its label tokens and the row group it stands in, in file order."""

    token_counts: np.ndarray
    label_counts: np.ndarray
    row_groups: np.ndarray


@dataclass(frozen=True)
class PlannedBatch:
    """Rows that are padded together; a filler, which completes an epoch's last step, has none."""

    rows: tuple[int, ...]
    position: int
    """The real batches of the run up to and with this one."""
    step_position: int
    """The real batches of the run that are done once this one's step is."""
    step_label_count: int
    """Label tokens of the whole step, by which its loss is divided."""


@dataclass(frozen=True, eq=False)
class Plan:
    """All batches of a run."""

    columns: PlanColumns
    settings: PlanSettings

    def epoch(self, number: int) -> list[np.ndarray]:
        """The batches of an epoch, each an array of row numbers; every row stands in exactly one."""
        return _epoch(self, number)

    def delivery(self, *, position: int, step_batches: int) -> list[PlannedBatch]:
        """List what is delivered from a position on: real batches in order, each epoch filled up to whole steps of `step_batches`."""
        return [batch for step in self.steps(position=position, step_batches=step_batches) for batch in step]

    def steps(self, *, position: int, step_batches: int) -> Iterator[list[PlannedBatch]]:
        """Group what is left of each epoch after `position` real batches into steps of `step_batches`."""
        first = 0
        for number in range(self.settings.epochs):
            batches = self.epoch(number)
            for start in range(max(0, position - first), len(batches), step_batches):
                yield self._step(batches[start : start + step_batches], first + start, step_batches)
            first += len(batches)

    def _step(self, batches: list[np.ndarray], position: int, size: int) -> list[PlannedBatch]:
        label_count = int(sum(self.columns.label_counts[rows].sum() for rows in batches))
        end = position + len(batches)
        step = [PlannedBatch(tuple(map(int, rows)), position + i + 1, end, label_count) for i, rows in enumerate(batches)]
        return step + [PlannedBatch((), end, end, label_count)] * (size - len(batches))

    def step_count(self, step_batches: int) -> int:
        return sum(-(-len(self.epoch(number)) // step_batches) for number in range(self.settings.epochs))

    def padding_waste(self) -> float:
        """The share of the first epoch's padded tokens that are padding."""
        counts = [self.columns.token_counts[rows] for rows in self.epoch(0)]
        return 1 - sum(float(c.sum()) for c in counts) / sum(float(c.max()) * len(c) for c in counts)


@lru_cache(maxsize=4)
def _epoch(plan: Plan, number: int) -> list[np.ndarray]:
    columns, settings = plan.columns, plan.settings
    _check(columns, settings)
    rng = np.random.default_rng([settings.seed, number])
    rows_of_group = _rows_by_group(columns.row_groups)
    order = rng.permutation(len(rows_of_group))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), settings.window_row_groups):
        window = np.concatenate([rows_of_group[group] for group in order[start : start + settings.window_row_groups]])
        in_window = _pack(rng.permutation(window), columns.token_counts, settings)
        batches += [in_window[index] for index in rng.permutation(len(in_window))]
    return batches


def _pack(rows: np.ndarray, token_counts: np.ndarray, settings: PlanSettings) -> list[np.ndarray]:
    """Cut rows, longest first and equal lengths in the order given, into batches within the budget."""
    rows = rows[np.argsort(-token_counts[rows], kind="stable")]
    batches, start = [], 0
    while start < len(rows):
        fitting = min(settings.token_budget // int(token_counts[rows[start]]), settings.max_batch_clips)
        batches.append(rows[start : start + fitting])
        start += fitting
    return batches


def _rows_by_group(row_groups: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(row_groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(row_groups[order])) + 1)


def _check(columns: PlanColumns, settings: PlanSettings) -> None:
    if not len(columns.token_counts):
        raise DataError("the plan has no clips: check the data and its filters")
    longest = int(columns.token_counts.max())
    if longest > settings.token_budget:
        raise DataError(f"a clip makes {longest} tokens, more than token_budget={settings.token_budget}: raise it or shorten the clips")
