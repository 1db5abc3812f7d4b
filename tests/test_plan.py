"""The epoch is a plan: every row once, the same order for any number of workers, and a position that is one integer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import DataError
from graft.training.checkpoint import Progress
from graft.training.plan import Plan, PlanColumns, PlannedBatch, PlanSettings
from jobs.fit import what_is_left


def columns(rows: int, *, rows_per_group: int = 10, seed: int = 0) -> PlanColumns:
    """Clips of 20 to 200 tokens, up to 19 of them labels."""
    rng = np.random.default_rng(seed)
    return PlanColumns(rng.integers(20, 200, rows), rng.integers(1, 20, rows), np.arange(rows) // rows_per_group)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    chosen = PlanSettings(
        seed=draw(st.integers(0, 5)),
        epochs=draw(st.integers(1, 3)),
        token_budget=draw(st.integers(200, 1500)),
        max_batch_clips=draw(st.integers(1, 9)),
        window_row_groups=draw(st.integers(1, 6)),
    )
    rows, rows_per_group = draw(st.integers(1, 150)), draw(st.integers(1, 20))
    return Plan(columns(rows, rows_per_group=rows_per_group, seed=draw(st.integers(0, 5))), chosen)


def real(batches: list[PlannedBatch]) -> list[tuple[int, ...]]:
    return [batch.rows for batch in batches if batch.rows]


@settings(deadline=None, max_examples=50)
@given(plans())
def test_every_row_once_an_epoch_within_the_budget(plan):
    tokens = plan.columns.token_counts
    for number in range(plan.settings.epochs):
        batches = plan.epoch(number)
        assert sorted(row for rows in batches for row in rows) == list(range(len(tokens)))
        assert all(len(rows) * tokens[rows].max() <= plan.settings.token_budget for rows in batches)
        assert all(1 <= len(rows) <= plan.settings.max_batch_clips for rows in batches)


@settings(deadline=None, max_examples=50)
@given(plans())
def test_reading_stays_within_a_window_of_row_groups(plan):
    """Between the first and the last batch with rows of a group, no more than a window of groups is read."""
    groups = [set(plan.columns.row_groups[rows].tolist()) for rows in plan.epoch(0)]
    for group in set.union(*groups):
        places = [place for place, found in enumerate(groups) if group in found]
        assert len(set.union(*groups[places[0] : places[-1] + 1])) <= plan.settings.window_row_groups


@settings(deadline=None, max_examples=50)
@given(plans(), st.integers(1, 7))
def test_any_number_of_workers_gets_the_same_batches_in_the_same_order(plan, step_batches):
    delivered = plan.delivery(position=0, step_batches=step_batches)
    assert real(delivered) == real(plan.delivery(position=0, step_batches=1))
    assert [batch.position for batch in delivered if batch.rows] == list(range(1, len(real(delivered)) + 1))
    assert len(delivered) == plan.step_count(step_batches) * step_batches
    labels = plan.columns.label_counts
    weighed = 0
    for start in range(0, len(delivered), step_batches):
        step = delivered[start : start + step_batches]
        assert step[0].rows  # fillers complete a step, they never make one
        assert {batch.step_position for batch in step} == {max(batch.position for batch in step)}
        assert {batch.step_label_count for batch in step} == {sum(labels[list(batch.rows)].sum() for batch in step)}
        weighed += step[0].step_label_count
    assert weighed == labels.sum() * plan.settings.epochs


@settings(deadline=None, max_examples=50)
@given(plans(), st.integers(1, 5), st.integers(1, 5))
def test_a_run_goes_on_from_any_step_with_any_number_of_workers(plan, step_batches, other):
    whole = plan.delivery(position=0, step_batches=step_batches)
    for start in range(0, len(whole) + 1, step_batches):
        position = whole[start - 1].step_position if start else 0
        assert plan.delivery(position=position, step_batches=step_batches) == whole[start:]
        assert real(plan.delivery(position=position, step_batches=other)) == real(whole[start:])


@settings(deadline=None, max_examples=50)
@given(plans(), st.integers(1, 5), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 30)))
def test_a_stage_counts_its_steps_anew_when_the_workers_change(plan, before, after, max_steps):
    done, _ = what_is_left(plan, Progress(), step_batches=before, max_steps=2)
    progress = Progress(step=len(done) // before, position=done[-1].step_position)
    batches, total_steps = what_is_left(plan, progress, step_batches=after, max_steps=max_steps)
    assert len(batches) == (total_steps - progress.step) * after
    if max_steps is None or total_steps < max_steps:
        assert real(done) + real(batches) == real(plan.delivery(position=0, step_batches=1))
    else:
        assert total_steps == max(max_steps, progress.step)


def test_fillers_complete_the_last_step_of_each_epoch():
    plan = Plan(columns(10), PlanSettings(epochs=2, max_batch_clips=2))
    filled = [not batch.rows for batch in plan.delivery(position=0, step_batches=4)]
    assert filled == [False] * 5 + [True] * 3 + [False] * 5 + [True] * 3


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return [tuple(rows) for rows in Plan(columns(60), PlanSettings(seed=seed, epochs=2, token_budget=800)).epoch(epoch)]

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(one) for one in orders}) == 4
    assert len({frozenset(frozenset(rows) for rows in one) for one in orders}) == 4  # other batches too


def test_batches_of_like_lengths_waste_little():
    """LibriSpeech's durations: most of 10 to 16 s, a tail down to 1.3 s; 12.5 tokens a second, 3 of text, 50 of prompt."""
    rng = np.random.default_rng(0)
    seconds = np.where(rng.random(20_000) < 0.7, rng.normal(14, 1.4, 20_000), rng.uniform(1.3, 17, 20_000)).clip(1.3, 24)
    labels = (seconds * rng.normal(3, 0.4, 20_000)).astype(int).clip(1)
    plan = Plan(PlanColumns((50 + 12.5 * seconds).astype(int) + labels, labels, np.arange(20_000) // 100), PlanSettings())
    assert plan.padding_waste() < 0.03
    shuffled = Plan(PlanColumns(plan.columns.token_counts, labels, np.arange(20_000)), PlanSettings(window_row_groups=32))
    assert plan.padding_waste() < shuffled.padding_waste() / 3


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(DataError, match="a clip makes 199 tokens, more than token_budget=100: raise it"):
        Plan(columns(200), PlanSettings(token_budget=100)).epoch(0)
    empty = np.zeros(0, int)
    with pytest.raises(DataError, match="the plan has no clips"):
        Plan(PlanColumns(empty, empty, empty), PlanSettings()).delivery(position=0, step_batches=1)
