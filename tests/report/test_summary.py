"""The running statistics against plain Python ones over the whole history."""

import io
import math
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm import GradNorm
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.report.summary import RunSummary
from lightning_gradnorm.report.task_summary import TaskSummary

TASKS = ("a", "b", "c", "größe 4")
STD = 2
FINAL = {task: 0.5 + i for i, task in enumerate(TASKS)}
NUMBER = st.floats(1e-3, 1e3)
BROKEN = st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def a_step(draw, norms: bool):
    """What one step applied and measured: task → (weight, loss, norm)."""
    tasks = draw(st.permutations(TASKS))[: draw(st.integers(1, len(TASKS)))]
    step = {task: [draw(NUMBER), draw(NUMBER), draw(NUMBER) if norms else None] for task in tasks}
    if draw(st.integers(0, 5)) == 0:
        step[draw(st.sampled_from(tasks))][2 if norms and draw(st.booleans()) else 1] = draw(BROKEN)
    return step


def runs():
    """Epochs of steps; either all steps measured norms, or none."""
    return st.booleans().flatmap(
        lambda norms: st.lists(st.lists(a_step(norms), min_size=1, max_size=6), min_size=1, max_size=3)
    )


def finite(step) -> bool:
    return all(math.isfinite(value) for values in step.values() for value in values if value is not None)


def take(summary: RunSummary, step, epoch: int = 0) -> None:
    weights, losses, norms = (list(column) for column in zip(*step.values(), strict=True))
    as_double = [torch.tensor(column, dtype=torch.float64) for column in (weights, losses)]
    gradient_norms = None if None in norms else torch.tensor(norms, dtype=torch.float64)
    summary.add(as_double[0], Measurement(tuple(step), as_double[1], gradient_norms), epoch)


def summary_of(run) -> RunSummary:
    summary = RunSummary()
    for number, epoch in enumerate(run):
        for step in epoch:
            take(summary, step, number)
    return summary


def share(step, task, weighted: bool) -> float:
    parts = {t: (w if weighted else 1.0) * (math.nan if n is None else n) for t, (w, _, n) in step.items()}
    return parts[task] / sum(parts.values())


def after_warmup(run, task) -> list[float]:
    """Without the first steps: the largest power of two up to a tenth of them."""
    steps = [step for epoch in run for step in epoch]
    warmup = 2 ** int(math.log2(len(steps) / 10)) if len(steps) >= 10 else 0
    return [step[task][0] for step in steps[warmup:] if task in step and finite(step)]


def by_hand(run) -> dict[str, TaskSummary]:
    """From the whole history, one task at a time."""
    rows = {}
    for task in TASKS:
        steps = [step for epoch in run for step in epoch if task in step and finite(step)]
        if not steps:
            continue
        last = [step for step in run[-1] if task in step and finite(step)]
        weights, first_loss = [step[task][0] for step in steps], steps[0][task][1]
        rows[task] = TaskSummary(
            task=task,
            start=weights[0],
            mean=fmean(weights),
            std=pstdev(weights),
            final=FINAL[task],
            share_before=share(steps[0], task, weighted=False),
            share_after=fmean(share(step, task, weighted=True) for step in last) if last else math.nan,
            loss_ratio=fmean(step[task][1] / first_loss for step in last) if last else math.nan,
            mean_after_warmup=fmean(later) if (later := after_warmup(run, task)) else math.nan,
            std_after_warmup=pstdev(later) if later else math.nan,
        )
    return rows


def numbers(row: TaskSummary) -> list[float]:
    return [getattr(row, name) for name in TaskSummary.__dataclass_fields__ if name not in ("task", "way")]


@given(runs())
def test_the_rows_are_the_plain_statistics(run):
    summary, expected = summary_of(run), by_hand(run)
    rows = summary.rows(FINAL)
    assert {row.task for row in rows} == expected.keys()
    for row in rows:
        by_sums, plain = numbers(row), numbers(expected[row.task])
        for std in (STD, -1):
            assert by_sums.pop(std) == pytest.approx(plain.pop(std), abs=1e-4, nan_ok=True), "sums of squares up to 1e6"
        assert by_sums == pytest.approx(plain, rel=1e-9, nan_ok=True)
    assert summary.measured == sum(map(len, run))


