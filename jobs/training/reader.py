"""Read planned batches: each window's row groups are fetched once, and each batch gets its clips as they are stored.

    window of the plan -> its row groups, and those of the noise corpus -> a ReadBatch for each of its batches

All that depends on the whole corpus is looked up here: ids, texts, noise clips. So a loader needs no more than a
ReadBatch, and any loader can make any batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from graft.data.augmentation import NoiseClip, wants_noise
from graft.data.dataset import RowTable
from graft.data.row_groups import GroupKey, GroupReader, ReadAudio, StoredAudio, row_group_spans
from graft.data.sample_seeds import uniform
from graft.training.plan import Batches, Plan, PlannedBatch

from .samples import NO_VARIATION, Variation

NO_SPEECH_ID = "no-speech"
NOISE_BYTES = 256 * 2**20
"""Most bytes of a noise corpus that a reader holds. Of a larger corpus each window draws from a share of its own."""


@dataclass(frozen=True, eq=False)
class ReaderSpec:
    """All that a reader needs to read a window by its number."""

    rows: RowTable
    batches: Batches
    variation: Variation = NO_VARIATION
    epoch_windows: int = 1
    """Number of windows of an epoch, over which a large noise corpus is spread."""


def largest_window(rows: RowTable, plan: Plan) -> tuple[int, int]:
    """Return the most clips of a window of the run, and the most bytes that are read for one, noise excluded."""
    clips, most = 0, 0.0
    groups = plan.columns.row_groups[: len(rows)]  # (rows,), ascending
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes, group_bytes = np.diff(first, append=len(rows)), rows.group_bytes[first].astype(float)  # (groups,)
    for epoch in plan.epochs:
        batches = np.flatnonzero(np.diff(epoch.windows, prepend=-1))  # the first of each window
        windows = np.split(epoch.rows, epoch.offsets[batches[1:]])
        # One after the other, which takes the memory of one window only.
        parts = [np.unique(groups[_read_rows(window, len(rows))], return_counts=True) for window in windows]
        window = np.repeat(np.arange(len(parts)), [len(found) for found, _ in parts])
        group, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        # A row group of one window is read whole, and of one in several windows a slice in each.
        is_sliced = np.bincount(group, minlength=len(first))[group] > 1
        part_bytes = group_bytes[group] * np.where(is_sliced, counts / sizes[group], 1.0)
        clips = max(clips, int(np.bincount(window, counts).max(initial=0)))
        most = max(most, float(np.bincount(window, part_bytes).max(initial=0)))
    return clips, round(most)


def _read_rows(window: np.ndarray, count: int) -> np.ndarray:
    """Find the rows of a window that are read, each once; rows from `count` on are generated."""
    return np.unique(window[window < count])


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A sample of a batch, with all that the corpora have for it."""

    id: str
    text: str
    language: str | None
    """Code of the language (ISO 639-1); None where it is not known."""
    duration_s: float
    """Seconds by the corpus, by which the plan drew the speed; of a clip without speech, the seconds to make."""
    sample_seed: int
    audio: StoredAudio | None
    """None for a clip without speech, which is made."""
    noise: NoiseClip | None
    """None where noise is made, or none is added."""
    other_text: str
    """Text of another clip, for token noise; "" where there is none."""


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A planned batch whose clips were read, with the plan's numbers; a filler has no samples."""

    samples: tuple[ReadSample, ...]
    position: int
    step_position: int
    step_label_count: int


class BatchReader:
    """Reads planned batches window by window; it does not depend on Ray."""

    def __init__(self, spec: ReaderSpec) -> None:
        self.spec = spec
        noise = spec.variation.noise
        self._noise = NoiseReader(noise, spec.epoch_windows) if noise else None
        self._clips = GroupReader(spec.rows.files)

    def window(self, number: int, *, first: int = 0) -> Iterator[ReadBatch]:
        """Read a window's row groups, at once, and yield its batches; those before batch number `first` are left out.

        A clip that cannot be read is a fault of its sample.
        """
        start, stop, end = (int(place) for place in np.searchsorted(self.spec.batches.windows, number + np.arange(3)))
        start = max(start, first)
        now, then = self._spans(start, stop), self._spans(stop, end)
        continued = frozenset(key for key in now.keys() & then.keys() if now[key][1] <= then[key][0])
        return self.read(list(self.spec.batches[start:stop]), continued=continued)

    def read(
        self, planned: Sequence[PlannedBatch], *, continued: frozenset[GroupKey] = frozenset()
    ) -> Iterator[ReadBatch]:
        """Read any batches at once, and yield them; row groups that the next call goes on with are `continued`."""
        rows = self.spec.rows
        found = np.unique(np.array([row for batch in planned for row in batch.rows], np.int64))
        found = found[found < len(rows)]
        audio = self._clips.read(rows.file[found], rows.row_group[found], rows.row[found], continued=continued)
        noise = self._noise.read(planned[0].window, self._noisy_seeds(planned)) if self._noise and planned else None
        return (self._batch(batch, audio, noise) for batch in planned)

    def _spans(self, start: int, stop: int) -> dict[GroupKey, tuple[int, int]]:
        """Find the first row and the end of the rows in each row group of the batches from number `start` to `stop`."""
        rows, offsets = self.spec.rows, self.spec.batches.offsets
        found = self.spec.batches.rows[offsets[start] : offsets[max(start, stop)]]
        found = found[found < len(rows)]
        spans = row_group_spans(rows.file[found], rows.row_group[found], rows.row[found])
        return {(file, group): (first, end) for file, group, first, end in spans}

    def _noisy_seeds(self, planned: Sequence[PlannedBatch]) -> np.ndarray:
        """Return the sample seeds of the samples that get noise from the corpus, of all batches: int64 (samples,)."""
        seeds = np.array([seed for batch in planned for seed in batch.sample_seeds], np.int64)
        is_made = np.array([row for batch in planned for row in batch.rows], np.int64) >= len(self.spec.rows)
        return seeds[is_made | wants_noise(self.spec.variation.augment, seeds)]

    def _batch(self, planned: PlannedBatch, audio: ReadAudio, noise: "NoiseShare | None") -> ReadBatch:
        pairs = zip(planned.rows, planned.sample_seeds, strict=True)
        samples = tuple(self._sample(row, seed, audio, noise) for row, seed in pairs)
        return ReadBatch(samples, planned.position, planned.step_position, planned.step_label_count)

    def _sample(self, row: int, seed: int, audio: ReadAudio, noise: "NoiseShare | None") -> ReadSample:
        rows, variation = self.spec.rows, self.spec.variation
        other = rows.text(int(uniform(seed, "other text") * len(rows))) if variation.token_noise else ""
        added = noise.clip(seed) if noise else None
        if row >= len(rows):
            made_s = float(variation.no_speech_s[row - len(rows)])
            return ReadSample(NO_SPEECH_ID, "", None, made_s, seed, None, added, other)
        stored, duration_s = audio.stored(rows, row), float(rows.duration_s[row])
        return ReadSample(rows.id(row), rows.text(row), rows.language_of(row), duration_s, seed, stored, added, other)


