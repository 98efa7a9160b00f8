"""The published set-ups of DB-PINN: losses, points, weights and training are what the source says."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import db_pinn
from benchmarks.experiments.command import Case, Progress
from benchmarks.experiments.db_pinn_problems import SETUPS, AllenCahn, BurgersInverse, Cavity, latin
from benchmarks.suite.fluids import VISCOSITY
from lightning_gradnorm import EqualWeights, FixedWeights, Measurement
from tests.exact import Exact, smooth_burgers


@pytest.fixture
def small(monkeypatch):
    """The set-ups with fewer points inside."""
    for setup in SETUPS.values():
        monkeypatch.setattr(setup, "inside", 40)


# -- the set-ups ---------------------------------------------------------------------------------------------------------


def test_the_exact_burgers_solution_has_no_losses(small):
    setup = BurgersInverse(0)
    setup.coefficients.data = torch.tensor([1.0, VISCOSITY])
    setup.network = Exact(smooth_burgers)
    losses = {task: getattr(setup, task)(*(part.double() for part in setup.points[task])).item() for task in setup.tasks}
    assert max(losses.values()) < 1e-6, losses
    assert setup.error() < 1e-5 and setup.more(None) == pytest.approx({"λ₁": 1, "λ₂": VISCOSITY})


@pytest.mark.parametrize("turned", [False, True])
def test_kovasznays_flow_has_no_residual_in_the_cavity(small, float64, turned):
    setup = Cavity(0)
    decay = setup.reynolds / 2 - math.sqrt(setup.reynolds**2 / 4 + 4 * math.pi**2)

    def flow(points):
        x, y = points.unbind(1)[:: -1 if turned else 1]
        wave = torch.exp(decay * x)
        psi = y - wave * torch.sin(2 * math.pi * y) / (2 * math.pi)
        return torch.stack([-psi if turned else psi, (1 - wave**2) / 2], 1)

    setup.network = Exact(flow)
    assert setup.pde(torch.rand(50, 2)).item() < 1e-20
    points = torch.rand(20, 2)
    x, y = points.clone().unbind(1)[:: -1 if turned else 1]
    wave = torch.exp(decay * x)
    along, across = 1 - wave * torch.cos(2 * math.pi * y), decay * wave * torch.sin(2 * math.pi * y) / (2 * math.pi)
    torch.testing.assert_close(setup.velocity(points), torch.stack([across, along] if turned else [along, across], 1))


def test_allen_cahns_losses_of_a_known_function(small, float64):
    setup = AllenCahn(0)
    setup.network = Exact(lambda x: x[:, 1] ** 3 + x[:, 0])
    t, x = (torch.rand(30, 2) * 2 - 1).unbind(1)
    u = x**3 + t
    torch.testing.assert_close(setup.pde(torch.stack([t, x], 1)), (1 - 6e-4 * x - 5 * u + 5 * u**3).square().mean())
    ends = [torch.stack([t, torch.full_like(t, end)], 1) for end in (-1.0, 1.0)]
    assert setup.boundary(*ends).item() == pytest.approx(4)  # u differs by 2, u_x not at all
    start = torch.stack([0 * x, x], 1)
    torch.testing.assert_close(setup.initial(start), (x**3 - x**2 * torch.cos(math.pi * x)).square().mean())


def test_the_points_are_as_many_and_where_the_source_has_them():
    burgers, allen_cahn, cavity = (SETUPS[name](0).points for name in ("Burgers, inverse", "Allen–Cahn", "cavity"))
    assert [len(part) for parts in burgers.values() for part in parts] == [BurgersInverse.inside, 100, 100, 100, 300, 300]
    assert [len(part) for parts in allen_cahn.values() for part in parts] == [AllenCahn.inside, 100, 100, 512]
    assert [len(part) for parts in cavity.values() for part in parts] == [Cavity.inside, 100, 100, 100, 100]
    for points in (burgers, allen_cahn):
        left, right = points["boundary"]
        assert set(left[:, 1].tolist()) == {-1} and set(right[:, 1].tolist()) == {1} and torch.equal(left[:, 0], right[:, 0])
        assert not points["initial"][0][:, 0].any()
        assert len(points["initial"][0][:, 1].unique()) == len(points["initial"][0])
    assert [set(side[:, i].tolist()) for side, i in zip(cavity["walls"], (0, 0, 1), strict=True)] == [{0.0}, {1.0}, {0.0}]
    assert set(cavity["lid"][0][:, 1].tolist()) == {1.0}


def test_a_latin_hypercube_has_one_point_in_every_strip():
    points = latin(50, torch.Generator().manual_seed(0))
    assert all(sorted((points[:, i] * 50).long().tolist()) == list(range(50)) for i in (0, 1))


@pytest.mark.parametrize("name", SETUPS)
def test_coordinates_are_scaled_over_all_points_and_weights_are_larger_than_glorots(name):
    setup = SETUPS[name](0)
    points = torch.cat([part for parts in setup.points.values() for part in parts if part.shape[1] == 2])
    scaled = (points - setup.network.middle) * setup.network.scale
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(2))
    weight = setup.network.layers[1].weight
    assert weight.std().item() == pytest.approx(5 / 3 / math.sqrt(len(weight)), rel=0.15)
    torch.testing.assert_close(SETUPS[name](0).network.layers[1].weight, weight, rtol=0, atol=0)


def test_the_cavitys_error_is_of_the_speed_without_the_corners_that_move_and_rest(monkeypatch, tmp_path):
    setup = Cavity(0)
    exact = db_pinn.SETUPS["cavity"].speed
    assert exact is Cavity.speed
    truth = torch.hypot(*torch.ones(33, 33, 2).unbind(2))
    monkeypatch.setattr("benchmarks.suite.references.cavity", lambda *args: torch.ones(33, 33, 2))
    monkeypatch.setattr(setup, "speed", lambda size: torch.full((size, size), math.sqrt(2)))
    assert setup.error() == pytest.approx(0, abs=1e-6)
    wrong = truth.clone()
    wrong[0, -1] = wrong[-1, -1] = 0
    monkeypatch.setattr(setup, "speed", lambda size: wrong.clone())
    assert setup.error() == pytest.approx(0, abs=1e-6)
    wrong[5, 5] = 0
    assert setup.error() == pytest.approx(1 / 33)
    assert setup.more(None) == {} and setup.more(tmp_path) == {}
    (tmp_path / "cavity").mkdir()
    for name in "uv":
        np.savetxt(tmp_path / "cavity" / f"reference_{name}.csv", np.ones((33, 33)), delimiter=",")
    assert setup.more(tmp_path) == {"against the source's solution": pytest.approx(math.sqrt(3) / 33)}


# -- the methods and the training ----------------------------------------------------------------------------------------


def test_the_dual_balance_is_the_sources_algorithm_step_by_step():
    balancer, draws = db_pinn.DualBalanced("pde", 1), np.random.default_rng(0)
    weights, average, running = np.ones(2), np.zeros(2), np.zeros(2)
    for n in range(1, 6):
        losses, maxima, means = draws.uniform(0.1, 9, (3, 3))
        whole = maxima[0] / (weights * means[1:])
        running = (1 - 1 / n) * running + losses[1:] / n
        difficulty = losses[1:] / running
        wanted = whole.sum() * difficulty / difficulty.sum()
        weights = average = average + (wanted - average) / n
        vectors = {"gradient_maxima": torch.tensor(maxima), "gradient_means": torch.tensor(means)}
        balancer.update(Measurement(("pde", "a", "b"), torch.tensor(losses), **vectors))
        assert list(balancer.weights.values()) == pytest.approx([1, *weights])


def training_of(setup, balancer, merged=False):
    return db_pinn.Training(setup, balancer, merged=merged)


def test_gradient_weighting_takes_the_cavitys_conditions_as_one(small):
    setup = Cavity(0)
    apart, merged = (training_of(setup, EqualWeights(), merged).differentiate() for merged in (False, True))
    torch.testing.assert_close(merged[0], torch.stack([apart[0][0], apart[0][1:].sum()]))
    torch.testing.assert_close(merged[1], torch.stack([apart[1][0], apart[1][1:].sum(0)]))


@pytest.mark.parametrize("name", SETUPS)
def test_the_total_has_the_gradient_of_the_weighted_sum(small, name):
    setup = SETUPS[name](0)
    weights = {task: float(place + 1) for place, task in enumerate(setup.tasks)}
    training = training_of(setup, FixedWeights(weights))
    _, gradients, total = training.evaluate()
    filled = {name: parameter.grad.clone() for name, parameter in setup.named_parameters()}
    expected = sum(weights[task] * getattr(setup, task)(*setup.points[task]) for task in setup.tasks)
    setup.zero_grad()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in setup.named_parameters():
        right = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(filled[key], right, rtol=1e-3, atol=1e-4 * gradients.abs().max().item())


def test_gradients_are_measured_on_the_last_hidden_weight_and_on_the_whole_network(small):
    setup = BurgersInverse(0)
    training = training_of(setup, EqualWeights())
    losses, gradients = training.differentiate()
    measured = training.measure(losses, gradients)
    loss = setup.pde(*setup.points["pde"])
    parameters = list(setup.network.parameters())
    by_hand = torch.autograd.grad(loss, [setup.network.layers[-2].weight, *parameters])
    everything = torch.cat([part.flatten() for part in by_hand[1:]]).abs()
    assert measured.gradient_norms[0].item() == pytest.approx(by_hand[0].norm().item(), rel=1e-4)
    assert measured.gradient_maxima[0].item() == pytest.approx(everything.max().item(), rel=1e-4)
    assert measured.gradient_means[0].item() == pytest.approx(everything.mean().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, as it compiles
def test_compiled_losses_and_their_gradients_are_the_same(small):
    setup = Cavity(0).double()
    plain, compiled = (db_pinn.Training(setup, EqualWeights(), merged=False, compiled=how) for how in (False, True))
    for slow, fast in zip(plain.differentiate(), compiled.differentiate(), strict=True):
        torch.testing.assert_close(fast, slow)


def case(problem, method, steps, data: Path | None = None):
    return Case(problem, method, 0, steps, 1, Progress(steps), data, None)


def burgers_after_adam():
    setup = BurgersInverse(0)
    training = training_of(setup, FixedWeights({"pde": 1.0, "boundary": 3.0, "initial": 3.0, "data": 3.0}))
    adam = torch.optim.Adam(setup.parameters(), lr=1e-3)
    for _ in range(5):
        training.step(adam)
    return training


def test_lbfgs_one_iteration_at_a_time_is_torchs_own(small, monkeypatch):
    training, torchs = burgers_after_adam(), burgers_after_adam()
    asked = []
    monkeypatch.setattr(training, "evaluate", lambda: (asked.append(1), db_pinn.Training.evaluate(training))[1])
    spent = training.refine(6, 1000)
    settings = {"tolerance_grad": 1e-23, "tolerance_change": 1e-23, "line_search_fn": "strong_wolfe"}
    lbfgs = torch.optim.LBFGS(torchs.setup.parameters(), lr=0.1, max_iter=6, max_eval=1000, **settings)
    lbfgs.step(lambda: torchs.evaluate()[2])
    assert training.where() == torchs.where()
    assert spent == len(asked) == lbfgs.state_dict()["state"][0]["func_evals"]
    assert training.evaluate()[2] < burgers_after_adam().evaluate()[2]


def test_lbfgs_ends_with_its_budget_and_where_a_search_finds_nothing(small, monkeypatch):
    training = burgers_after_adam()
    assert 10 <= training.refine(1000, 10) <= 10 + db_pinn.SEARCH
    before, (losses, gradients, total) = training.where(), training.evaluate()
    monkeypatch.setattr(training, "evaluate", lambda: (losses, gradients, total))  # nowhere is it any less
    assert training.refine(1000, 1000) <= 26
    assert training.where() == before


def test_burgers_goes_on_with_lbfgs_and_the_last_weights(small):
    record = db_pinn.fit(case("Burgers, inverse", "GradNorm", 8))
    assert record.curves["step"][:8] == [*range(1, 9)] and 8 + 10 <= record.curves["step"][8] <= 8 + 10 + db_pinn.SEARCH
    assert record.curves["weight data"][-1] == record.curves["weight data"][-2] == record.weights["data"] != 1
    assert record.curves["error"][-1] != record.curves["error"][-2]
    assert record.measures.keys() == {"relative L2 error", "λ₁", "λ₂"}


def test_where_single_precision_sees_only_rounding_the_rest_is_double(small, monkeypatch):
    seen = []

    def refine(training, iterations, evaluations):
        seen.append((training.flat.dtype, evaluations))
        return 3

    monkeypatch.setattr(db_pinn.Training, "refine", refine)
    record = db_pinn.fit(case("Burgers, inverse", "plain", 8))
    assert seen == [(torch.float32, 10), (torch.float64, 7)]
    assert record.curves["step"][8:] == [11, 14]


def test_double_precision_changes_nothing_but_the_digits(small):
    setup = BurgersInverse(0)
    training = training_of(setup, EqualWeights())
    single, error = training.evaluate(), setup.error()
    double = training_of(setup.double(), EqualWeights()).evaluate()
    assert double[1].dtype == torch.float64 and setup.points["pde"][0].dtype == torch.float64
    torch.testing.assert_close(double[0], single[0], rtol=1e-5, atol=0)
    assert (double[1] - single[1]).norm() < 1e-4 * double[1].norm()
    assert setup.error() == pytest.approx(error, rel=1e-5)
