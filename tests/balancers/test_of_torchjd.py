"""Weightings of the Gram matrix and scalar functions of the losses: what is applied, and what cannot be used."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torchjd.aggregation import (
    AlignedMTLWeighting,
    DualProjWeighting,
    GradVacWeighting,
    IMTLGWeighting,
    MGDAWeighting,
    PCGradWeighting,
    UPGradWeighting,
)
from torchjd.scalarization import DWA, FAMO, IMTLL, STCH

from lightning_gradnorm import GramianWeighting, Measurement, ScalarizerBalancer
from lightning_gradnorm.balancers.arrays import as_tensor
from lightning_gradnorm.balancers.gramian import LEAST, kept_readable

TASKS = ("a", "b", "c")


def measured(seed=0, tasks=TASKS):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(len(tasks), 5, generator=generator, dtype=torch.float64)
    return Measurement(tasks, torch.rand(len(tasks), generator=generator).double() + 0.5, gramian=gradients @ gradients.T)


def losses_of(*values):
    return {task: torch.tensor(value, dtype=torch.float64) for task, value in zip(TASKS, values, strict=True)}


# -- weightings of the Gram matrix -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [UPGradWeighting, MGDAWeighting])
def test_without_an_average_the_weights_are_the_weighting_s_own(weighting):
    balancer = GramianWeighting(weighting(), ema_decay=0)
    for seed in range(3):
        balancer.update(measured(seed))
        expected = weighting()(measured(seed).gramian)
        assert list(balancer.weights.values()) == pytest.approx(expected.clamp_min(LEAST * expected.max()).tolist(), rel=1e-12)


SURGERY = [
    AlignedMTLWeighting, DualProjWeighting, GradVacWeighting, IMTLGWeighting, MGDAWeighting, PCGradWeighting, UPGradWeighting,
]  # fmt: skip


@pytest.mark.parametrize("cosine", [-0.9, -0.5, -0.16, 0.3])
@pytest.mark.parametrize("weighting", SURGERY)
def test_of_two_gradients_of_one_size_surgery_makes_the_direction_of_the_sum(weighting, cosine):
    """As docs/gradient-surgery.md says."""
    first, second = weighting()(torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)).tolist()
    assert first == pytest.approx(second, rel=1e-3) and first > 0


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [(lambda gramian: torch.ones(3).double(), [0.84, 0.84, -0.13]), (UPGradWeighting(), [0.56, 0.56, 0.29]),
     (MGDAWeighting(), [0.43, 0.43, 0.43])],
)  # fmt: skip
def test_one_against_two_is_what_surgery_is_for(weighting, expected):
    """The cosines of docs/gradient-surgery.md, of a step to each task's gradient."""
    gramian = torch.tensor([[1.0, 0.9, -0.6], [0.9, 1.0, -0.6], [-0.6, -0.6, 1.0]], dtype=torch.float64)
    weights = weighting(gramian)
    cosines = gramian @ weights / (weights @ gramian @ weights).sqrt()
    assert cosines.tolist() == pytest.approx(expected, abs=0.005)


def test_the_average_is_a_mean_at_first_and_exponential_then():
    given = iter([[1.0, 3.0, 2.0], [3.0, 1.0, 2.0], [8.0, 2.0, 5.0]])
    balancer = GramianWeighting(lambda gramian: torch.tensor(next(given)), ema_decay=0.5)
    balancer.update(measured())
    assert list(balancer.weights.values()) == [1.0, 3.0, 2.0]
    balancer.update(measured())
    assert list(balancer.weights.values()) == [2.0, 2.0, 2.0]
    balancer.update(measured())
    assert list(balancer.weights.values()) == [5.0, 2.0, 3.5]


def test_the_weighting_sees_the_tasks_in_one_order():
    seen = []
    balancer = GramianWeighting(lambda gramian: seen.append(gramian.diagonal().tolist()) or torch.ones(len(gramian)))
    first = measured()
    balancer.update(first)
    balancer.update(first.only([2, 0, 1]))
    balancer.update(first.only([2, 0]))
    sizes = first.gramian.diagonal().tolist()
    assert seen == [sizes, sizes, [sizes[0], sizes[2]]]


@pytest.mark.parametrize("weighting", [PCGradWeighting, GradVacWeighting])
def test_random_orders_are_a_function_of_the_step_and_leave_other_numbers_alone(weighting):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        balancer = GramianWeighting(weighting())
        for step in range(6):
            balancer.update(measured(step))
        found.append(balancer.weights)
        drawn = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), drawn)
    assert found[0] == found[1]


def test_a_weight_of_nought_stays_readable():
    assert kept_readable(torch.tensor([2.0, 0.0, -1.0]), allow_negative=False).tolist() == pytest.approx([2.0, 2e-6, 2e-6])
    assert kept_readable(torch.tensor([2.0, -1e-9, -4.0]), allow_negative=True).tolist() == pytest.approx([2.0, -4e-6, -4.0])
    assert kept_readable(torch.zeros(2), allow_negative=False).min() > 0


