"""L(0) is each task's own; with α = 0 no ratio is used, and with α above 0 none may be negative."""

import math

import pytest
import torch

from lightning_gradnorm import GradNorm, LossRatioBalancing, Measurement
from tests.balancers.test_gradnorm_equations import vector
from tests.helpers import of_version_0_1, same_state

pytestmark = of_version_0_1
UPDATES = pytest.mark.parametrize("update", ["average", "log", "paper", "closed_form"])
OF_0_1 = ("sum", "reference", "gradient")
FORMS = pytest.mark.parametrize(
    ("update", "scale"), [("average", None), *((u, s) for u in ("log", "paper", "closed_form") for s in OF_0_1)]
)


def measured(tasks, losses, norms=(3.0, 1.0, 2.0)):
    return Measurement(tuple(tasks), vector(*losses), vector(*norms[: len(losses)]))


def gradnorm(**settings):
    return GradNorm(**({"reference": "a"} if settings.get("scale") == "reference" else {}), **settings)


# -- a window of each task's own -----------------------------------------------------------------------------------------


@FORMS
def test_a_task_that_joins_late_does_not_stop_the_others(update, scale):
    """While its L(0) is being taken it is as if absent."""
    ours, absent = (gradnorm(alpha=1.5, update=update, scale=scale, initial_losses=4) for _ in "ab")
    for step in range(5):
        for it in (ours, absent):
            it.update(measured("ab", (1.0, 2.0 - 0.1 * step)))
    absent.update(measured("abc", (0.9, 1.5, 7.0)))  # so that it knows the name, as ours does
    ours.update(measured("abc", (0.9, 1.5, 7.0)))
    for _ in range(2):
        before = dict(ours.weights)
        ours.update(measured("abc", (0.8, 1.4, 7.0)))
        absent.update(measured("ab", (0.8, 1.4)))
        assert ours.weights == pytest.approx(absent.weights, rel=1e-12)
        assert ours.weights["c"] == before["c"] == 1.0
        assert ours.weights["b"] != before["b"]
    assert ours.skipped_updates == 0
    ours.update(measured("abc", (0.8, 1.4, 3.5)))
    assert ours.diagnostics["loss_ratio"].tolist() == pytest.approx([0.8, 1.4 / 1.85, 3.5 / 6.125])
    assert ours.weights["c"] != 1.0


def test_while_it_waits_a_late_task_has_a_norm_and_no_ratio():
    balancer = GradNorm(1.5, initial_losses=2)
    for tasks in ("ab", "ab", "abc"):
        balancer.update(measured(tasks, (1.0, 2.0, 7.0)[: len(tasks)]))
    shown = {tag: values.tolist() for tag, values in balancer.diagnostics.items()}
    assert shown["grad_norm"][2] == 2.0
    assert all(math.isnan(shown[tag][2]) and math.isfinite(shown[tag][0]) for tag in shown.keys() - {"grad_norm"})


def test_the_case_that_was_found():
    """A window of 100 and a task that joins at step 150 of 300: no step but the first 99 stands still."""
    balancer, stood = GradNorm(1.5, initial_losses=100), []
    for step in range(300):
        tasks, before = "ab" if step < 150 else "abc", dict(balancer.weights)
        balancer.update(measured(tasks, (1.0, 0.99**step + 0.1, 5.0)[: len(tasks)]))
        if balancer.weights.get("b") == before.get("b", 1.0):
            stood.append(step)
    assert stood == list(range(99))


def test_loss_ratios_of_a_late_task_do_not_stop_the_others():
    balancer = LossRatioBalancing(2.0, initial_losses=2)
    for losses in ((1.0, 1.0), (1.0, 1.0), (1.0, 3.0)):
        balancer.update(measured("ab", losses))
    assert balancer.weights == pytest.approx({"a": 0.2, "b": 1.8})
    balancer.update(measured("abc", (1.0, 2.0, 7.0)))
    assert balancer.weights == pytest.approx({"a": 0.4, "b": 1.6, "c": 1.0})
    balancer.update(measured("abc", (1.0, 1.0, 7.0)))
    balancer.update(measured("abc", (1.0, 1.0, 14.0)))
    assert balancer.weights == pytest.approx({"a": 0.5, "b": 0.5, "c": 2.0})


