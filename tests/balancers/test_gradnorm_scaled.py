"""GradNorm's printed rule and those of version 0.1, against closed forms and numbers a reader can check."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm import GradNorm, Measurement
from tests.balancers.test_gradnorm_equations import positive, vector
from tests.helpers import of_version_0_1

pytestmark = of_version_0_1

TASKS = ("a", "b", "c", "d")
NORMS = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
RATES = torch.tensor([0.2, 1.0, 0.5, 0.9], dtype=torch.float64)  # as loss ratios: L(0) is given as 1
INITIAL = dict.fromkeys(TASKS, 1.0)


def summed(**settings):
    """GradNorm's rule on log w with the paper's Σw = T and its α = 1.5, where the test says no other."""
    return GradNorm(**({"alpha": 1.5, "update": "log", "scale": "sum"} | settings))


def fixed(balancer, steps, norms=NORMS, losses=RATES):
    """Weights after each of ``steps`` updates with the same norms and losses, [steps, T]."""
    seen = []
    for _ in range(steps):
        balancer.update(Measurement(TASKS[: len(norms)], losses, norms))
        seen.append(list(balancer.weights.values()))
    return torch.tensor(seen, dtype=torch.float64)


# -- where the updates come to rest ----------------------------------------------------------------------------------

MEANT = vector(0.456, 2.549, 0.451, 0.544)  # w ∝ r^α / n with Σ w = T, for the norms and rates above
PRINTED = vector(0.523, 2.337, 0.517, 0.624)  # where the printed target, additive, comes to rest instead
REST = {
    "log, Adam": ({"update": "log"}, MEANT, 0.01),
    "log, SGD": ({"update": "log", "lr": 0.005, "optimizer": torch.optim.SGD}, MEANT, 0.01),
    "closed form": ({"update": "closed_form"}, MEANT, 0.001),
    "paper, Adam": ({"update": "paper"}, PRINTED, 0.01),
    "paper, SGD": ({"update": "paper", "lr": 0.002, "optimizer": torch.optim.SGD}, PRINTED, 0.01),
}


@pytest.mark.parametrize("name", REST)
def test_rest_points_with_norms_and_rates_held_fixed(name):
    settings, rest, tolerance = REST[name]
    mean = fixed(summed(initial_losses=INITIAL, **settings), 4000)[-500:].mean(0)
    assert (mean - rest).abs().max() < tolerance


@pytest.mark.parametrize("update", ["log", "closed_form"])
@pytest.mark.parametrize("needed", [1e-4, 1e-6])
def test_a_tiny_weight_is_reached_and_held(update, needed):
    norms = vector(1.0, 1.0 / needed, 1.0)
    weights = fixed(summed(alpha=0.0, update=update), 1500, norms, vector(1.0, 1.0, 1.0))[-200:, 1]
    torch.testing.assert_close(weights.mean(), vector(1.5 * needed).squeeze(), rtol=0.03, atol=0)


def test_the_printed_additive_rule_cannot_hold_a_tiny_weight():
    """Why it is not the default: its steps of 0.025 jump over 1e-4, so the weight is mostly elsewhere."""
    norms = vector(1.0, 1e4, 1.0)
    weights = fixed(summed(alpha=0.0, update="paper"), 1500, norms, vector(1.0, 1.0, 1.0))[-200:, 1]
    assert ((weights / 1.5e-4).log().abs() > math.log(2)).double().mean() > 0.5


@pytest.mark.parametrize("update", ["log", "paper", "closed_form"])
def test_the_slower_tasks_weight_rises(update):
    balancer = summed(alpha=1.5, update=update)
    balancer.update(Measurement(("slow", "fast"), vector(1.0, 1.0), vector(1.0, 1.0)))
    for step in range(1, 20):
        balancer.update(Measurement(("slow", "fast"), vector(1.0, 0.9**step), vector(1.0, 1.0)))
    assert balancer.weights["slow"] > 1 > balancer.weights["fast"]
    targets = balancer.diagnostics["target_norm"]
    assert targets[0] > targets[1]


def test_first_step_compares_norms_only():
    """At t = 0 all ratios are 1, so the task with the larger gradient loses weight whatever α is."""
    balancer = summed(alpha=3.0)
    assert balancer.weights_for(("a", "b")).tolist() == [1.0, 1.0]
    balancer.update(Measurement(("a", "b"), vector(5.0, 0.1), vector(3.0, 1.0)))
    assert balancer.diagnostics["inverse_rate"].tolist() == [1.0, 1.0]
    assert balancer.weights["a"] < 1 < balancer.weights["b"]


# -- one table of frozen values: (settings, weights after 3 fixed steps) -----------------------------------------------

MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)
FROZEN = [
    ({"update": "log"}, [0.9610973826, 1.1167078567, 0.9610973805, 0.9610973802]),
    ({"update": "paper"}, [0.9615425966, 1.1153722114, 0.9615425961, 0.9615425960]),
    ({"update": "closed_form"}, [0.8620560563, 1.3743194258, 0.8592902087, 0.9043343092]),
    ({"update": "log", "scale": "gradient"}, [0.9371600381, 1.0888948368, 0.9371600361, 0.9371600358]),
    ({"update": "closed_form", "scale": "reference", "reference": "b"}, [0.6272603298, 1.0, 0.6252478081, 0.6580233766]),
    (
        {"update": "log", "alpha": 0.0, "optimizer": MOMENTUM, "lr": 0.01},
        [1.0477954005, 1.0638839124, 0.9719523963, 0.9163682908],
    ),
    ({"update": "log", "priorities": {"a": 10.0}}, [1.0748848879, 1.0748848894, 0.9251151115, 0.9251151112]),
    ({"update": "paper", "max_weight": 1.02}, [0.9933333338, 1.02, 0.9933333332, 0.9933333331]),
]


@pytest.mark.parametrize(("settings", "expected"), FROZEN, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_frozen_values(settings, expected):
    weights = fixed(summed(**{"initial_losses": INITIAL, **settings}), 3)[-1]
    torch.testing.assert_close(weights, vector(*expected), rtol=0, atol=2e-10)


# -- bounds, scale rules, absence --------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(positive, positive), min_size=2, max_size=6),
    st.floats(0, 3),
    st.sampled_from(["log", "paper", "closed_form"]),
    st.sampled_from(["sum", "reference", "gradient"]),
    st.floats(1e-6, 1.0),
    st.floats(1.0, 10.0),
    st.floats(0, 1.0),
)
def test_weights_lie_on_the_scale_rules_set_and_within_the_bounds(rows, alpha, update, scale, low, high, lr):
    tasks = tuple("abcdef"[: len(rows)])
    balancer = summed(
        alpha=alpha,
        lr=lr,
        update=update,
        scale=scale,
        reference="a" if scale == "reference" else None,
        min_weight=low,
        max_weight=high,
    )
    for norms, losses in zip((*rows,), (*rows[::-1],), strict=True):
        n, losses = vector(*norms * 3)[: len(rows)], vector(*losses * 3)[: len(rows)]
        before = balancer.weights_for(tasks)
        balancer.update(Measurement(tasks, losses, n))
        w = balancer.weights_for(tasks)
        assert balancer.skipped_updates == 0 and w.isfinite().all()
        assert (w >= low * (1 - 1e-12)).all() and (w <= high * (1 + 1e-12)).all(), (before, w)
        if scale == "sum":
            assert math.isclose(w.sum(), len(rows), rel_tol=1e-12)
        elif scale == "reference":
            assert w[0] == 1


@pytest.mark.parametrize("update", ["log", "closed_form"])
@pytest.mark.parametrize("norms", [(150.0, 1.0), (1.0, 150.0)], ids=str)
@pytest.mark.parametrize("bound", ["min_weight", "max_weight"])
def test_bounds_are_of_the_weights_after_the_scale_rule(update, norms, bound):
    """The reference's weight, 1, is on both bounds; clamped before it is divided by, it would hold the other one back."""
    balancer = GradNorm(0, reference="a", update=update, ema_decay=0.98, **{bound: 1.0})
    for _ in range(600):
        balancer.update(Measurement(("a", "b"), vector(1.0, 1.0), vector(*norms)))
    wanted = norms[0] / norms[1]
    within = max(wanted, 1.0) if bound == "min_weight" else min(wanted, 1.0)
    assert balancer.weights == {"a": 1.0, "b": pytest.approx(within, rel=0.03)}


