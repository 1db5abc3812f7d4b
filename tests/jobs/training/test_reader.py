"""Test reading: whoever loads the batches, each row group is fetched once, and every batch gets its own clips."""

import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graft.data.dataset import RowReader, RowTable, read_rows, write_corpus
from graft.data.settings import AugmentRecipe
from graft.training.plan import Batches, Plan, PlanColumns, PlanSettings
from jobs.training import reader
from jobs.training.reader import AheadReader, BatchReader, NoiseReader, ReadBatch, ReaderSpec, largest_window
from jobs.training.samples import Variation
from tests.support import hub_server
from tests.support.hub_server import Hub

CLIPS, CLIP_BYTES = 400, 20_000


def write(path: Path, count: int, *, rows_per_group: int, name: str = "c") -> Path:
    """Write a corpus of clips that are noise to every decoder."""
    rng = np.random.default_rng(count)
    clips = (
        {"ID": f"{name}{number}", "duration": 1.0, "wav": {"bytes": rng.bytes(CLIP_BYTES), "path": f"{number}.flac"}}
        for number in range(count)
    )
    write_corpus(
        ({**clip, "spk_id": "", "sex": "", "text": f"TEXT {clip['ID']}"} for clip in clips),
        path,
        rows_per_group=rows_per_group,
    )
    return path


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server.serve(tmp_path) as hub:
        yield hub


