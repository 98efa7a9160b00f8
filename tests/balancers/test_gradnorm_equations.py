"""GradNorm's equations, against numbers a reader can check and autograd."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm.balancers.gradnorm import (
    balanced_weights,
    gradnorm_gradient,
    gradnorm_loss,
    loss_ratios,
    relative_inverse_training_rates,
    target_norms,
)

positive = st.floats(1e-6, 1e6)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_equations_on_numbers_done_by_hand():
    ratios = loss_ratios(vector(1.0, 6.0, 2.0), vector(2.0, 3.0, 2.0))
    assert ratios.tolist() == [0.5, 2.0, 1.0]
    rates = relative_inverse_training_rates(vector(1.0, 4.0, 1.0))
    assert rates.tolist() == [0.5, 2.0, 0.5]
    norms = vector(1.0, 2.0, 3.0)
    printed = target_norms(norms, rates, 2.0, feasible=False)
    assert printed.tolist() == [0.5, 8.0, 0.5]
    feasible = target_norms(norms, rates, 2.0)
    torch.testing.assert_close(feasible, vector(0.5, 8.0, 0.5) * 2 / 3)
    assert gradnorm_loss(norms, printed).item() == 0.5 + 6.0 + 2.5
    assert gradnorm_gradient(norms, printed, vector(10.0, 20.0, 30.0)).tolist() == [10.0, -20.0, 30.0]


def test_priorities_enter_the_targets_as_factors():
    norms, rates = vector(1.0, 1.0), vector(1.0, 1.0)
    assert target_norms(norms, rates, 1.5, priorities=vector(1.0, 3.0)).tolist() == [0.5, 1.5]
    assert balanced_weights(vector(1.0, 2.0), rates, 1.5, priorities=vector(1.0, 3.0)).tolist() == [1.0, 1.5]


@given(st.lists(st.tuples(positive, positive, st.floats(0.05, 20)), min_size=2, max_size=8), st.floats(0, 3))
def test_closed_form_gradient_is_autograds(rows, alpha):
    w, n, ratios = (vector(*column) for column in zip(*rows, strict=True))
    w.requires_grad_()
    targets = target_norms(w * n, relative_inverse_training_rates(ratios), alpha).detach()
    (by_autograd,) = torch.autograd.grad(gradnorm_loss(w * n, targets), w)
    torch.testing.assert_close(gradnorm_gradient((w * n).detach(), targets, n), by_autograd)


@given(st.lists(st.tuples(positive, positive, st.floats(0.05, 20)), min_size=2, max_size=8), st.floats(0, 3))
def test_feasible_targets_average_to_the_norms(rows, alpha):
    w, n, ratios = (vector(*column) for column in zip(*rows, strict=True))
    rates = relative_inverse_training_rates(ratios)
    targets = target_norms(w * n, rates, alpha)
    torch.testing.assert_close(targets.mean(), (w * n).mean())
    at_rest = balanced_weights(n, rates, alpha)
    assert gradnorm_loss(at_rest * n, target_norms(at_rest * n, rates, alpha)) <= 1e-9 * (at_rest * n).sum()