def test_the_printed_rule_is_bounded_after_the_scale_rule_too():
    bounded, free = (GradNorm(0, reference="a", update="paper", min_weight=low) for low in (1.0, 1e-8))
    for balancer in (bounded, free):
        fixed(balancer, 30, vector(150.0, 1.0), vector(1.0, 1.0))
    assert bounded.weights == free.weights and free.weights["b"] > 2.0


@pytest.mark.parametrize("update", ["log", "paper", "closed_form"])
@pytest.mark.parametrize("scale", ["sum", "gradient"])
def test_bounds_wide_enough_not_to_bind_change_nothing(update, scale):
    """In between, before the scale rule, a weight may lie outside."""
    narrow, free = (
        summed(update=update, scale=scale, min_weight=low, max_weight=high) for low, high in ((0.8, 1.25), (1e-8, 1e8))
    )
    one, other = (fixed(it, 4, vector(1.0, 1.1, 1.2), vector(1.0, 1.0, 1.0)) for it in (narrow, free))
    assert torch.equal(one, other)


@pytest.mark.parametrize("update", ["log", "closed_form"])
def test_the_shared_gradient_keeps_its_size(update):
    """From weights that are far from it, and where the norms change."""
    balancer = GradNorm(0.0, update=update)
    for norms in (vector(1.0, 50.0, 400.0), vector(30.0, 2.0, 0.5)):
        weights = fixed(balancer, 600, norms, vector(1.0, 1.0, 1.0))[-1]
        torch.testing.assert_close(weights, norms.sum() / (3 * norms), rtol=0.06, atol=0)


