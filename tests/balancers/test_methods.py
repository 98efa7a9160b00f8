"""Each method against its equations: closed forms, transcriptions in NumPy, joint training by autograd."""

import math

import numpy as np
import pytest
import torch

from lightning_gradnorm import (
    AdaptiveNormalizedLoss,
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    EqualWeights,
    GeometricLoss,
    GradNorm,
    LearningRateAnnealing,
    LossRatioBalancing,
    Measurement,
    NTKWeighting,
    RandomLossWeighting,
    ReLoBRaLo,
    SoftAdapt,
    UncertaintyWeighting,
)
from tests.balancers.test_contract import TASKS

close = {"rel": 1e-12}


def history(steps, seed=3):
    """[steps, 3] losses of different size, all above 0."""
    return np.random.default_rng(seed).uniform(0.1, 1.0, (steps, 3)) * np.array([0.02, 1.0, 50.0])


def of(losses, **fields):
    vectors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in fields.items()}
    return Measurement(TASKS, torch.as_tensor(losses, dtype=torch.float64), **vectors)


def weights_over(balancer, losses):
    """The weights after each step, [steps, 3]."""
    seen = []
    for row in losses:
        balancer.update(of(row))
        seen.append(list(balancer.weights.values()))
    return np.array(seen)


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


# -- equal ----------------------------------------------------------------------------------------------------------


def test_equal_weights_are_the_plain_sum_bit_for_bit():
    losses = {task: torch.rand((), generator=torch.Generator().manual_seed(k)) for k, task in enumerate(TASKS)}
    assert torch.equal(EqualWeights().total(losses), sum(losses.values()))


# -- from losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_loss_ratio_balancing(alpha):
    losses = history(5)
    ratios = losses / losses[0]
    powers = (ratios / ratios.mean(1, keepdims=True)) ** alpha
    expected = 3 * powers / powers.sum(1, keepdims=True)
    assert weights_over(LossRatioBalancing(alpha), losses) == pytest.approx(expected, **close)


def test_loss_ratio_balancing_with_alpha_0_is_equal_weights_bit_for_bit():
    assert (weights_over(LossRatioBalancing(0.0), history(9)) == 1.0).all()


def test_dynamic_weight_average_over_epochs():
    """Equation 7 on epoch averages, ρ = 1 for the first two epochs."""
    losses = history(7 * 4)
    epochs = losses.reshape(7, 4, 3)
    balancer, temperature = DynamicWeightAverage(temperature=1.5), 1.5
    means = []
    for epoch in epochs:
        rho = means[-1] / means[-2] if len(means) >= 2 else np.ones(3)
        expected = 3 * softmax(rho / temperature)
        for row in epoch:
            assert list(balancer.weights_for(TASKS).tolist()) == pytest.approx(expected, **close)
            balancer.update(of(row))
        balancer.end_epoch()
        means.append(epoch.mean(0))


def test_adaptive_normalized_loss():
    losses, beta = history(30), 0.9
    average, expected = np.zeros(3), []
    for t, row in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * row
        expected.append(1 / (3 * average / (1 - beta**t)))
    assert weights_over(AdaptiveNormalizedLoss(beta), losses) == pytest.approx(np.array(expected), rel=1e-11)


def test_the_first_adaptive_normalized_total_is_one_whatever_the_losses():
    losses = {"a": torch.tensor(1e-6), "b": torch.tensor(3.0), "c": torch.tensor(4e8)}
    assert AdaptiveNormalizedLoss().total(losses).item() == pytest.approx(1.0)


def test_geometric_loss_is_the_geometric_mean_in_value_and_gradient():
    losses = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.02, 3.0, 500.0)]
    total = GeometricLoss().total(dict(zip(TASKS, losses, strict=True)))
    mean = torch.stack(losses).prod() ** (1 / 3)
    assert total.item() == pytest.approx(mean.item(), **close)
    ours, truth = torch.autograd.grad(total, losses), torch.autograd.grad(mean, losses)
    assert [g.item() for g in ours] == pytest.approx([g.item() for g in truth], **close)


def test_random_weights_are_a_softmax_of_normal_draws():
    weights = weights_over(RandomLossWeighting(seed=7), history(4000))
    logs = np.log(weights) - np.log(weights).mean(1, keepdims=True)  # z up to a common constant
    assert abs(logs.mean(0)).max() < 0.05
    assert np.cov(logs.T) == pytest.approx(np.eye(3) - 1 / 3, abs=0.05)
    assert not np.array_equal(weights, weights_over(RandomLossWeighting(seed=8), history(4000)))


