"""GO4Align: against a transcription of the paper in NumPy, with every grouping there is."""

import itertools

import numpy as np
import pytest
import torch

from lightning_gradnorm import GO4Align, Measurement
from lightning_gradnorm.balancers.go4align import group_means

TASKS = ("a", "b", "c", "d", "e")


def grouped(values, groups):
    """ω⊺G of the least ‖γ⊺ − ω⊺G‖², Eq. (3), out of all assignments."""
    best, found = np.inf, None
    for labels in itertools.product(range(groups), repeat=len(values)):
        means = [values[[k == label for k in labels]].mean() for label in labels]
        if (distance := ((values - means) ** 2).sum()) < best:
            best, found = distance, np.array(means)
    return found


def transcription(steps, groups, beta):
    """The weights of each step: Eq. (5), (6) and (7), times T, and the groups' means."""
    smoothness = np.full(steps.shape[1], 1 / steps.shape[1])
    for losses in steps:
        scale = losses.mean() / losses
        smoothness = smoothness * np.exp(-beta * losses)
        smoothness /= smoothness.sum()
        yield grouped(steps.shape[1] * scale * smoothness, groups)


def losses_of(row, tasks=TASKS):
    return dict(zip(tasks, torch.from_numpy(row), strict=False))


def taken(balancer, row, tasks=TASKS):
    """What a step with these losses applies; then the step is over."""
    applied = balancer.weights_at(losses_of(row, tasks)).numpy()
    balancer.update(Measurement(tasks[: len(row)], torch.from_numpy(row)))
    return applied


@pytest.mark.parametrize(("tasks", "groups", "beta"), [(3, 2, 1e-4), (5, 3, 0.05), (5, 1, 0.3), (4, 4, 0.01), (5, 2, 0.0)])
def test_it_is_the_papers(tasks, groups, beta):
    steps = np.random.default_rng(tasks).gamma(1.0, 2.0, (12, tasks))
    balancer = GO4Align(groups, beta)
    for row, expected in zip(steps, transcription(steps, groups, beta), strict=True):
        np.testing.assert_allclose(taken(balancer, row), expected, rtol=1e-12)
        np.testing.assert_allclose(list(balancer.weights.values()), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_no_grouping_is_nearer(seed):
    draws = np.random.default_rng(seed)
    values = draws.lognormal(0.0, draws.uniform(0.1, 4.0), draws.integers(1, 7))
    groups = int(draws.integers(1, 5))
    np.testing.assert_allclose(group_means(torch.from_numpy(values), groups), grouped(values, groups), rtol=1e-9)


def test_values_that_are_alike_are_one_group_and_the_order_is_nothing():
    values = torch.tensor([7.0, 1.0, 1.2, 6.8, 40.0, 1.1], dtype=torch.float64)
    expected = torch.tensor([6.9, 1.1, 1.1, 6.9, 40.0, 1.1], dtype=torch.float64)
    for order in itertools.permutations(range(6)):
        torch.testing.assert_close(group_means(values[list(order)], 3), expected[list(order)], rtol=1e-14, atol=0)


def test_of_groupings_that_are_as_good_it_is_the_same_in_any_order():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    orders = map(list, itertools.permutations(range(4)))
    assert {tuple(group_means(values[order], 3).sort().values.tolist()) for order in orders} == {(1.0, 2.0, 3.5, 3.5)}


def test_tasks_of_one_size_have_weights_of_one_and_the_total_is_the_plain_sum():
    losses = {task: torch.tensor(3.0, requires_grad=True) for task in TASKS}
    total = GO4Align(3).total(losses)
    assert total.item() == pytest.approx(15.0)
    gradients = torch.autograd.grad(total, list(losses.values()))
    assert torch.stack(gradients).tolist() == pytest.approx([1.0] * 5), "the weights are constants"


def test_the_units_of_all_losses_together_are_nothing_without_memory():
    row = np.array([0.3, 5.0, 2.0])
    np.testing.assert_allclose(taken(GO4Align(beta=0), 1000 * row), taken(GO4Align(beta=0), row), rtol=1e-12)


def test_a_task_that_is_away_keeps_its_share_and_the_others_share_what_they_had():
    balancer = GO4Align(3, beta=0.5)
    for row in np.random.default_rng(1).uniform(0.5, 3.0, (4, 3)):
        taken(balancer, row)
    before = balancer.state_dict()["memory"]["log_smoothness"].exp()
    taken(balancer, np.array([1.0, 4.0]), ("a", "c"))
    after = balancer.state_dict()["memory"]["log_smoothness"].exp()
    assert after[1] == before[1] and after.sum().item() == pytest.approx(3.0)
    assert (after[2] / after[0]).item() == pytest.approx((before[2] / before[0] * np.exp(-0.5 * 3.0)).item())


def test_a_task_that_comes_late_starts_at_the_mean():
    balancer = GO4Align(3, beta=0.5)
    taken(balancer, np.array([1.0, 2.0]))
    taken(balancer, np.array([1.0, 2.0, 1.0]))
    two = np.exp([-0.5, -1.0])
    three = np.append(2 * two / two.sum(), 1.0) * np.exp([-0.5, -1.0, -0.5])
    found = balancer.state_dict()["memory"]["log_smoothness"].exp()
    np.testing.assert_allclose(found, 3 * three / three.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": 0}, "groups is a whole number of groups, 1 or more; got 0"),
        ({"groups": 1.5}, "groups is a whole number of groups, 1 or more; got 1.5"),
        ({"beta": -1e-4}, "beta is a finite number at least 0; got -0.0001"),
    ],
)
def test_settings_outside_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        GO4Align(**settings)