class AheadReader:
    """Reads the next window in a thread while the batches of the present one are taken; it holds two windows."""

    def __init__(self, spec: ReaderSpec, first: int) -> None:
        self._reader, self._first = BatchReader(spec), first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="graft-ahead")
        self._coming: dict[int, Future[Iterator[ReadBatch]]] = {}
        self._last = int(spec.batches.windows[-1]) if len(spec.batches) else -1

    def window(self, number: int) -> Iterator[ReadBatch]:
        """Yield the batches of a window, from batch number `first` of the run on; windows are best read in order."""
        window = (self._coming.pop(number, None) or self._submit(number)).result()
        self._coming = {number + 1: self._submit(number + 1)} if number < self._last else {}
        return window

    def _submit(self, number: int) -> Future[Iterator[ReadBatch]]:
        return self._thread.submit(self._reader.window, number, first=self._first)


class NoiseReader:
    """Reads the noise clips of a window's samples.

    A corpus of at most NOISE_BYTES is held as a whole, each row group from the first clip of it on. Of a larger one
    each window draws from successive row groups of a shuffled order, so that an epoch reads it once at most.
    """

    def __init__(self, rows: RowTable, epoch_windows: int) -> None:
        self.rows = rows
        self._clips = GroupReader(rows.files)
        keys = rows.file.astype(np.int64) << 32 | rows.row_group
        _, first, self._groups = np.unique(keys, return_index=True, return_inverse=True)
        group_bytes = rows.group_bytes[first].astype(float)  # (groups,)
        self._order = np.random.default_rng(0).permutation(len(first))
        held = NOISE_BYTES / max(1.0, group_bytes.sum())  # share of the groups that may be held
        self._groups_a_window = len(first) * min(1.0, held, 1.0 if held >= 1 else 1 / epoch_windows)
        self._held = ReadAudio(rows.files, {})

    def groups(self, window: int) -> np.ndarray:
        """Return the numbers of the row groups from which a window's samples draw."""
        count = len(self._order)
        first = int(window * self._groups_a_window)
        stop = max(first + 1, int((window + 1) * self._groups_a_window))
        return self._order[np.arange(first, min(stop, first + count)) % count]

    def read(self, window: int, sample_seeds: np.ndarray) -> "NoiseShare":
        """Read the row groups of which some of the samples get a clip."""
        candidates = np.flatnonzero(np.isin(self._groups, self.groups(window)))
        drawn = candidates[(uniform(sample_seeds, "noise clip") * len(candidates)).astype(int)]  # rows (samples,)
        self._held = self._held.only(self._keys(candidates))
        missing = [row for row in np.unique(drawn).tolist() if next(iter(self._keys([row]))) not in self._held]
        self._held |= self._clips.read(*(column[missing] for column in self._places))
        return NoiseShare(self.rows, dict(zip(sample_seeds.tolist(), drawn.tolist(), strict=True)), self._held)

    @property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.rows.file, self.rows.row_group, self.rows.row

    def _keys(self, rows: Sequence[int] | np.ndarray) -> set[GroupKey]:
        """Find the row groups of rows."""
        return set(zip(self.rows.file[rows].tolist(), self.rows.row_group[rows].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class NoiseShare:
    """The noise clips of a window's samples, which stand under their sample seeds."""

    noise: RowTable
    drawn: Mapping[int, int]
    audio: ReadAudio

    def clip(self, sample_seed: int) -> NoiseClip | None:
        """Return a sample's noise clip; None for a sample that gets none of the corpus."""
        row = self.drawn.get(sample_seed)
        return None if row is None else NoiseClip(self.noise.id(row), self.audio.stored(self.noise, row))
