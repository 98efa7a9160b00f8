"""Uncertainty weighting against joint training of s by autograd."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_gradnorm import Measurement, UncertaintyWeighting
from tests.balancers.test_contract import TASKS
from tests.balancers.test_methods import history, of, weights_over

KINDS = {"a": "regression", "b": "classification", "c": "regression"}


@pytest.mark.parametrize("form", ["original", "revised"])
@pytest.mark.parametrize("factory", [torch.optim.Adam, torch.optim.SGD], ids=["Adam", "SGD"])
def test_uncertainty_weighting_equals_training_s_with_the_network(form, factory):
    """Kendall's objective with s as parameters of one autograd graph, against our balancer; 200 steps."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    ours = copy.deepcopy(theirs)
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    halves = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    their_steps = factory([{"params": theirs.parameters(), "lr": 0.01}, {"params": [s], "lr": 0.025}])
    our_steps = factory(ours.parameters(), lr=0.01)
    balancer = UncertaintyWeighting(KINDS, form=form, optimizer=factory)
    scales = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    for x in torch.randn(200, 16, 4, dtype=torch.float64):
        target = x[:, :3].sin()
        losses = scales * (theirs(x) - target).square().mean(0)
        regulariser = s / 2 if form == "original" else torch.log1p(s.exp())
        objective = (halves * torch.exp(-s) * losses + regulariser).sum()
        their_steps.zero_grad()
        objective.backward()
        their_steps.step()

        own = dict(zip(TASKS, scales * (ours(x) - target).square().mean(0), strict=True))
        our_steps.zero_grad()
        balancer.total(own).backward()
        balancer.update(Measurement(TASKS, torch.stack([loss.detach() for loss in own.values()])))
        our_steps.step()
    truth = halves * torch.exp(-s.detach())
    assert (truth - halves).abs().max() > 0.1
    torch.testing.assert_close(balancer.weights_for(TASKS), truth, rtol=1e-9, atol=0)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_at_rest_the_weight_is_one_over_the_loss_or_over_twice_the_loss():
    balancer = UncertaintyWeighting(KINDS, optimizer=torch.optim.SGD, lr=0.5)
    for _ in range(2000):
        balancer.update(of([0.1, 1.0, 5.0]))
    assert list(balancer.weights.values()) == pytest.approx([1 / 0.2, 1 / 2.0, 1 / 10.0], rel=1e-9)


def test_at_rate_0_the_variances_stay():
    balancer = UncertaintyWeighting(KINDS, lr=0.0, initial_log_variance=math.log(0.5))
    assert (weights_over(balancer, history(5)) == [[1.0, 2.0, 1.0]] * 5).all()
