"""The suite of problems: many trainings at once are what each is alone, and its sums are right."""

import json
import math

import pytest
import torch

from benchmarks.experiments.records import Record
from benchmarks.suite import command, data_files, equations, fluids, methods, references
from benchmarks.suite.members import Stack, fresh
from benchmarks.suite.methods import METHODS, member, obstacle
from benchmarks.suite.registry import DATA, EQUATIONS, PROBLEMS
from benchmarks.suite.summary import Summary
from benchmarks.suite.taylor import TanhNetwork
from lightning_gradnorm.session import BalancingSession
from tests.exact import Exact, smooth_burgers

STEPS = 20
FILES = data_files.NEEDS_FILES
real_data = pytest.mark.skipif(data_files.folder() is None, reason=f"{FILES} does not name a folder with cmapss/ and tox21/")
ALL = [pytest.param(p, marks=real_data) if issubclass(p, data_files.NEED_FILES) else p for p in (*EQUATIONS, *DATA)]


def alone(make, one, steps):
    """The training in an ordinary loop, by a session and its one backward: losses ``[steps, T]`` and the weights."""
    problem = fresh(make, one.seed)
    of = dict(problem.named_parameters())
    layers = {
        "shared": list(problem.shared),
        "matrices": [name for name, parameter in of.items() if parameter.ndim > 1],
        "all": list(of),
    }
    session = BalancingSession(one.balancer, problem, shared_layer=layers[one.norms_on])
    kind = torch.optim.AdamW if problem.weight_decay else torch.optim.Adam
    adam = kind(problem.parameters(), lr=problem.lr, betas=problem.betas, weight_decay=problem.weight_decay)
    seen = []
    for step, batch in zip(range(steps), problem.stream(), strict=False):
        adam.param_groups[0]["lr"] = problem.lr * problem.lr_factor(step / steps)
        losses = problem.losses(*batch)
        seen.append([losses[task].mean().item() for task in problem.tasks])
        if not one.balancer.needs_residuals:
            losses = {task: loss.mean() for task, loss in losses.items()}
        total = session.total(losses)
        adam.zero_grad()
        session.before_backward(total)
        total.backward()
        session.after_backward()
        adam.step()
        session.step()
        if (step + 1) % problem.epoch() == 0:
            session.end_epoch()
    return torch.tensor(seen), one.balancer.weights


def of_torchjd(kind, name, **settings):
    kinds = {"aggregation": ("GramianWeighting", "weighting"), "scalarization": ("ScalarizerBalancer", "scalarizer")}
    balancer, key = kinds[kind]
    return methods.everywhere({"class": balancer, key: {"class": f"torchjd.{kind}.{name}", **settings}})


OTHERS = {
    "averages of epochs": methods.everywhere({"class": "DynamicWeightAverage"}),
    "UPGrad": of_torchjd("aggregation", "UPGradWeighting"),
    "GradVac": of_torchjd("aggregation", "GradVacWeighting", beta=0.1),
    "IMTL-L": of_torchjd("scalarization", "IMTLL", shape="$tasks"),
}


def members_of(make, names, seeds, steps):
    known = METHODS | OTHERS
    mine = {name: known[name][make.kind] for name in names if make.kind in known[name]}
    specs = {name: spec for name, spec in mine.items() if not obstacle(spec, make)}
    return [member(name, spec, make(seed), steps) for seed in seeds for name, spec in specs.items()]


WITH_FILES = [pytest.param(name, marks=real_data) for name in ("FD001", "Tox21")]