@given(runs(), st.data())
def test_a_state_saved_and_loaded_goes_on_as_if_nothing_had_been(run, data):
    """Stopped after any step, through torch's safe loading, and equal bit for bit at the end."""
    whole = summary_of(run)
    stop = data.draw(st.integers(0, sum(map(len, run))))
    summary, seen = RunSummary(), 0
    for number, epoch in enumerate(run):
        for step in epoch:
            if seen == stop:
                file = io.BytesIO()
                torch.save(summary.state_dict(), file)
                file.seek(0)
                summary = RunSummary()
                summary.load_state_dict(torch.load(file, weights_only=True))
            take(summary, step, number)
            seen += 1
    assert repr(summary.rows(FINAL)) == repr(whole.rows(FINAL))
    assert summary.tasks == whole.tasks
    assert (summary.steps, summary.measured) == (whole.steps, whole.measured)


def test_a_state_is_a_copy():
    summary = summary_of([[{"a": [1.0, 2.0, 3.0]}]])
    state = summary.state_dict()
    take(summary, {"a": [5.0, 2.0, 3.0]})
    other = RunSummary()
    other.load_state_dict(state)
    take(other, {"a": [7.0, 2.0, 3.0]})
    third = RunSummary()
    third.load_state_dict(state)
    assert [s.rows({})[0].mean for s in (summary, other, third)] == [3.0, 4.0, 1.0]


def test_numbers_that_can_be_done_in_the_head():
    """Two epochs; ``b`` joins in the second; a NaN at the start counts for nothing."""
    summary = RunSummary()
    assert summary.rows({}) == []
    assert summary.steps == 0
    take(summary, {"a": [9.0, math.nan, 1.0]})
    assert summary.rows({}) == []
    take(summary, {"a": [1.0, 8.0, 1.0]})
    take(summary, {"a": [2.0, 6.0, 1.0]})
    take(summary, {"a": [3.0, 4.0, 1.0], "b": [1.0, 10.0, 3.0]}, epoch=1)
    take(summary, {"b": [0.5, 5.0, 2.0], "a": [2.0, 2.0, 3.0]}, epoch=1)
    a, b = summary.rows({"a": 2.5})
    assert numbers(a) == pytest.approx([1.0, 2.0, 0.5**0.5, 2.5, 1.0, (3 / 6 + 6 / 7) / 2, (4 / 8 + 2 / 8) / 2, 2.0, 0.5**0.5])
    assert numbers(b) == pytest.approx([1.0, 0.75, 0.25, 0.75, 3 / 4, (3 / 6 + 1 / 7) / 2, 0.75, 0.75, 0.25])
    assert (summary.steps, summary.measured) == (5, 5)


