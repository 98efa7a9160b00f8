"""GradNorm's weights as an average of those under which L_grad is 0, against closed forms and numbers a reader can check."""

import math

import pytest
import torch

from lightning_gradnorm import GradNorm, JointBackward, Measurement, tap_losses
from lightning_gradnorm.balancers.schedule import widening
from tests import graphs
from tests.balancers.test_gradnorm_equations import vector

TASKS = ("a", "b", "c")


def given(balancer, *rows, losses=(1.0, 1.0, 1.0), tasks=TASKS):
    """The balancer after a step of each of these norms; of steps that are not due, nothing is measured."""
    for norms in rows:
        measurement = Measurement(tasks[: len(norms)], vector(*losses[: len(norms)]), vector(*norms))
        balancer.update(measurement if balancer.due else None)
    return balancer


def random_norms(steps, seed=0):
    draws = torch.randn(steps, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draws + vector(0.0, 2.0, 5.0)).exp()


# -- what is averaged, and how -----------------------------------------------------------------------------------------


def way(steps):
    """How much of its way, in logarithms, a weight has gone after so many steps, at rates of 2 / (t + 30)."""
    return 1 - 29 * 30 / ((steps + 29) * (steps + 30))


def test_the_weights_are_the_average_of_the_rest_points_the_last_counting_most():
    """Of rates 2 / (t + 30): the k-th counts 2 (k + 29) times, and the first weight, one, for the 30 steps before."""
    norms = random_norms(40)
    rest = norms.sum(1, keepdim=True) / 3 / norms
    counts = 2 * (torch.arange(1, 41, dtype=torch.float64) + 29)
    mean = (counts.unsqueeze(1) * rest.log()).sum(0) / (69 * 70)
    assert counts.sum() / (69 * 70) == pytest.approx(way(40))
    torch.testing.assert_close(given(GradNorm(), *norms.tolist()).weights_for(TASKS), mean.exp(), rtol=1e-12, atol=0)


def test_beside_residuals_all_count_alike_and_the_way_is_halved_and_raised():
    norms = random_norms(40)
    residual = norms[:, :2].prod(1).sqrt()
    mean = ((5 * (residual / norms[:, 2]).sqrt()).log().sum() / (40 + 30)).exp()
    weights = given(GradNorm(residuals=["b", "a"]), *norms.tolist()).weights
    assert weights == {"a": 1.0, "b": 1.0, "c": pytest.approx(mean.item(), rel=1e-12)}


@pytest.mark.parametrize(("steps", "share"), [(1, 2 / 31), (30, 0.754), (100, 0.948), (1000, 0.9992)])
def test_with_norms_that_stay_it_is_three_quarters_there_after_thirty_steps(steps, share):
    balancer = given(GradNorm(update_every=1), *[(1.0, 10.0, 100.0)] * steps)
    assert list(balancer.weights.values()) == pytest.approx([w ** way(steps) for w in (37.0, 3.7, 0.37)], rel=1e-9)
    assert way(steps) == pytest.approx(share, rel=1e-3)
    assert balancer.diagnostics["target_norm"].tolist() == pytest.approx([37.0] * 3)


def test_one_batch_moves_no_weight_far():
    """A head that starts at zero has next to no gradient on the shared layer."""
    assert given(GradNorm(), (1.0, 1e-6)).weights["b"] < 2.5


def test_alpha_and_priorities_are_in_the_targets():
    balancer = given(
        GradNorm(2.0, update_every=1, priorities={"c": 3.0}, initial_losses=dict.fromkeys(TASKS, 1.0)), (1.0, 1.0, 1.0)
    )
    given(balancer, *[(1.0, 4.0, 2.0)] * 3000, losses=(0.5, 1.0, 0.5))
    shares = vector(0.25, 1.0, 0.75)  # L̃² times the priority
    expected = 7 * shares / shares.sum()
    torch.testing.assert_close(balancer.diagnostics["target_norm"], expected)
    torch.testing.assert_close(balancer.weights_for(TASKS), expected / vector(1.0, 4.0, 2.0), rtol=1e-3, atol=0)


def test_alpha_and_priorities_beside_residuals_are_halved_like_the_norms():
    balancer = given(GradNorm(2.0, residuals=["a"], priorities={"c": 4.0}), (1.0, 1.0, 1.0))
    given(balancer, *[(1.0, 1.0, 1.0)] * 30_000, losses=(0.25, 0.5, 0.25))
    assert list(balancer.weights.values()) == pytest.approx([1.0, 10.0, 10.0], rel=0.01)


def test_a_task_that_comes_late_goes_its_way_as_fast_as_the_others_did():
    balancer = given(GradNorm(update_every=1), *[(1.0, 10.0)] * 50)
    given(balancer, *[(1.0, 10.0, 100.0)] * 30)
    assert balancer.weights["c"] == pytest.approx(0.37 ** way(30))