@pytest.mark.parametrize("name", ["Helmholtz", "Burgers, inverse", "cavity", "digits", "eight regressions", *WITH_FILES])
def test_a_member_of_the_stack_is_what_it_would_be_alone(name, monkeypatch):
    make = PROBLEMS[name]
    monkeypatch.setattr(make, "epoch", lambda problem: 6)
    names = ("plain", "annealing", "hand 10", "GradNorm", "GradNorm, residuals", "NTK", *OTHERS)
    stack = Stack(make, members_of(make, names, (0, 1), STEPS), STEPS)
    seen = [stack.advance() for _ in range(STEPS)]
    for place, lone in enumerate(members_of(make, names, (0, 1), STEPS)):
        losses, weights = alone(make, lone, STEPS)
        mine = torch.tensor([[losses[task][place].item() for task in make.tasks] for losses in seen])
        assert stack.members[place].balancer.weights == pytest.approx(weights, rel=1e-5)
        torch.testing.assert_close(mine, losses, rtol=1e-5, atol=1e-6)


def test_the_networks_derivatives_are_those_of_autograd():
    torch.manual_seed(0)
    network = TanhNetwork((0.0, -1.0), (2.0, 3.0), 8, 3, outputs=2).double()
    network.middle, network.scale = network.middle.double(), network.scale.double()
    x = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    values, once, twice = network.derivatives(x, second=1)
    torch.testing.assert_close(values, network(x))
    for output in range(2):
        slopes = torch.autograd.grad(values[:, output].sum(), x, create_graph=True)[0]
        torch.testing.assert_close(once[:, :, output].T, slopes)
        torch.testing.assert_close(twice[0, :, output], torch.autograd.grad(slopes[:, 1].sum(), x, retain_graph=True)[0][:, 1])
    for mine, slow in zip(network.third(x), Exact(network).third(x), strict=True):
        torch.testing.assert_close(mine, slow)


# -- the problems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.name)
def test_a_problem_is_what_it_says(make):
    problem = fresh(make, 0)
    losses = problem.losses(*next(problem.stream()))
    assert tuple(losses) == problem.tasks
    assert set(problem.raised) < set(problem.tasks) and set(problem.residuals) <= set(problem.tasks)
    assert all(name in dict(problem.named_parameters()) for name in problem.shared)
    assert 0 < problem.error() < math.inf
    assert set(problem.trivial_losses()) == (set(problem.tasks) if problem.kind == "data" else set())
    again = fresh(make, 0)
    assert all(torch.equal(a, b) for a, b in zip(next(again.stream()), next(fresh(make, 0).stream()), strict=True))


@pytest.mark.parametrize("make", [make for make in EQUATIONS if make.solution is not equations.Equation.solution])
def test_the_exact_solution_has_no_losses(make, monkeypatch):
    """A network that is the exact solution, by autograd in double precision, brings every loss to about zero."""
    problem = make(0)
    batch = [part.double().requires_grad_(part.ndim == 2) for part in next(problem.stream())]
    size = {task: loss.mean().item() for task, loss in problem.losses(*(part.detach().float() for part in batch)).items()}
    if isinstance(problem, fluids.BurgersInverse):
        problem.coefficients.data = torch.tensor([1.0, fluids.VISCOSITY])
    exact = Exact(problem.solution if make.name[:7] != "Burgers" else smooth_burgers)
    monkeypatch.setattr(problem, "network", exact)
    losses = {task: loss.mean().item() for task, loss in problem.losses(*batch).items()}
    assert all(losses[task] < 1e-6 * max(size[task], 1) for task in problem.tasks), losses


def test_the_spectral_reference_solves_its_equation():
    t, x, u = references.allen_cahn(1e-3, 0.5, 200)
    u_t = (u[2:] - u[:-2]) / (t[2] - t[0])
    u_xx = (u.roll(-1, 1) - 2 * u + u.roll(1, 1))[1:-1] / (x[1] - x[0]) ** 2
    middle = u[1:-1]
    inside = slice(20, -20)  # at the ends the initial values have a kink
    residual = (u_t - 1e-3 * u_xx - 5 * middle + 5 * middle**3)[:, inside]
    assert residual.abs().max() < 5e-3 * u_t.abs().max()