def test_steps_that_were_not_measured_are_steps():
    """Every tenth of 160 is measured; tasks that take turns do not halve the count."""
    summary = RunSummary()
    for step in range(160):
        summary.count_step()
        if step % 10 == 0:
            take(summary, {"ab"[step // 10 % 2]: [1.0, 2.0, 3.0]})
    assert (summary.steps, summary.measured) == (160, 16)
    other = RunSummary()
    other.load_state_dict(summary.state_dict())
    assert (other.steps, other.measured) == (160, 16)
    of_version_0_1 = {name: value for name, value in summary.state_dict().items() if name != "passed"}
    other.load_state_dict(of_version_0_1)
    assert (other.steps, other.measured) == (16, 16), "all that it knew of"


def test_without_norms_there_are_no_shares():
    row = summary_of([[{"a": [1.0, 2.0, None]}, {"a": [3.0, 1.0, None]}]]).rows({"a": 4.0})[0]
    assert math.isnan(row.share_before)
    assert math.isnan(row.share_after)
    assert (row.start, row.mean, row.std, row.final, row.loss_ratio) == (1.0, 2.0, 1.0, 4.0, 0.75)


def test_a_step_whose_gradients_all_vanish_does_not_spoil_the_shares():
    summary = summary_of([[{"a": [1.0, 2.0, 1.0], "b": [1.0, 2.0, 3.0]}, {"a": [1.0, 2.0, 0.0], "b": [1.0, 2.0, 0.0]}]])
    assert [row.share_after for row in summary.rows({})] == pytest.approx([0.25, 0.75])


def test_a_task_without_a_gradient_has_no_share_and_no_first_loss_in_that_step():
    """As a detection batch without boxes; the weights that it was given count all the same."""
    steps = [
        {"a": [1.0, 4.0, 1.0], "b": [1.0, 0.0, 0.0]},
        {"a": [1.0, 2.0, 1.0], "b": [1.0, 8.0, 3.0]},
        {"a": [2.0, 2.0, 1.0], "b": [3.0, 0.0, 0.0]},
        {"a": [2.0, 1.0, 1.0], "b": [3.0, 4.0, 2.0]},
    ]
    a, b = summary_of([steps]).rows({"a": 2.0, "b": 3.0})
    assert (b.start, b.mean, b.std, b.final) == (1.0, 2.0, 1.0, 3.0)
    assert (b.share_before, b.share_after, b.loss_ratio) == pytest.approx((3 / 4, (3 / 4 + 6 / 8) / 2, (1 + 0.5) / 2))
    assert (a.share_before, a.share_after, a.loss_ratio) == pytest.approx((1.0, (1 + 1 / 4 + 1 + 2 / 8) / 4, 2.25 / 4))


def test_a_task_that_never_has_a_gradient_has_weights_and_nothing_else():
    a, b = summary_of([[{"a": [1.0, 4.0, 1.0], "b": [1.5, 3.0, 0.0]}] * 3]).rows({"a": 1.0, "b": 1.5})
    assert (b.start, b.mean, a.share_after) == (1.5, 1.5, 1.0)
    assert all(math.isnan(value) for value in (b.share_before, b.share_after, b.loss_ratio))


def test_on_a_device_who_has_started_is_asked_for_now_and_then(monkeypatch):
    steps = [{"a": [1.0, 4.0, 1.0], "b": [1.0, 3.0, float(step > 4)]} for step in range(12)]
    free = summary_of([steps])
    asked = []
    whole = torch.Tensor.tolist
    monkeypatch.setattr("lightning_gradnorm.report.summary.reading_is_free", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(1) or whole(self))
    waiting = summary_of([steps])
    assert len(asked) == 4, "after 1, 2, 4 and 8 steps"
    assert repr(waiting.rows({})) == repr(free.rows({}))


def test_an_epoch_without_steps_leaves_the_last_one_standing():
    summary = summary_of([[{"a": [1.0, 2.0, 1.0]}, {"a": [1.0, 1.0, 1.0]}], []])
    assert summary.rows({})[0].loss_ratio == 0.75


def test_the_spread_of_a_constant_weight_is_zero():
    run = [[{"a": [0.1, 1.0, 1.0], "b": [1234.567, 1.0, 1.0]}] * 1000]
    assert [row.std for row in summary_of(run).rows({})] == pytest.approx([0.0, 0.0], abs=1e-4)


def test_a_measured_step_counts_in_the_means_of_weights_for_all_that_it_stands_for():
    """Every step of the first hundred and then ever fewer, of a weight that rises evenly from 0 to 1."""
    summary, balancer, steps = RunSummary(), GradNorm(), 10_000
    for step in range(steps):
        if balancer.due:
            loss = torch.ones(1, dtype=torch.float64)
            summary.add(loss * step / steps, Measurement(("a",), loss, loss), 0, balancer.interval)
        balancer.update(None)
    (row,) = summary.rows({})
    assert row.mean == pytest.approx(0.5, abs=0.01) and row.std == pytest.approx(12**-0.5, abs=0.01)
    assert row.mean_after_warmup == pytest.approx(0.5, abs=0.01)


def test_single_precision_comes_out_in_double():
    summary = RunSummary()
    for weight in (1.0, 1.0 + 2**-20):
        summary.add(torch.tensor([weight]), Measurement(("a",), torch.tensor([2.0], dtype=torch.float64), torch.ones(1)), 0)
    assert summary.rows({})[0].mean == 1.0 + 2**-21