def test_negative_weights_are_applied_only_where_they_are_allowed():
    def climbs(gramian):
        return torch.tensor([1.0, -0.5, 2.0])

    allowed = GramianWeighting(climbs, allow_negative=True)
    allowed.update(measured())
    assert allowed.weights == {"a": 1.0, "b": -0.5, "c": 2.0}
    refused = GramianWeighting(climbs)
    with pytest.warns(UserWarning, match=r"climbs gave 'b' a negative weight, under which a loss rises.*allow_negative=True"):
        refused.update(measured())
    refused.update(measured())  # told once
    assert refused.weights == {"a": 1.0, "b": pytest.approx(2e-6), "c": 2.0}


def test_a_weighting_that_fails_to_find_numbers_learns_nothing_of_the_step():
    class Counting(nn.Module):
        count = 0

        def forward(self, gramian):
            self.count += 1
            return torch.full((len(gramian),), torch.nan if self.count == 2 else 1.0)

    weighting = Counting()
    balancer = GramianWeighting(weighting)
    balancer.update(measured())
    balancer.update(measured())
    assert (weighting.count, balancer.skipped_updates) == (1, 1)


def test_what_it_was_made_with_stays_the_codes_own_and_what_it_learnt_is_taken_up():
    before, after = GramianWeighting(GradVacWeighting(beta=0.5)), GramianWeighting(GradVacWeighting(beta=0.01))
    for step in range(3):
        before.update(measured(step))
    after.load_state_dict(before.state_dict())
    assert after.weighting.beta == 0.01
    assert torch.equal(after.weighting._phi_t, before.weighting._phi_t)
    assert after.settings()["weighting"] == "GradVacWeighting(beta=0.01, eps=1e-08)"


class Remembering:
    """Makes its attributes as it is called."""

    def __call__(self, gramian):
        if not hasattr(self, "first"):
            self.first, self.last, self.draws = gramian.clone(), deque(maxlen=2), torch.Generator().manual_seed(1)
        self.last.append(gramian.diagonal())
        return self.first.diagonal() * torch.rand(len(gramian), generator=self.draws) + self.last[0]


def test_what_comes_up_on_the_way_is_forgotten_by_a_reset_and_saved():
    balancer, fresh = GramianWeighting(Remembering()), GramianWeighting(Remembering())
    for step in range(3):
        balancer.update(measured(step))
    state = balancer.state_dict()
    assert list(vars(balancer.weighting)) == ["first", "last", "draws"]
    other = GramianWeighting(Remembering())
    other.load_state_dict(state)
    for step in range(3, 6):
        balancer.update(measured(step))
        other.update(measured(step))
    assert other.weights == balancer.weights
    balancer.reset()
    assert vars(balancer.weighting) == {}
    balancer.update(measured())
    fresh.update(measured())
    assert balancer.weights == fresh.weights


@pytest.mark.parametrize("make", [GradVacWeighting, IMTLGWeighting])
def test_of_a_step_that_is_not_finite_nothing_is_learnt_where_nobody_waits(monkeypatch, make):
    """As on a device, where it is not seen before the method runs."""
    for room in ("arrays", "base", "idle", "rule"):
        monkeypatch.setattr(f"lightning_gradnorm.balancers.{room}.surely_all", lambda usable: False, raising=False)
    monkeypatch.setattr("lightning_gradnorm.balancers.rule.on_host", as_tensor)
    balancer, clean = (GramianWeighting(make(), allow_negative=True) for _ in range(2))
    balancer.update(measured())
    clean.update(measured())
    broken = measured(1)
    broken.gramian[0, 1] = torch.nan
    balancer.update(broken)
    assert int(balancer.skipped_updates) == 1 and balancer.weights == clean.weights
    clean.steps += 1
    balancer.update(measured(2))
    clean.update(measured(2))
    assert balancer.weights == clean.weights


def test_numpys_numbers_are_left_alone_too():
    numbers = np.random.mtrand._rand  # the global ones, which others draw from
    balancer = GramianWeighting(lambda gramian: torch.from_numpy(numbers.rand(len(gramian))), ema_decay=0)
    numbers.seed(3)
    balancer.update(measured())
    drawn, weights = numbers.rand(), balancer.weights
    numbers.seed(3)
    assert numbers.rand() == drawn
    balancer.reset()
    balancer.update(measured())
    assert balancer.weights == weights