def test_the_cavitys_centre_lines_are_those_of_the_literature():
    velocity = references.cavity(100.0, references.np.ones_like)
    assert velocity[16, :, 0].min().item() == pytest.approx(-0.2140, abs=2e-3)  # Ghia, Ghia, Shin 1982: -0.2109
    assert velocity[:, 16, 1].max().item() == pytest.approx(0.1796, abs=2e-3)
    assert velocity[:, 16, 1].min().item() == pytest.approx(-0.2538, abs=2e-3)


# -- command and sums ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_and_takes_methods_by_their_settings(tmp_path, capsys):
    words = ["--problems", "heat, coarse units", "--budget", "0.001", "--out", str(tmp_path)]
    slow = {"class": "GradNorm", "residuals": "$residuals", "update_every": "$steps/400"}
    given = ["--method", f"slow={json.dumps(slow)}", "--methods", "plain", "annealing", "hand 10", "hand 100", "slow"]
    first = command.main(["run", *words, "--seeds", "1", *given])
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == 5
    second = command.main(["run", *words, "--seeds", "2", *given])
    after = (tmp_path / "records.jsonl").read_text().splitlines()
    assert after[:5] == lines and len(after) == 10
    key = (1.0, "heat, coarse units", "slow")
    assert (first.ratios[key].seeds, second.ratios[key].seeds) == (1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "records.jsonl",
        "table.md",
        "ratios.csv",
        "overall.csv",
        "ratios.png",
    }
    with pytest.raises(SystemExit, match="'slow' with other settings"):
        command.main(["run", *words, "--seeds", "1", "--method", 'slow={"class": "GradNorm"}', "--methods", "slow"])
    assert "5 trainings of 4 steps" in capsys.readouterr().out


def test_a_method_that_names_a_residual_is_for_equations():
    spec = {"class": "LearningRateAnnealing", "reference": "$residual", "update_every": "$steps/400"}
    assert not obstacle(spec, PROBLEMS["wave"])
    assert obstacle(spec, PROBLEMS["digits"]) == "names a residual, and there is none"
    made = member("annealing", spec, PROBLEMS["wave"](0), 4000)
    assert (made.balancer.reference, made.balancer.update_every) == ("pde", 10)
    with pytest.raises(SystemExit, match="'x': 'Gradnorm' is no balancer"):
        command.main(["table", "--method", 'x={"data": {"class": "Gradnorm"}}'])
    raised = member("hand 10", METHODS["hand 10"]["data"], PROBLEMS["tabular 500 : 1"](0), 10)
    assert raised.balancer.given == {"price": 1, "sold": 10}


def record(problem, method, seed, error):
    return Record(problem, method, seed, 10, {"error": error}, 0.1, curves={"step": [3, 5, 10], "error": [error] * 3})


def test_ratios_are_of_geometric_means_to_the_best_reference_on_the_seeds_of_all():
    records = [record("a", "plain", 0, 4.0), record("a", "plain", 1, 1.0), record("a", "hand", 0, 8.0)]
    records += [record("a", "hand", 1, 8.0), record("a", "ours", 0, 1.0), record("a", "ours", 1, 1.0)]
    records += [record("a", "ours", 2, 100.0), record("b", "plain", 0, 1.0), record("b", "hand", 0, 0.5)]
    records += [record("b", "ours", 0, 2.0), record("b", "plain", 1, math.nan)]
    summary = Summary(records, {"a": ("data", 10), "b": ("data", 10)}, None, ["plain", "hand"])
    on_a, on_b = summary.ratios[1.0, "a", "ours"], summary.ratios[1.0, "b", "ours"]
    assert (on_a.best, on_a.seeds, on_a.error, on_a.ratio) == ("plain", 2, 1.0, pytest.approx(0.5))
    assert on_a.spread == pytest.approx(math.exp(math.log(4) / math.sqrt(2)))
    assert (on_b.best, on_b.seeds, on_b.ratio) == ("hand", 1, pytest.approx(4.0))
    whole = next(o for o in summary.overall() if (o.mark, o.method) == (1.0, "ours"))
    assert (whole.mean, whole.worst, whole.worst_on) == (pytest.approx(math.sqrt(2)), pytest.approx(4.0), "b")
