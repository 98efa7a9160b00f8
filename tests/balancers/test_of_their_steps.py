"""Methods whose weights are of the step's own losses: against transcriptions in NumPy."""

import numpy as np
import pytest
import torch

from lightning_gradnorm import DualBalancing, Measurement, SoftOptimalUncertainty

TASKS = ("a", "b", "c")


def measurement(losses, norms):
    return Measurement(TASKS, torch.from_numpy(losses), torch.from_numpy(norms))


def applied(balancer, losses):
    return balancer.weights_at(dict(zip(TASKS, torch.from_numpy(losses), strict=True))).numpy()


@pytest.mark.parametrize(("decay", "fading"), [(0.9, 0.5), (0.5, 0.0), (0.0, 1.0)])
def test_dual_balancing_is_the_authors_but_for_what_is_averaged(decay, fading):
    """Their buffer holds gradients; of parallel ones the norms are averaged alike, so here they are parallel."""
    draws = np.random.default_rng(0)
    balancer, buffer = DualBalancing(decay, fading), np.zeros(3)
    for step in range(1, 9):
        losses, norms = draws.uniform(0.1, 5, 3), draws.uniform(0.01, 20, 3)
        alpha = np.ones(3) if step == 1 else buffer.max() / (buffer + 1e-8)
        np.testing.assert_allclose(applied(balancer, losses), alpha / (losses + 1e-8), rtol=1e-12)
        balancer.update(measurement(losses, norms))
        gradients = norms / (losses + 1e-8)  # of the logarithms
        buffer = gradients + decay / step**fading * ((buffer if step > 1 else gradients) - gradients)


def test_under_dual_balancing_all_gradients_have_the_size_of_the_largest():
    losses, norms = np.array([0.5, 2.0, 1.0]), np.array([3.0, 0.1, 7.0])
    balancer = DualBalancing()
    balancer.update(measurement(losses, norms))
    np.testing.assert_allclose(applied(balancer, losses) * norms, (norms / losses).max(), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_soft_optimal_uncertainty_is_a_softmax_of_inverse_losses(temperature):
    losses = np.array([0.5, 2.0, 1.0])
    scores = np.exp(1 / losses / temperature)
    balancer = SoftOptimalUncertainty(temperature)
    np.testing.assert_allclose(applied(balancer, losses), scores / scores.sum(), rtol=1e-12)
    balancer.update(measurement(losses, losses))
    np.testing.assert_allclose(list(balancer.weights.values()), scores / scores.sum(), rtol=1e-12)
    assert applied(balancer, np.array([0.0, 1.0, 1.0])).tolist() == [1.0, 0.0, 0.0]