def test_relobralo():
    losses, alpha, tau, expected_rho = history(40), 0.9, 0.7, 0.6
    draws = torch.Generator().manual_seed(11)
    weights, expected = np.ones(3), []
    for t, row in enumerate(losses):
        rho = float(torch.rand((), generator=draws) < expected_rho)
        if t:
            since_start, since_last = (3 * softmax(row / (tau * losses[k])) for k in (0, t - 1))
            weights = alpha * (rho * weights + (1 - rho) * since_start) + (1 - alpha) * since_last
        expected.append(weights)
    ours = weights_over(ReLoBRaLo(alpha, tau, expected_rho, seed=11), losses)
    assert ours == pytest.approx(np.array(expected), rel=1e-7)  # the least weight, 1e-8, is not in the paper


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_softadapt(variant):
    losses, beta = history(20), 0.8
    expected = [np.ones(3)]
    for row, last in zip(losses[1:], losses[:-1], strict=True):
        rates = row - last
        if variant == "normalized":
            rates = rates / abs(rates).sum()
        powers = np.exp(beta * (rates - rates.max())) * (row if variant == "loss_weighted" else 1.0)
        expected.append(3 * powers / powers.sum())
    ours = weights_over(SoftAdapt(beta, variant=variant), losses)
    assert ours == pytest.approx(np.array(expected), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("make", [lambda: SoftAdapt(0.0), lambda: GradNorm(lr=0.0, update="paper")])
def test_without_a_pull_the_weights_stay_equal_bit_for_bit(make):
    balancer = make()
    for row in history(12):
        balancer.update(of(row, gradient_norms=row))
    assert list(balancer.weights.values()) == [1.0] * 3


# -- from indicators -------------------------------------------------------------------------------------------------


def test_dynamic_task_prioritization():
    kpis = np.random.default_rng(1).uniform(0.05, 0.95, (15, 3))
    gammas, smoothing = np.array([2.0, 1.0, 0.5]), 0.3
    balancer = DynamicTaskPrioritization({"a": 2.0, "c": 0.5}, smoothing=smoothing)
    mean = kpis[0]
    for row in kpis:
        mean = smoothing * row + (1 - smoothing) * mean
        balancer.update(of([1.0, 1.0, 1.0], kpis=row))
        assert list(balancer.weights.values()) == pytest.approx(-((1 - mean) ** gammas) * np.log(mean), **close)


def test_the_harder_task_has_the_larger_weight_and_a_task_at_zero_a_finite_one():
    balancer = DynamicTaskPrioritization()
    balancer.update(of([1.0, 1.0, 1.0], kpis=[0.0, 0.5, 1.0]))
    a, b, c = balancer.weights.values()
    assert math.log(1000) * 0.999 == pytest.approx(a)
    assert a > b > c > 0


@pytest.mark.parametrize("kpi", [-0.1, 1.2, math.nan, 90.0])
def test_an_indicator_that_is_none_is_refused(kpi):
    balancer = DynamicTaskPrioritization()
    before = balancer.state_dict()
    with pytest.raises(ValueError, match=r"indicator of task 'b' is .*lies between 0 \(hopeless\) and 1 \(done\)"):
        balancer.update(of([1.0, 1.0, 1.0], kpis=[0.5, kpi, 0.5]))
    assert balancer.state_dict()["tasks"] == before["tasks"] == []


# -- from gradients --------------------------------------------------------------------------------------------------


def test_annealing_takes_one_step_as_the_equation_says():
    balancer = LearningRateAnnealing("a", update_every=1, decay=0.8)
    balancer.update(of([1.0, 1.0, 1.0], gradient_maxima=[8.0, 3.0, 1.0], gradient_means=[1.0, 0.5, 0.01]))
    assert list(balancer.weights.values()) == pytest.approx([1.0, 0.8 + 0.2 * 8 / 0.5, 0.8 + 0.2 * 8 / 0.01], **close)


def test_annealing_comes_to_rest_where_the_formula_says():
    """λ = max / (λ mean), so λ² = max / mean."""
    balancer = LearningRateAnnealing("a", update_every=1)
    for _ in range(3000):
        balancer.update(of([1.0, 1.0, 1.0], gradient_maxima=[8.0, 3.0, 1.0], gradient_means=[1.0, 0.5, 0.01]))
    assert list(balancer.weights.values()) == pytest.approx([1.0, math.sqrt(16), math.sqrt(800)], rel=1e-9)


def test_the_norm_form_comes_to_rest_where_gradnorm_with_alpha_0_does_up_to_a_factor():
    norms = [8.0, 0.5, 0.01]
    balancer, gradnorm = LearningRateAnnealing(form="norm", update_every=1), GradNorm(lr=1.0)
    for _ in range(500):
        for method in (balancer, gradnorm):
            method.update(of([1.0, 1.0, 1.0], gradient_norms=norms))
    ours, theirs = (np.array(list(method.weights.values())) for method in (balancer, gradnorm))
    assert ours == pytest.approx(sum(norms) / np.array(norms), rel=1e-9)
    assert ours / ours.sum() == pytest.approx(theirs / theirs.sum(), rel=1e-9)


def test_a_gradient_of_zero_leaves_its_weight():
    balancer = LearningRateAnnealing("a", update_every=1)
    balancer.update(of([1.0, 1.0, 1.0], gradient_maxima=[8.0, 0.0, 1.0], gradient_means=[1.0, 0.0, 0.5]))
    assert balancer.weights["b"] == 1.0
    assert balancer.weights["c"] > 1.0


def test_annealing_and_its_reference_go_together():
    for wrong in ({}, {"reference": "a", "form": "norm"}):
        with pytest.raises(ValueError, match="form='max_mean' goes with reference='task'"):
            LearningRateAnnealing(**wrong)
    balancer = LearningRateAnnealing("z")
    with pytest.raises(ValueError, match="reference names 'z', which is no task: the tasks are 'a', 'b', 'c'"):
        balancer.update(of([1.0] * 3, gradient_maxima=[1.0] * 3, gradient_means=[1.0] * 3))
    assert balancer.tasks == ()


# -- neural tangent kernel -------------------------------------------------------------------------------------------


def test_a_terms_weight_is_the_traces_sum_over_its_own():
    balancer = NTKWeighting(update_every=1)
    balancer.update(of([1.0, 1.0, 1.0], ntk_traces=[8.0, 1.5, 0.5]))
    assert list(balancer.weights.values()) == pytest.approx([10 / 8, 10 / 1.5, 20], **close)


def test_traces_are_averaged_over_all_at_first_and_exponentially_later():
    traces = np.random.default_rng(1).uniform(0.1, 1.0, (30, 3)) * np.array([0.01, 1.0, 100.0])
    balancer, mean = NTKWeighting(decay=0.75, update_every=1), np.zeros(3)
    for k, row in enumerate(traces):
        balancer.update(of([1.0, 1.0, 1.0], ntk_traces=row))
        mean = traces[: k + 1].mean(0) if k < 4 else 0.75 * mean + 0.25 * row
        assert list(balancer.weights.values()) == pytest.approx(mean.sum() / mean, **close)


# -- settings --------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "alpha": (lambda: LossRatioBalancing(-1.0), "alpha is a finite number at least 0; got -1.0"),
    "temperature": (lambda: DynamicWeightAverage(0.0), "temperature is a finite number above 0"),
    "no number": (lambda: DynamicWeightAverage("2"), "temperature is a finite number above 0; got '2'"),
    "gamma": (lambda: DynamicTaskPrioritization(-1.0), "gamma is a finite number at least 0"),
    "a task's gamma": (lambda: DynamicTaskPrioritization({"a": -1.0}), "gamma of task 'a' is a finite number at least 0"),
    "smoothing": (lambda: DynamicTaskPrioritization(smoothing=1.5), "smoothing is a finite number above 0 and at most 1"),
    "floor": (lambda: DynamicTaskPrioritization(floor=1.0), "floor is a finite number above 0 and below 1"),
    "decay": (lambda: AdaptiveNormalizedLoss(1.0), "decay is a finite number at least 0 and below 1"),
    "AMNL floor": (lambda: AdaptiveNormalizedLoss(floor=0.0), "floor is a finite number above 0"),
    "annealing decay": (lambda: LearningRateAnnealing("a", decay=-0.1), "decay is a finite number at least 0 and below 1"),
    "form": (lambda: LearningRateAnnealing("a", form="mean"), "form is one of 'max_mean', 'norm'; got 'mean'"),
    "kind": (lambda: UncertaintyWeighting({"a": "ranking"}), "kind of task 'a' is one of 'regression', 'classification'"),
    "UW form": (lambda: UncertaintyWeighting(form="new"), "form is one of 'original', 'revised'"),
    "lr": (lambda: UncertaintyWeighting(lr=-1.0), "lr is a finite number at least 0"),
    "log variance": (lambda: UncertaintyWeighting(initial_log_variance=math.inf), "initial_log_variance is a finite number"),
    "seed": (lambda: RandomLossWeighting(1.5), "seed is a whole number; got 1.5"),
    "rho": (lambda: ReLoBRaLo(expected_rho=1.1), "expected_rho is a finite number at least 0 and at most 1"),
    "variant": (lambda: SoftAdapt(variant="hard"), "variant is one of 'original', 'normalized', 'loss_weighted'"),
}


@pytest.mark.parametrize(("make", "words"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_a_setting_outside_its_range_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "make", [lambda: UncertaintyWeighting({"z": "regression"}), lambda: DynamicTaskPrioritization({"z": 1.0})]
)
def test_a_setting_for_a_task_that_is_none_is_refused(make):
    balancer = make()
    with pytest.raises(ValueError, match=r"(kinds|gamma) names 'z', which is no task: the tasks are 'a', 'b', 'c'"):
        balancer.update(of([1.0] * 3, kpis=[0.5] * 3))
    assert balancer.tasks == ()