def test_tasks_that_take_turns_are_balanced_as_if_they_came_together():
    together, turns = given(GradNorm(update_every=1), *[(1.0, 10.0, 100.0)] * 200), GradNorm(update_every=1)
    for step in range(600):
        task = TASKS[step % 3]
        given(turns, (10.0 ** (step % 3),), tasks=(task,))
    assert turns.weights == pytest.approx(together.weights, rel=0.03)  # the first turns saw some of them alone


def test_a_condition_whose_residual_is_absent_goes_by_its_last_norm_and_stays_until_there_is_one():
    balancer = given(GradNorm(residuals=["pde"], tasks=["border", "start", "pde"]), (4.0,), tasks=("border",))
    balancer.update(Measurement(("border", "start"), vector(1.0, 1.0), vector(4.0, 1.0)))
    assert balancer.weights == dict.fromkeys(("border", "start", "pde"), 1.0) and balancer.skipped_updates == 0
    balancer.update(Measurement(("pde",), vector(1.0), vector(100.0)))
    given(balancer, (4.0,), tasks=("border",))
    assert balancer.weights == {"border": pytest.approx(25.0 ** (1 / 31)), "start": 1.0, "pde": 1.0}


def test_losses_may_be_negative():
    balancer = given(GradNorm(), (1.0, 3.0), losses=(-1.0, 2.0))
    assert balancer.weights == pytest.approx({"a": 2.0 ** way(1), "b": (2 / 3) ** way(1)})


@pytest.mark.parametrize("settings", [{}, {"residuals": ["a"]}], ids=str)
def test_bounds_are_of_the_applied_weights(settings):
    balancer = given(GradNorm(min_weight=0.8, max_weight=2.0, **settings), *[(1.0, 100.0, 0.01)] * 300)
    assert all(0.8 <= weight <= 2.0 for weight in balancer.weights.values())
    assert (balancer.weights["b"], balancer.weights["c"]) == (0.8, 2.0)


# -- rates and intervals -----------------------------------------------------------------------------------------------


def test_ever_fewer_steps_are_measured():
    balancer, due = GradNorm(), []
    for _ in range(10_000):
        due.append(balancer.due)
        balancer.update(Measurement(("a", "b"), vector(1.0, 1.0), vector(1.0, 2.0)) if balancer.due else None)
    assert all(due[:100]) and sum(due[100:200]) == 50 and sum(due[3200:6400]) == 50
    assert [widening(step) for step in (0, 99, 100, 199, 200, 400, 9_999)] == [1, 1, 2, 2, 4, 8, 128]
    assert 420 < sum(due) < 440


@pytest.mark.parametrize("settings", [{}, {"residuals": ["a"]}], ids=str)
@pytest.mark.parametrize("every", [7, "auto"])
def test_how_many_are_measured_hardly_matters(settings, every):
    """Norms that travel over a hundredfold, with noise."""
    steps = 4000
    travel = torch.linspace(0, 1, steps, dtype=torch.float64).unsqueeze(1) * vector(0.0, 2.0, -2.3)
    norms = (random_norms(steps).log() + travel).exp().tolist()
    rare, always = (given(GradNorm(update_every=n, **settings), *norms) for n in (every, 1))
    assert [math.log(rare.weights[task] / always.weights[task]) for task in TASKS] == pytest.approx([0.0] * 3, abs=0.25)


@pytest.mark.parametrize("every", [1, 5])
def test_a_rate_of_ones_own_forgets_alike_at_any_interval(every):
    balancer = given(GradNorm(lr=0.02, update_every=every), *[(1.0, 1.0)] * 1000)
    given(balancer, *[(1.0, 100.0)] * 100)
    rest = math.log(50.5), math.log(0.505)
    way = math.log(balancer.weights["a"]) / rest[0], math.log(balancer.weights["b"]) / rest[1]
    assert way == pytest.approx([1 - 0.98**100] * 2, abs=0.02)
    falling = given(GradNorm(update_every=every), *[(1.0, 1.0)] * 1000, *[(1.0, 100.0)] * 100)
    assert math.log(falling.weights["a"]) / rest[0] == pytest.approx(1 - (1030 / 1130) ** 2, abs=0.02)


@pytest.mark.parametrize("every", [1, "auto"])
def test_a_rate_of_ones_own_forgets_the_noise_of_single_batches_whatever_is_measured(every):
    balancer, seen = GradNorm(lr=0.01, update_every=every), []
    for norms in random_norms(5000).tolist():
        given(balancer, norms)
        seen.append(list(balancer.weights.values()))
    deviation = torch.tensor(seen, dtype=torch.float64)[2000:].log().std(0)
    assert (deviation < 0.25).all(), "of single batches it is above 1"