def plan_of(rows: RowTable, **settings: object) -> Plan:
    """Plan clips of 20 to 200 tokens."""
    groups = np.unique(rows.file.astype(np.int64) << 32 | rows.row_group, return_inverse=True)[1]
    tokens = np.random.default_rng(0).integers(20, 200, len(rows))
    chosen = PlanSettings(**{"token_budget": 1000, "window_clips": 100, **settings})
    return Plan(PlanColumns(tokens, tokens // 10, groups), chosen)


def spec_of(rows: RowTable, plan: Plan, variation: Variation = reader.NO_VARIATION) -> ReaderSpec:
    batches = plan.batches(position=0, step_batches=4)
    return ReaderSpec(rows, batches, variation, plan.epochs[0].window_count)


def all_windows(spec: ReaderSpec, first: int = 0) -> list[ReadBatch]:
    ahead, windows = AheadReader(spec, first), spec.batches.windows
    return [batch for number in range(windows[first], windows[-1] + 1) for batch in ahead.window(number)]


def are_as_planned(read: list[ReadBatch], rows: RowTable, batches: Batches) -> None:
    """Check the clips of batches against those that are read one by one."""
    single = RowReader(rows.files, cache_row_groups=1000)
    assert len(read) == len(batches)
    for batch, planned in zip(read, batches, strict=True):
        assert [sample.id for sample in batch.samples] == [rows.id(row) for row in planned.rows]
        assert [sample.text for sample in batch.samples] == [rows.text(row) for row in planned.rows]
        assert tuple(sample.sample_seed for sample in batch.samples) == planned.sample_seeds
        assert (batch.position, batch.step_position) == (planned.position, planned.step_position)
        for sample, row in zip(batch.samples, planned.rows, strict=True):
            content, name = single.wav(rows.file[row], rows.row_group[row], rows.row[row])
            assert (sample.audio.content, sample.audio.name, sample.audio.fault) == (content, name, None)


@pytest.mark.parametrize("rows_per_group", [20, 150, 1000], ids=["small", "over a window", "one"])
@pytest.mark.parametrize("short_first", [False, True])
def test_an_epoch_fetches_the_corpus_once(tmp_path: Path, hub: Hub, rows_per_group: int, short_first: bool) -> None:
    files = [write(tmp_path / f"{name}.parquet", CLIPS // 2, rows_per_group=rows_per_group, name=name) for name in "ab"]
    rows = read_rows([f"{hub.url}/files/{file.name}" for file in files])
    plan = plan_of(rows, epochs=2, short_first=short_first)
    hub.sent.clear()
    read = all_windows(spec_of(rows, plan))
    audio = [(start, end) for _, start, end in hub.sent if end - start > 0]
    assert sum(end - start for start, end in audio) < 1.1 * 2 * sum(file.stat().st_size for file in files)
    local = read_rows([str(file) for file in files])
    are_as_planned(read, local, plan.batches(position=0, step_batches=4))


def test_a_run_goes_on_in_the_middle_of_a_window_or_of_a_row_group(tmp_path: Path) -> None:
    rows = read_rows(str(write(tmp_path / "a.parquet", CLIPS, rows_per_group=250)))
    spec = spec_of(rows, plan_of(rows, epochs=2))
    for first in range(1, len(spec.batches), 13):
        are_as_planned(all_windows(spec, first), rows, spec.batches[first:])
    # Windows that a failed worker's task reads again come in any order.
    ahead = AheadReader(spec, 0)
    windows = [2, 0, 1, 1, 5]
    read = {number: list(ahead.window(number)) for number in windows}
    for number, batches in read.items():
        start, stop = np.searchsorted(spec.batches.windows, [number, number + 1])
        are_as_planned(batches, rows, spec.batches[start:stop])


def test_a_file_that_is_gone_is_a_fault_of_its_own_clips(tmp_path: Path) -> None:
    for name, rows_per_group in (("a", 20), ("b", 20), ("c", 150)):
        write(tmp_path / f"{name}.parquet", 150, rows_per_group=rows_per_group, name=name)
    rows = read_rows(str(tmp_path))
    spec = spec_of(rows, plan_of(rows))
    for name in "bc":
        (tmp_path / f"{name}.parquet").unlink()
    samples = [sample for batch in all_windows(spec) for sample in batch.samples]
    assert Counter((sample.id[0], sample.audio.fault is None) for sample in samples) == {
        ("a", True): 150,
        ("b", False): 150,
        ("c", False): 150,
    }
    assert {sample.audio.fault for sample in samples if sample.id[0] == "b"} == {
        f"{tmp_path}/b.parquet: no such file or folder"
    }


NOISY = AugmentRecipe(noise={"share": 0.5, "data": "noise.parquet"})


def test_a_small_noise_corpus_is_held_and_read_once(tmp_path: Path, hub: Hub) -> None:
    rows = read_rows(str(write(tmp_path / "a.parquet", CLIPS, rows_per_group=20)))
    noise_file = write(tmp_path / "noise.parquet", 100, rows_per_group=10, name="n")
    noise = read_rows(f"{hub.url}/files/noise.parquet")
    variation = Variation(np.full(40, 2.0), NOISY, noise)
    plan = plan_of(rows, epochs=3)
    free = [
        np.append(column, np.full(40, value))
        for column, value in zip(
            (plan.columns.token_counts, plan.columns.label_counts, plan.columns.row_groups), (50, 5, -1), strict=True
        )
    ]
    spec = spec_of(rows, replace(plan, columns=PlanColumns(*free)), variation)
    hub.sent.clear()
    read = all_windows(spec)
    assert sum(end - start for _, start, end in hub.sent) < 1.1 * noise_file.stat().st_size
    samples = [sample for batch in read for sample in batch.samples]
    assert len({sample.noise.id for sample in samples if sample.noise}) > 90
    assert all(sample.noise for sample in samples if sample.audio is None)  # those without speech
    noisy = [sample for sample in samples if sample.audio and sample.noise]
    assert 0.4 < len(noisy) / (3 * CLIPS) < 0.6
    assert {sample.sample_seed: sample.noise for sample in noisy} == {  # wherever the run goes on
        sample.sample_seed: sample.noise
        for first in (0, 30)
        for batch in all_windows(spec, first)
        for sample in batch.samples
        if sample.audio and sample.noise
    }


def test_a_window_has_its_share_of_a_large_noise_corpus(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "NOISE_BYTES", 40 * CLIP_BYTES)
    noise_file = write(tmp_path / "noise.parquet", 200, rows_per_group=10, name="n")
    noise = read_rows(f"{hub.url}/files/noise.parquet")
    seeds = np.arange(1000)
    for epoch_windows, groups in ((10, 2), (20, 1), (40, 1), (2, 4)):
        hub.sent.clear()
        share = NoiseReader(noise, epoch_windows)
        assert max(len(share.groups(window)) for window in range(100)) == groups
        drawn: set[str] = set()
        for window in range(epoch_windows):
            clips = share.read(window, seeds)
            drawn |= {clips.clip(int(seed)).id for seed in seeds}
            assert clips.clip(1000) is None
        sent = sum(end - start for _, start, end in hub.sent)
        assert sent < 1.1 * noise_file.stat().st_size
        assert 0.8 * min(200, epoch_windows * groups * 10) <= len(drawn) <= 200


def test_batches_that_were_read_are_pickled_without_the_corpus(tmp_path: Path) -> None:
    rows = read_rows(str(write(tmp_path / "a.parquet", CLIPS, rows_per_group=20)))
    spec = spec_of(rows, plan_of(rows))
    batch = next(iter(BatchReader(spec).window(0)))
    assert len(pickle.dumps(batch)) < len(batch.samples) * (CLIP_BYTES + 200) + 500


@pytest.mark.parametrize("rows_per_group", [20, 150, 1000])
def test_the_largest_window_is_known_beforehand(tmp_path: Path, rows_per_group: int) -> None:
    rows = read_rows(str(write(tmp_path / "a.parquet", CLIPS, rows_per_group=rows_per_group)))
    clips, size = largest_window(rows, plan_of(rows, epochs=2))
    assert clips == 100
    assert size == pytest.approx(100 * CLIP_BYTES, rel=0.05)
