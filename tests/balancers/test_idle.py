"""A task whose gradient is exactly zero takes no part in the step, as if it were absent."""

import io
import itertools
import math

import pytest
import torch

from lightning_gradnorm import (
    DualBalancing,
    GradNorm,
    GramianWeighting,
    LearningRateAnnealing,
    Measurement,
    NTKWeighting,
    RuleBalancer,
)
from lightning_gradnorm.balancers import arrays, base, idle, optimizer
from lightning_gradnorm.measurement import is_of_gradients
from tests.balancers.test_gradnorm_equations import vector
from tests.helpers import of_version_0_1, same_state

pytestmark = of_version_0_1

TASKS = ("a", "b", "c")
OF_GRADIENTS = [name for name in Measurement._fields if is_of_gradients(name)]
METHODS = {
    f"{update}, {rule_of_scale}, alpha {alpha}": lambda update=update, rule_of_scale=rule_of_scale, alpha=alpha: GradNorm(
        alpha, update=update, scale=rule_of_scale, reference="b" if rule_of_scale == "reference" else None
    )
    for update, rule_of_scale, alpha in itertools.product(
        ("log", "paper", "closed_form"), ("sum", "reference", "gradient"), (0.0, 1.5)
    )
} | {
    "average": GradNorm,
    "average, alpha 1.5": lambda: GradNorm(1.5),
    "average, Adam": lambda: GradNorm(1.5, 0.1, optimizer=torch.optim.Adam),
    "residuals": lambda: GradNorm(residuals=["b"]),
    "priorities": lambda: GradNorm(1.5, priorities={"a": 3.0}),
    "bounds": lambda: GradNorm(1.5, min_weight=0.8, max_weight=1.1),
    "bounds, sum": lambda: GradNorm(1.5, scale="sum", min_weight=0.8, max_weight=1.1),
    "annealing": lambda: LearningRateAnnealing("b", update_every=1),
    "annealing, norms": lambda: LearningRateAnnealing(form="norm", update_every=1),
    "NTK": lambda: NTKWeighting(update_every=1),
    "dual": DualBalancing,
    "Gram matrix": lambda: GramianWeighting(lambda gramian: 1 / gramian.diagonal().sqrt()),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def measured(losses, norms, tasks=TASKS):
    losses, norms = (torch.tensor(row, dtype=torch.float64) for row in (losses, norms))
    return Measurement(tasks, losses, norms, 2 * norms, norms / 3, ntk_traces=norms.square(), gramian=torch.outer(norms, norms))


def random_steps(count, seed=0):
    """Losses and norms of which some, and sometimes all, are zero."""
    draws = torch.rand(count, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for k, (losses, norms, draw) in enumerate(draws):
        norms = 10 * norms * (draw > (0.4 if k % 7 else 1.0))
        yield measured((losses + 0.1).tolist(), (norms if k else norms + 1).tolist())


def without(measurement, *tasks):
    return measurement.only([k for k, task in enumerate(measurement.tasks) if task not in tasks])


def same_but_for_the_count(one, other):
    mine, its = one.state_dict(), other.state_dict()
    return same_state({k: v for k, v in mine.items() if k != "idle_steps"}, {k: v for k, v in its.items() if k != "idle_steps"})


@every_method
@pytest.mark.parametrize("idle", ["a", "b", "c"])  # b is the reference of some
def test_it_is_as_if_it_were_absent(make, idle):
    ours, absent = make(), make()
    for balancer in (ours, absent):
        balancer.update(measured([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]))
    for step, measurement in enumerate(random_steps(20)):
        of_norms = measured([1.0, 1.0, 1.0], [1.0, 2.0 + step, 5.0])._asdict()
        whole = measurement._replace(**{name: of_norms[name] for name in OF_GRADIENTS})
        zeros = {name: getattr(whole, name).clone() for name in OF_GRADIENTS}
        for entries in zeros.values():
            entries[TASKS.index(idle)] = 0.0
        before = ours.weights[idle]
        ours.update(whole._replace(**zeros))
        absent.update(without(whole, idle))
        assert ours.weights[idle] == before
        assert same_but_for_the_count(ours, absent)
    assert dict(zip(TASKS, ours.idle_steps.tolist(), strict=True)) == {"a": 0, "b": 0, "c": 0} | {idle: 20}
    assert absent.idle_steps.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", METHODS)
def test_no_weight_runs_away(name):
    balancer, raised = METHODS[name](), 5.0 if name == "residuals" else 1.0
    alike = 3.0 if name == "NTK" else 1.0  # what all weigh where all are alike
    for _ in range(300):
        balancer.update(measured([1.0, 1.0, 1.0], [1.0, 1.0, 0.0]))
    balancer.update(measured([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]))
    assert balancer.weights["c"] == pytest.approx(alike, rel=0.6)
    assert all(0.3 < weight / alike < 3 * raised for weight in balancer.weights.values()), balancer.weights


def waits(monkeypatch):
    """From now on as on a device: no number may be asked for."""
    for room in (arrays, base, idle, optimizer):
        monkeypatch.setattr(room, "reading_is_free", lambda tensor: False)


@every_method
@pytest.mark.parametrize("seed", range(2))
def test_what_a_device_computes_without_being_asked_is_the_same(monkeypatch, make, seed):
    steps = list(random_steps(25, seed))
    steps[5].gradient_norms[1] = steps[5].gradient_maxima[1] = steps[5].ntk_traces[1] = torch.nan
    steps[9].losses[0] = torch.inf
    here, there, seen = make(), make(), []
    for step in steps:
        here.update(step)
        seen.append((here.weights_for(TASKS), here.diagnostics))
    there.update(steps[0])
    waits(monkeypatch)
    for step, (weights, diagnostics) in zip(steps[1:], seen[1:], strict=True):
        there.update(step)
        torch.testing.assert_close(there.weights_for(TASKS), weights, rtol=1e-9, atol=0)
        assert diagnostics.keys() == there.diagnostics.keys()
        for tag, values in diagnostics.items():
            torch.testing.assert_close(there.diagnostics[tag], values, rtol=1e-9, atol=0, equal_nan=True)
    assert here.skipped_updates == there.skipped_updates > 3
    assert here.idle_steps.tolist() == there.idle_steps.tolist()
    for part, state in here.state_dict().get("optimizer", {}).get("state", {}).items():
        for name, value in state.items():
            torch.testing.assert_close(there.state_dict()["optimizer"]["state"][part][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale_rule", ["sum", "reference", "gradient"])
@pytest.mark.parametrize("update", ["log", "paper", "closed_form"])
def test_a_device_is_not_asked_for_numbers_once_all_is_settled(monkeypatch, update, scale_rule):
    reference = "b" if scale_rule == "reference" else None
    balancer = GradNorm(1.5, update=update, scale=scale_rule, reference=reference, optimizer=torch.optim.SGD)
    balancer.update(measured([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    waits(monkeypatch)
    refuse = property(lambda self: pytest.fail("the host would have to wait"))
    for name in ("__bool__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    balancer.update(measured([1.0, 2.0, 3.0], [1.0, 0.0, 1.0]))
    monkeypatch.undo()
    assert balancer.idle_steps.tolist() == [0, 1, 0]


def test_on_a_device_a_negative_loss_skips_the_update(monkeypatch):
    """It cannot be refused there without waiting; a negative target would be worse. (The root of α = 1.5 is no number.)"""
    balancer = GradNorm(1.0)
    balancer.update(measured([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]))
    before = balancer.weights
    waits(monkeypatch)
    balancer.update(measured([1.0, -2.0, 3.0], [1.0, 1.0, 1.0]))
    assert balancer.weights == before and balancer.skipped_updates == 1


class ByNorm(RuleBalancer):
    """A method of a user's, that has never heard of zeros."""

    needs = ("gradient_norms",)
    _remembers = (("last", 0.0),)

    def _next(self, measurement, state):
        wanted = 1 / measurement.gradient_norms
        self.diagnostics = {"grad_norm": measurement.gradient_norms, "wanted": wanted}
        return {"weights": wanted, "last": measurement.gradient_norms}


@pytest.mark.parametrize("device", [False, True])
def test_a_method_that_divides_by_norms_need_not_know(monkeypatch, device):
    balancer = ByNorm()
    balancer.update(measured([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]))
    if device:
        waits(monkeypatch)
    balancer.update(measured([1.0, 1.0, 1.0], [8.0, 0.0, 2.0]))
    assert balancer.weights == {"a": 0.125, "b": 0.5, "c": 0.5}
    assert balancer.state_dict()["memory"]["last"].tolist() == [8.0, 2.0, 2.0]
    assert balancer.skipped_updates == 0


def test_the_charts_show_a_norm_of_zero_and_no_target():
    balancer = GradNorm(1.5)
    balancer.update(measured([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    balancer.update(measured([0.5, 2.0, 1.5], [1.0, 0.0, 1.0]))
    shown = {tag: values.tolist() for tag, values in balancer.diagnostics.items()}
    assert shown["grad_norm"][1] == 0.0
    assert all(math.isnan(shown[tag][1]) for tag in ("target_norm", "loss_ratio", "inverse_rate"))
    assert [shown["loss_ratio"][0], shown["loss_ratio"][2]] == [0.5, 0.5]
    assert [shown["inverse_rate"][0], shown["inverse_rate"][2]] == [1.0, 1.0], "the mean is over those that take part"


@every_method
def test_where_no_task_has_a_gradient_nothing_changes_and_it_is_counted(make):
    balancer, other = make(), make()
    for it in (balancer, other):
        it.update(measured([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]))
    balancer.update(measured([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]))
    expected = other.state_dict() | {
        "steps": 2,
        "skipped_updates": torch.tensor(1),
        "idle_steps": torch.ones(3, dtype=torch.int64),
    }
    assert same_state(balancer.state_dict(), expected)


@pytest.mark.parametrize("update", ["log", "paper", "closed_form"])
def test_a_first_loss_of_zero_without_a_gradient_waits_for_its_first_part(update):
    """A detection batch without boxes comes first."""
    balancer = GradNorm(1.5, update=update)
    balancer.update(measured([1.0, 0.0, 3.0], [1.0, 0.0, 2.0]))
    balancer.update(measured([1.0, 4.0, 3.0], [1.0, 5.0, 2.0]))
    assert balancer.diagnostics["loss_ratio"].tolist() == [1.0, 1.0, 1.0]
    balancer.update(measured([1.0, 2.0, 3.0], [1.0, 5.0, 2.0]))
    assert balancer.diagnostics["loss_ratio"].tolist() == [1.0, 0.5, 1.0]


def test_a_whole_first_batch_without_gradients_gives_no_first_loss():
    balancer = GradNorm(1.5)
    balancer.update(measured([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]))
    assert balancer.skipped_updates == 1 and balancer.weights == dict.fromkeys(TASKS, 1.0)
    balancer.update(measured([1.0, 4.0, 3.0], [1.0, 5.0, 2.0]))
    assert balancer.diagnostics["loss_ratio"].tolist() == [1.0, 1.0, 1.0]


def test_the_mean_of_an_empty_batch_is_no_number_and_no_gradient():
    balancer, absent = GradNorm(1.5), GradNorm(1.5)
    for it in (balancer, absent):
        it.update(measured([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]))
    balancer.update(measured([1.0, math.nan, 3.0], [3.0, 0.0, 2.0]))
    absent.update(without(measured([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]), "b"))
    assert same_but_for_the_count(balancer, absent) and balancer.skipped_updates == 0


def test_a_first_loss_of_zero_with_a_gradient_is_refused():
    balancer = GradNorm(1.5)
    with pytest.raises(ValueError, match=r"initial loss of task 'b' is 0\.0; .*or take GradNorm\(alpha=0\)"):
        balancer.update(measured([1.0, 0.0, 3.0], [1.0, 1e-9, 2.0]))
    assert same_state(balancer.state_dict(), GradNorm(1.5).state_dict())


def test_a_setting_may_name_a_task_that_has_no_gradient_yet():
    balancer = GradNorm(1.5, reference="b", priorities={"b": 2.0})
    balancer.update(measured([1.0, 0.0, 3.0], [1.0, 0.0, 2.0]))
    assert balancer.weights["b"] == 1.0


def test_the_count_is_of_each_task_survives_a_checkpoint_and_is_not_in_an_old_one():
    balancer = GradNorm()
    balancer.update(measured([1.0, 2.0, 3.0], [1.0, 0.0, 1.0]))
    balancer.update(measured([3.0, 1.0], [1.0, 0.0], tasks=("c", "a")))
    balancer.update(measured([1.0, 2.0], [1.0, 0.0], tasks=("a", "new")))
    assert balancer.idle_steps.tolist() == [1, 1, 0, 1]
    torch.save(balancer.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    restored, old = GradNorm(), GradNorm()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert restored.idle_steps.tolist() == [1, 1, 0, 1]
    old.load_state_dict({name: part for name, part in balancer.state_dict().items() if name not in ("idle_steps", "method")})
    assert old.idle_steps.tolist() == [0, 0, 0, 0]
    assert old.weights == balancer.weights
    balancer.reset()
    assert balancer.idle_steps.tolist() == []


def test_frozen_weights_stay_and_idle_steps_are_counted():
    balancer = GradNorm()
    balancer.frozen = True
    balancer.update(measured([1.0, 2.0, 3.0], [1.0, 0.0, 1.0]))
    assert balancer.weights == dict.fromkeys(TASKS, 1.0) and balancer.idle_steps.tolist() == [0, 1, 0]


@pytest.mark.parametrize("update", ["log", "closed_form"])
def test_the_others_balance_as_two_tasks_would(update):
    """α = 0: w ∝ 1 / n among those that have a gradient, and Σ w of theirs is kept."""
    balancer = GradNorm(0.0, update=update, scale="sum")
    for _ in range(1500):
        balancer.update(measured([1.0, 1.0, 1.0], [1.0, 3.0, 0.0]))
    a, b, c = balancer.weights_for(TASKS)
    torch.testing.assert_close(torch.stack([a, b]), vector(1.5, 0.5), rtol=0.03, atol=0)
    assert c == 1.0