def test_a_rate_of_ones_own_bounds_how_few_are_measured():
    assert [widening(10**6, rate) for rate in (0.0, 0.001, 0.01, 0.04, 1.0)] == [2**14, 40, 4, 1, 1]
    assert widening(150, 0.001) == 2
    assert GradNorm(lr=0.01).interval == 1


def test_an_optimiser_of_ones_own_takes_the_same_gradient():
    balancer = given(GradNorm(lr=0.1, optimizer=torch.optim.SGD), (1.0, 10.0, 100.0))
    assert list(balancer.weights.values()) == pytest.approx([37.0**0.1, 3.7**0.1, 0.37**0.1], rel=1e-12)
    assert balancer.interval == 1 and balancer.update_every == "auto"
    adam = given(GradNorm(optimizer=torch.optim.Adam), (1.0, 10.0, 100.0))
    assert [math.log(w) for w in adam.weights.values()] == pytest.approx([0.025, 0.025, -0.025], rel=1e-6)


# -- initial losses, update_every --------------------------------------------------------------------------------------


def test_initial_losses_of_the_first_step_by_default():
    balancer = GradNorm(1.5)
    balancer.update(Measurement(("a", "b"), vector(4.0, 8.0), vector(1.0, 1.0)))
    balancer.update(Measurement(("a", "b"), vector(2.0, 2.0), vector(1.0, 1.0)))
    assert balancer.diagnostics["loss_ratio"].tolist() == [0.5, 0.25]


def test_given_initial_losses_and_first_ones_for_the_rest():
    balancer = GradNorm(1.5, initial_losses={"a": math.log(10)})
    balancer.update(Measurement(("a", "b"), vector(math.log(10) / 2, 8.0), vector(1.0, 1.0)))
    assert balancer.diagnostics["loss_ratio"].tolist() == [0.5, 1.0]


def test_mean_of_the_first_steps_and_weights_of_one_until_then():
    balancer = GradNorm(1.5, initial_losses=3)
    for k, loss in enumerate((6.0, 3.0, 3.0)):
        assert balancer.weights_for(("a", "b")).tolist() == [1.0, 1.0], k
        balancer.update(Measurement(("a", "b"), vector(loss, 1.0), vector(1.0, 5.0)))
    assert balancer.diagnostics["loss_ratio"].tolist() == [0.75, 1.0]
    assert balancer.weights["a"] > 1


def test_every_step_is_measured_until_the_initial_losses_are_known():
    balancer = given(GradNorm(1.5, initial_losses=300), *[(1.0, 5.0)] * 299)
    assert balancer.weights == {"a": 1.0, "b": 1.0} and balancer.interval == 1
    assert given(balancer, (1.0, 5.0)).weights == pytest.approx({"a": 3.0 ** (8 / 34), "b": 0.6 ** (8 / 34)})
    assert balancer.interval == widening(300)


def test_update_every_updates_on_the_first_step_and_then_on_one_in_so_many():
    balancer = GradNorm(update_every=3)
    moved = []
    for step in range(9):
        before, due = balancer.weights_for(("a", "b")), balancer.due
        balancer.update(Measurement(("a", "b"), vector(1.0, 1.0), vector(5.0 + step, 1.0)) if due else None)
        moved.append(not torch.equal(before, balancer.weights_for(("a", "b"))))
        assert moved[-1] == due
    assert moved == [True, False, True, False, True, False, False, False, False]


# -- a bare loop -------------------------------------------------------------------------------------------------------


def test_four_lines_in_a_bare_loop_equalise_the_norms():
    torch.manual_seed(0)
    losses, parameters = graphs.trunk_and_heads()
    gradnorm = GradNorm(lr=1.0)
    taps = tap_losses(losses)
    total = gradnorm.total(taps)
    reader = JointBackward(total, taps, parameters)
    total.backward()
    gradnorm.update(reader.measurement())
    weighted = gradnorm.weights_for(losses) * reader.gradients().norms()
    torch.testing.assert_close(weighted / weighted.mean(), torch.ones(3, dtype=torch.float64))


def test_the_total_applies_the_weights_as_constants():
    balancer = GradNorm(1.5)
    given(balancer, *[(1.0, 2.0)] * 5, losses=(0.2, 1.0))
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    total = balancer.total({"b": b, "a": a})
    total.backward()
    w = {task: torch.tensor(weight).float() for task, weight in balancer.weights.items()}
    assert (a.grad, b.grad) == (w["a"], w["b"])
    assert total.dtype == torch.float32 and total.item() == (w["b"] * 3 + w["a"] * 2).item()
