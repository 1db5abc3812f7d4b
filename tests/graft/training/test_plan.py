"""Test the plan: every row once, an order that does not depend on workers, and a position that is one integer."""

import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import DataError
from graft.training.plan import Batches, Epoch, Plan, PlanColumns, PlannedBatch, PlanSettings
from tests.support.training import batches_after


def columns(rows: int, *, rows_per_group: int = 10, seed: int = 0, free: int = 0) -> PlanColumns:
    """Make clips of 20 to 200 tokens, up to 19 of them labels; the last `free` rows need no reading."""
    rng = np.random.default_rng(seed)
    groups = np.where(np.arange(rows) < rows - free, np.arange(rows) // rows_per_group, -1)
    return PlanColumns(rng.integers(20, 200, rows), rng.integers(1, 20, rows), groups)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    chosen = PlanSettings(
        seed=draw(st.integers(0, 5)),
        epochs=draw(st.integers(1, 3)),
        token_budget=draw(st.integers(200, 1500)),
        max_batch_clips=draw(st.integers(1, 9)),
        window_clips=draw(st.integers(1, 60)),
        short_first=draw(st.booleans()),
    )
    rows, rows_per_group = draw(st.integers(1, 150)), draw(st.integers(1, 20))
    free = draw(st.integers(0, rows // 3))
    return Plan(columns(rows, rows_per_group=rows_per_group, seed=draw(st.integers(0, 5)), free=free), chosen)


def batches_of(epoch: Epoch) -> list[np.ndarray]:
    return np.split(epoch.rows, epoch.offsets[1:-1])


def real(batches: Batches) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(batch.rows, batch.sample_seeds) for batch in batches if batch.rows]


@settings(deadline=None, max_examples=50)
@given(plans())
def test_every_row_once_an_epoch_within_the_budget(plan):
    tokens = plan.columns.token_counts
    for epoch in plan.epochs:
        batches = batches_of(epoch)
        assert sorted(epoch.rows.tolist()) == list(range(len(tokens)))
        assert all(len(rows) * tokens[rows].max() <= plan.settings.token_budget for rows in batches)
        assert all(1 <= len(rows) <= plan.settings.max_batch_clips for rows in batches)
        assert epoch.padded_token_count == sum(len(rows) * tokens[rows].max() for rows in batches)


def test_short_clips_may_come_first():
    plan = Plan(columns(300), PlanSettings(epochs=2, token_budget=800, window_clips=100, short_first=True))
    for epoch, is_sorted in zip(plan.epochs, (True, False), strict=True):
        longest = np.array([plan.columns.token_counts[rows].max() for rows in batches_of(epoch)])
        for window in range(3):
            of_window = longest[epoch.windows == window].tolist()
            assert (of_window == sorted(of_window)) == is_sorted
    shuffled = Plan(plan.columns, replace(plan.settings, short_first=False))
    later = [real(one.batches(position=len(one.epochs[0]), step_batches=1)) for one in (plan, shuffled)]
    assert later[0] == later[1]


@settings(deadline=None, max_examples=50)
@given(plans())
def test_a_window_has_few_clips_and_no_row_group_is_in_two_unless_it_is_larger(plan):
    groups, most = plan.columns.row_groups, plan.settings.window_clips
    for epoch in plan.epochs:
        assert (np.diff(epoch.windows) >= 0).all()
        assert set(epoch.windows.tolist()) == set(range(epoch.window_count))
        windows: dict[int, set[int]] = {}
        for window in range(epoch.window_count):
            rows = np.concatenate(
                [rows for rows, own in zip(batches_of(epoch), epoch.windows, strict=True) if own == window]
            )
            read = rows[groups[rows] >= 0]
            assert len(read) <= most
            for group in set(groups[read].tolist()):
                windows.setdefault(group, set()).add(window)
                if (groups == group).sum() > most:  # A slice is alone in its window, and its rows follow each other.
                    assert set(groups[read].tolist()) == {group}
                    assert sorted(read.tolist()) == list(range(read.min(), read.max() + 1))
        for group, found in windows.items():
            assert len(found) == max(found) - min(found) + 1 == -(-(groups == group).sum() // most)


def test_a_row_that_occurs_twice_is_read_in_one_slice():
    chosen = PlanColumns(*[np.full(100, 30)] * 2, np.zeros(100, int), None, (2.0,))
    (epoch,) = Plan(chosen, PlanSettings(window_clips=30)).epochs
    assert epoch.window_count == 7
    windows = np.repeat(epoch.windows, np.diff(epoch.offsets))
    assert all(len(set(windows[epoch.rows == row].tolist())) == 1 for row in range(100))


@pytest.mark.parametrize("rows_per_group", [1, 10, 100, 5000])
def test_padding_depends_on_the_clips_of_a_window_and_not_on_row_groups(rows_per_group):
    plan = Plan(columns(5000, rows_per_group=rows_per_group), PlanSettings(token_budget=2000))
    assert plan.padding_waste() < 0.05


@settings(deadline=None, max_examples=50)
@given(plans(), st.integers(1, 7), st.integers(0, 3))
def test_any_number_of_workers_gets_the_same_batches_in_the_same_order(plan, step_batches, spare):
    slots = step_batches + spare
    delivered = plan.batches(position=0, step_batches=step_batches, slots=slots)
    assert real(delivered) == real(plan.batches(position=0, step_batches=1))
    assert [batch.position for batch in delivered if batch.rows] == list(range(1, len(real(delivered)) + 1))
    assert len(delivered) == plan.step_count(step_batches) * slots
    labels = plan.columns.label_counts
    weighed = 0
    for start in range(0, len(delivered), slots):
        step = list(delivered[start : start + slots])
        filled = [bool(batch.rows) for batch in step]
        assert filled[0]  # fillers complete a step, they never make one
        assert filled == sorted(filled, reverse=True)
        assert sum(filled) <= step_batches
        assert {batch.step_position for batch in step} == {max(batch.position for batch in step)}
        assert {batch.step_label_count for batch in step} == {sum(labels[list(batch.rows)].sum() for batch in step)}
        weighed += step[0].step_label_count
    assert weighed == labels.sum() * plan.settings.epochs


@settings(deadline=None, max_examples=50)
@given(plans(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2))
def test_a_run_resumes_from_any_step_with_any_number_of_workers(plan, step_batches, other, first):
    whole = plan.batches(position=0, step_batches=step_batches, slots=step_batches + 1)
    for start in range(0, len(whole) + 1, step_batches + 1)[first::3]:  # every third step, from one of the first three
        position = whole[start - 1].step_position if start else 0
        rest = list(whole[start:])
        assert list(plan.batches(position=position, step_batches=step_batches, slots=step_batches + 1)) == rest
        assert list(batches_after(whole, position)) == rest
        assert real(plan.batches(position=position, step_batches=other)) == real(whole[start:])


def test_fillers_complete_every_step():
    plan = Plan(columns(10), PlanSettings(epochs=2, max_batch_clips=2))
    filled = [not batch.rows for batch in plan.batches(position=0, step_batches=4, slots=6)]
    assert filled == 2 * ([False] * 4 + [True] * 2 + [False] + [True] * 5)
    with pytest.raises(ValueError, match="4 batches do not fit the 3 slots"):
        plan.batches(position=0, step_batches=4, slots=3)


def test_batches_can_be_sliced_and_pickle_to_few_bytes():
    whole = Plan(columns(60), PlanSettings(max_batch_clips=3)).batches(position=0, step_batches=7)
    assert whole[-1] == PlannedBatch((), (), 20, 20, whole[-1].step_label_count)
    assert list(whole[3:9]) == [whole[index] for index in range(3, 9)]
    assert list(whole[5:2]) == []
    assert list(pickle.loads(pickle.dumps(whole[2:]))) == list(whole)[2:]
    with pytest.raises(IndexError):
        whole[len(whole)]
    with pytest.raises(ValueError, match="stride"):
        whole[::2]


def test_seed_and_epoch_change_order_and_sample_seeds_and_nothing_else_does():
    def order(seed: int, epoch: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        plan = Plan(columns(60), PlanSettings(seed=seed, epochs=2, token_budget=800, window_clips=30))
        first = len(plan.epochs[0]) * epoch
        return real(plan.batches(position=0, step_batches=1)[first : first + len(plan.epochs[epoch])])

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    for chosen in (0, 1):
        assert len({tuple(batch[chosen] for batch in one) for one in orders}) == 4
        assert len({frozenset(frozenset(batch[chosen]) for batch in one) for one in orders}) == 4  # other batches too
    assert len({sample_seed for one in orders for batch in one for sample_seed in batch[1]}) == 4 * 60


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0, 2.0, 2.25])
def test_rows_occur_as_often_as_their_sources_weight_says(weight):
    rows, epochs = 400, 20
    sources = (np.arange(rows) % 100 < 40).astype(np.int16)  # 160 rows of the second source, in row groups of their own
    chosen = PlanColumns(*[np.full(rows, 30)] * 2, np.arange(rows) // 20, sources, (1.0, weight))
    plan = Plan(chosen, PlanSettings(epochs=epochs))
    assert len({sample_seed for epoch in plan.epochs for sample_seed in epoch.sample_seeds}) == sum(
        len(epoch.sample_seeds) for epoch in plan.epochs
    )
    times = [Counter(epoch.rows.tolist()) for epoch in plan.epochs]
    for row in range(rows):
        stood = [one[row] for one in times]
        if sources[row] == 0:
            assert stood == [1] * epochs
        else:
            assert {int(weight) <= count <= np.ceil(weight) for count in stood} == {True}
            assert abs(sum(stood) - weight * epochs) <= 1
    for one in times:
        in_second = sum(count for row, count in one.items() if sources[row])
        assert abs(in_second - weight * 160) <= 1


def test_an_epoch_reads_few_row_groups_for_fractional_weights():
    chosen = PlanColumns(*[np.full(1000, 30)] * 2, np.arange(1000) // 20, None, (0.1,))
    for epoch in Plan(chosen, PlanSettings(epochs=10)).epochs:
        assert len(np.unique(chosen.row_groups[epoch.rows])) <= 6  # of 50, for 100 rows of 20 to a group


def test_rows_that_need_no_reading_are_spread_among_the_others():
    plan = Plan(columns(1200, free=200), PlanSettings(window_clips=100))
    places = np.flatnonzero(plan.columns.row_groups[plan.epochs[0].rows] < 0)
    by_window = np.histogram(places, bins=10, range=(0, 1200))[0]
    assert by_window.sum() == 200
    assert by_window.min() >= 15


def test_samples_that_vary_are_planned_by_their_own_counts():
    plain = columns(100)

    def longer(rows: np.ndarray, sample_seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return plain.token_counts[rows] + sample_seeds % 7, plain.label_counts[rows] + sample_seeds % 5

    plan = Plan(plain, PlanSettings(token_budget=800, epochs=2), longer)
    for batch in plan.batches(position=0, step_batches=1):
        rows, sample_seeds = np.array(batch.rows), np.array(batch.sample_seeds)
        assert batch.step_label_count == longer(rows, sample_seeds)[1].sum()
        assert longer(rows, sample_seeds)[0].max() * len(rows) <= 800


def test_batches_of_similar_lengths_need_little_padding():
    """Imitate LibriSpeech's durations: most of 10 to 16 s, a tail down to 1.3 s.

    A clip has 12.5 audio tokens and 3 text tokens per second, and 50 prompt tokens.
    """
    rng = np.random.default_rng(0)
    seconds = np.where(rng.random(20_000) < 0.7, rng.normal(14, 1.4, 20_000), rng.uniform(1.3, 17, 20_000)).clip(
        1.3, 24
    )
    labels = (seconds * rng.normal(3, 0.4, 20_000)).astype(int).clip(1)
    plan = Plan(
        PlanColumns((50 + 12.5 * seconds).astype(int) + labels, labels, np.arange(20_000) // 100), PlanSettings()
    )
    assert plan.padding_waste() < 0.03
    shuffled = Plan(PlanColumns(plan.columns.token_counts, labels, np.arange(20_000)), PlanSettings(window_clips=32))
    assert plan.padding_waste() < shuffled.padding_waste() / 3


def test_a_million_rows_take_a_few_bytes_each():
    rng = np.random.default_rng(0)
    plan = Plan(
        PlanColumns(rng.integers(60, 500, 1_000_000), rng.integers(5, 60, 1_000_000), np.arange(1_000_000) // 100),
        PlanSettings(),
    )
    batches = plan.batches(position=0, step_batches=16)
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(batches, protocol=5, buffer_callback=buffers.append)
    assert len(head) < 2000
    assert sum(buffer.raw().nbytes for buffer in buffers) <= 12 * 1_000_000 + 36 * len(batches) + 8
    assert all(first <= second for first, second in pairwise(batches.step_positions[:100]))


@pytest.mark.parametrize("over", [[7], [0, 199], [*range(40, 60)]])  # one, at the ends, whole row groups
def test_a_clip_over_the_budget_is_left_out_and_all_else_is_planned(over):
    plain = columns(200)
    plain.token_counts[over] = 801
    plan = Plan(plain, PlanSettings(epochs=2, token_budget=800, window_clips=30))
    assert plan.left_out.tolist() == over
    for epoch in plan.epochs:
        assert sorted(epoch.rows.tolist()) == sorted(set(range(200)) - set(over))
        assert epoch.token_count == plain.token_counts[epoch.rows].sum()
    assert not set(over) & set(plan.batches(position=3, step_batches=2).rows.tolist())


def test_empty_data_and_oversized_clips_are_refused():
    with pytest.raises(DataError, match="every clip makes at least 20 tokens, more than token_budget=19: raise it"):
        Plan(columns(200), PlanSettings(token_budget=19)).batches(position=0, step_batches=1)
    empty = np.zeros(0, int)
    with pytest.raises(DataError, match="the plan has no clips"):
        Plan(PlanColumns(empty, empty, empty), PlanSettings()).batches(position=0, step_batches=1)
    with pytest.raises(DataError, match="epoch 0 has no clips: raise the weights"):
        Plan(PlanColumns(*[np.ones(1, int)] * 3, None, (0.1,)), PlanSettings()).step_count(1)