def test_a_name_that_is_no_task_is_told_by_loss_ratios_too():
    balancer = LossRatioBalancing(initial_losses={"z": 1.0})
    with pytest.raises(ValueError, match="initial_losses names 'z', which is no task"):
        balancer.update(measured("ab", (1.0, 1.0)))


# -- with alpha 0 no ratio ------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("first", [(0.0, 1.0, -3.0), (0.0, 0.0, 0.0), (-1.0, 0.5, 2.0)], ids=str)
def test_without_alpha_the_losses_do_not_matter(update, scale, first):
    ours, other = (gradnorm(alpha=0, update=update, scale=scale) for _ in "ab")
    ours.update(measured("abc", first))
    other.update(measured("abc", (1.0, 1.0, 1.0)))
    for losses in ((-1.0, 2.0, 0.0), (5.0, 0.0, -7.0)):
        ours.update(measured("abc", losses, (1.0, 4.0, 2.0)))
        other.update(measured("abc", (1.0, 1.0, 1.0), (1.0, 4.0, 2.0)))
    assert ours.weights == other.weights
    assert ours.skipped_updates == 0
    assert torch.equal(ours.diagnostics["target_norm"], other.diagnostics["target_norm"])
    ratios = ours.diagnostics["loss_ratio"].tolist()
    assert [math.isnan(ratio) for ratio in ratios] == [loss <= 0 for loss in first]


def test_without_alpha_nothing_waits_for_the_first_losses():
    ours, other = GradNorm(alpha=0, initial_losses=100), GradNorm(alpha=0)
    for _ in range(3):
        for it in (ours, other):
            it.update(measured("ab", (1.0, 2.0)))
    assert ours.weights == other.weights and ours.weights["a"] != 1.0


def test_without_alpha_loss_ratios_are_equal_weights_whatever_the_losses():
    balancer = LossRatioBalancing(0.0)
    for losses in ((0.0, -1.0), (1.0, 2.0), (-3.0, 0.0)):
        balancer.update(measured("ab", losses))
        assert balancer.weights == {"a": 1.0, "b": 1.0} and balancer.skipped_updates == 0


@pytest.mark.parametrize("losses", [(math.nan, 1.0), (math.inf, 1.0), (1.0, -math.inf)], ids=str)
def test_without_alpha_a_loss_that_is_not_finite_skips_the_update_all_the_same(losses):
    balancer = GradNorm(alpha=0)
    balancer.update(measured("ab", (1.0, 2.0)))
    before = balancer.weights
    balancer.update(measured("ab", losses))
    assert balancer.weights == before and balancer.skipped_updates == 1


# -- with alpha above 0 none below 0 --------------------------------------------------------------------------------------


@UPDATES
@pytest.mark.parametrize("initial", [{"a": 1.0, "b": 1.0}, "first"], ids=str)
def test_with_alpha_a_negative_loss_is_refused_with_the_way_out(update, initial):
    balancer = GradNorm(alpha=1, update=update, initial_losses=initial)
    balancer.update(measured("ab", (1.0, 2.0)))
    before = balancer.state_dict()
    words = r"GradNorm compares losses by their ratios.*task 'a' is -1\. Add a constant to it, or .*such as GradNorm\(alpha=0\)"
    for norms in ((1.0, 1.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match=words):
            balancer.update(measured("ab", (-1.0, 0.5), norms))
    assert same_state(balancer.state_dict(), before)
    with pytest.raises(ValueError, match=words):
        GradNorm(alpha=1, update=update, initial_losses={"a": 1.0, "b": 1.0}).update(measured("ab", (-1.0, 0.5)))


def test_with_alpha_a_later_loss_of_zero_is_done():
    balancer = GradNorm(alpha=1)
    balancer.update(measured("ab", (1.0, 2.0)))
    balancer.update(measured("ab", (0.0, 2.0)))
    assert balancer.skipped_updates == 0 and balancer.diagnostics["target_norm"][0] == 0
