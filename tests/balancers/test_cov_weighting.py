"""CoV-weighting: against the authors' recurrences in NumPy, and the plain formulas over all that was seen."""

import numpy as np
import pytest
import torch

from lightning_gradnorm import CoVWeighting, Measurement

TASKS = ("a", "b", "c")


def steps_of(count, seed=0):
    return np.random.default_rng(seed).gamma(2.0, [0.01, 1.0, 50.0], (count, 3)) * 0.97 ** np.arange(count)[:, None]


def take(balancer, row, tasks=TASKS):
    balancer.update(Measurement(tasks, torch.from_numpy(np.asarray(row))))
    return np.array([balancer.weights[task] for task in tasks])


def test_it_is_the_formula_over_all_steps_so_far():
    """c = σ_l / μ_l, l_t = L_t / mean of L before t, l_0 = 1; without a recurrence."""
    steps, balancer = steps_of(20), CoVWeighting()
    ratios = [np.ones(3)]
    for k, row in enumerate(steps):
        if k:
            ratios.append(row / steps[:k].mean(0))
        seen = np.stack(ratios)
        variation = np.sqrt(seen.var(0) + 1e-8) / seen.mean(0)
        np.testing.assert_allclose(take(balancer, row), 3 * variation / variation.sum(), rtol=1e-10)


def test_it_weighs_each_step_as_the_authors_do_but_for_the_sum():
    """Their loop: weights of the statistics so far, equal on the first two steps, and then the statistics."""
    balancer, mean_loss, mean_ratio, squares, deviation = CoVWeighting(), 0.0, 0.0, 0.0, None
    for k, row in enumerate(steps_of(15, seed=3)):
        ratio = row / (mean_loss if k else row)
        weights = np.full(3, 1 / 3) if k < 2 else deviation / mean_ratio / (deviation / mean_ratio).sum()
        np.testing.assert_allclose(balancer.weights_for(TASKS), 3 * weights, rtol=1e-10)
        kept = 1 - 1 / (k + 1)
        new_mean = kept * mean_ratio + (1 - kept) * ratio
        squares = squares + (ratio - mean_ratio) * (ratio - new_mean)
        mean_ratio, deviation = new_mean, np.sqrt(squares / (k + 1) + 1e-8)
        mean_loss = kept * mean_loss + (1 - kept) * row
        take(balancer, row)


def test_the_weights_know_no_units_and_a_loss_at_rest_weighs_least():
    steps = steps_of(30)
    steps[:, 1] = 2.0
    one, other = CoVWeighting(), CoVWeighting()
    for row in steps:
        weights, of_other_units = take(one, row), take(other, row * [1e6, 1.0, 1e-3])
    np.testing.assert_allclose(weights, of_other_units, rtol=1e-10)
    assert weights[1] < 1e-3 < 0.5 < min(weights[0], weights[2])


def test_nothing_moves_while_a_task_of_the_step_is_new():
    balancer = CoVWeighting()
    for row in steps_of(4)[:, :2]:
        before = take(balancer, row, ("a", "b"))
    assert take(balancer, [0.5, 0.5, 0.5]).tolist() == [*before, 1.0]
    assert take(balancer, [0.4, 0.6, 0.3]).tolist() != [*before, 1.0]
    assert sum(balancer.weights.values()) == pytest.approx(3.0)