def test_a_weighting_that_cannot_do_without_a_task_says_which():
    balancer = GramianWeighting(UPGradWeighting(pref_vector=torch.ones(3, dtype=torch.float64)))
    balancer.update(measured())
    with pytest.raises(ValueError, match=r"This step is without 'b'\. Give every task's loss in every batch"):
        balancer.update(measured().only([0, 2]))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.ones(2), r"makes weights, shape \(3,\), .* and gave a tensor of shape \(2,\)"),
        (None, "and gave None. Of TorchJD, take the classes whose names end in Weighting"),
    ],
)
def test_what_is_no_weights_is_refused(found, words):
    with pytest.raises(ValueError, match=words):
        GramianWeighting(lambda gramian: found).update(measured())


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"Pass an object: UPGradWeighting\(\)"):
        GramianWeighting(UPGradWeighting)
    with pytest.raises(TypeError, match=r"UPGradWeighting\(\), got 'upgrad'"):
        GramianWeighting("upgrad")
    with pytest.raises(ValueError, match="allow_negative is true or false"):
        GramianWeighting(UPGradWeighting(), allow_negative="yes")


# -- scalar functions of the losses --------------------------------------------------------------------------------------


def test_the_weights_are_the_slopes():
    balancer = ScalarizerBalancer(STCH(0.5))
    losses = losses_of(1.0, 2.0, 0.5)
    leaf = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    (slopes,) = torch.autograd.grad(STCH(0.5)(leaf), leaf)
    assert balancer.weights_at(losses).tolist() == pytest.approx(slopes.tolist(), rel=1e-6)
    turned = dict(reversed(losses.items()))
    assert ScalarizerBalancer(STCH(0.5), tasks=TASKS).weights_at(turned).tolist() == pytest.approx(slopes.tolist()[::-1])


def test_what_a_scalariser_learns_is_trained_by_the_optimiser_of_its_own():
    """IMTL-L: s ← s − lr (e^s L − 1), to where e^s = 1 / L."""
    scalarizer = IMTLL(3)
    balancer = ScalarizerBalancer(scalarizer, 0.1, optimizer=torch.optim.SGD)
    s = torch.zeros(3)
    for _ in range(300):
        balancer.update(Measurement(TASKS, torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)))
        s -= 0.1 * (s.exp() * torch.tensor([0.5, 1.0, 4.0]) - 1)
        torch.testing.assert_close(scalarizer.log_scale.detach(), s, rtol=1e-4, atol=1e-5)
    assert list(balancer.weights.values()) == pytest.approx([2.0, 1.0, 0.25], rel=1e-3)
    assert balancer.settings()["optimizer"] == "SGD" and scalarizer.log_scale.grad is None


def test_asking_for_weights_leaves_no_gradient():
    scalarizer = IMTLL(3)
    ScalarizerBalancer(scalarizer).weights_at(losses_of(1.0, 2.0, 3.0))
    assert scalarizer.log_scale.grad is None


def test_asking_for_weights_teaches_nothing():
    scalarizer = DWA()
    balancer = ScalarizerBalancer(scalarizer)
    balancer.weights_at(losses_of(1.0, 2.0, 3.0))
    assert scalarizer._n_batches == 0
    for losses in ([1.0, 2.0, 3.0], [1.0, 1.0, 3.0], [0.5, 1.0, 3.0]):
        balancer.update(Measurement(TASKS, torch.tensor(losses, dtype=torch.float64)))
        balancer.end_epoch()
    weights = balancer.weights_at(losses_of(1.0, 1.0, 1.0))
    assert weights.sum() == pytest.approx(3, rel=1e-6) and weights[2] > weights[0]


def test_the_slopes_are_those_of_full_precision_under_autocast():
    balancer, losses = ScalarizerBalancer(lambda losses: (losses[None] @ losses[:, None]).sum()), losses_of(0.3, 1.0, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert balancer.weights_at(losses).tolist() == pytest.approx([0.6, 2.0, 4.0], rel=1e-6)


def test_a_scalariser_learns_nothing_of_losses_that_are_not_finite():
    scalarizer = DWA()
    balancer = ScalarizerBalancer(scalarizer)
    balancer.update(Measurement(TASKS, torch.tensor([1.0, torch.inf, 1.0], dtype=torch.float64)))
    assert scalarizer._n_batches == 0 and int(balancer.skipped_updates) == 1


def test_scalarisers_that_cannot_be_used():
    with pytest.raises(ValueError, match=r"FAMO wants the losses of the same batch once more .*\(update\(\)\)"):
        ScalarizerBalancer(FAMO(3))
    with pytest.raises(TypeError, match="scalarizer is a function of the losses"):
        ScalarizerBalancer(STCH)
    for scalarizer in (lambda losses: losses, lambda losses: 3.0, lambda losses: losses.detach().sum()):
        with pytest.raises(ValueError, match=r"makes one number out of 3 losses, a tensor of shape \(\) that depends on them"):
            ScalarizerBalancer(scalarizer).weights_at(losses_of(1.0, 2.0, 3.0))