@pytest.mark.parametrize("update", ["log", "paper", "closed_form"])
def test_a_weight_leaves_its_bound_again(update):
    balancer = summed(alpha=0.0, update=update, min_weight=0.5, max_weight=1.5)
    losses = vector(1.0, 1.0)
    at_bound = fixed(balancer, 100, vector(100.0, 1.0), losses)[-1]
    torch.testing.assert_close(at_bound, vector(0.5, 1.5), rtol=1e-4, atol=0)
    released = fixed(balancer, 200, vector(1.0, 100.0), losses)[-1]
    torch.testing.assert_close(released, vector(1.5, 0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("update", ["log", "paper", "closed_form"])
def test_an_absent_task_keeps_its_weight_and_the_others_share_the_rest(update):
    balancer = summed(update=update)
    fixed(balancer, 10)
    before = balancer.weights
    memory = balancer.state_dict()["optimizer"]["state"]
    balancer.update(Measurement(("a", "c"), vector(0.1, 0.7), vector(3.0, 0.2)))
    after = balancer.weights
    assert (after["b"], after["d"]) == (before["b"], before["d"])
    assert after["a"] != before["a"] and after["c"] != before["c"]
    assert math.isclose(sum(after.values()), 4, rel_tol=1e-12)
    for old, new in zip(memory.values(), balancer.state_dict()["optimizer"]["state"].values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(old[key][[1, 3]], new[key][[1, 3]]) and not torch.equal(old[key], new[key])


def test_a_task_that_appears_later_starts_at_one_with_its_own_first_loss():
    balancer = summed()
    fixed(balancer, 10, NORMS[:2], RATES[:2])
    before = balancer.weights
    assert balancer.weights_for(("a", "b", "new")).tolist() == [before["a"], before["b"], 1.0]
    balancer.update(Measurement(("a", "b", "new"), vector(0.2, 1.0, 70.0), vector(1.0, 2.0, 1.0)))
    assert math.isclose(sum(balancer.weights.values()), 3, rel_tol=1e-12)
    assert balancer.diagnostics["loss_ratio"].tolist() == [1.0, 1.0, 1.0]
    balancer.update(Measurement(("a", "b", "new"), vector(0.2, 1.0, 35.0), vector(1.0, 2.0, 1.0)))
    assert balancer.diagnostics["loss_ratio"].tolist() == [1.0, 1.0, 0.5]


def test_one_task_keeps_weight_one():
    assert fixed(summed(), 5, vector(3.0), vector(2.0)).tolist() == [[1.0]] * 5


def test_a_gradient_of_zero_moves_its_weight_nowhere_of_itself():
    for update in ("log", "paper", "closed_form"):
        weights = fixed(summed(alpha=0.0, update=update), 50, vector(0.0, 1.0, 1.0), vector(1.0, 1.0, 1.0))
        assert weights.isfinite().all() and (weights > 0).all()
        torch.testing.assert_close(weights.sum(1), torch.full((50,), 3.0, dtype=torch.float64))


def test_all_gradients_zero_is_nothing_to_balance():
    balancer = summed()
    fixed(balancer, 3, vector(0.0, 0.0), vector(1.0, 1.0))
    assert balancer.weights == {"a": 1.0, "b": 1.0} and balancer.skipped_updates == 3
