"""The physics-informed examples on their quick setting: errors fall, weights move, and what each is about happens."""

from types import SimpleNamespace

import pytest
import torch

from tests.test_examples import is_drawn

pytestmark = pytest.mark.slow


def by_name(name):
    """Have the fixture import that example."""
    return pytest.mark.parametrize("example", [name], indirect=True)


@by_name("pinn")
def test_gradnorm_raises_the_small_terms_and_halves_the_plain_sums_error(example, tmp_path, capsys):
    runs = example.main(["--quick", "--out", str(tmp_path)])
    assert is_drawn(tmp_path / "pinn.png")
    printed = capsys.readouterr().out
    assert all(method in printed for method in ("equal", "by hand", "GradNorm", "relative L2 error"))
    ((equal,), (by_hand,), (balanced,)) = runs.values()
    assert equal.weights == []
    assert by_hand.weights[0] == by_hand.weights[-1] == {"pde": 1.0, "boundary": 100.0, "data": 100.0}
    weights = balanced.weights[-1]
    assert weights["pde"] == 1
    assert min(weights["boundary"], weights["data"]) > 20
    assert balanced.errors[-1] < 0.5 * equal.errors[-1]


@by_name("pinn_lbfgs")
def test_weights_are_constant_inside_the_closure_and_lbfgs_lowers_the_error(example, tmp_path, monkeypatch):
    applied = []  # of each evaluation while L-BFGS runs: which step of which fit, and ∂ total / ∂ L_i
    plain = example.KleinGordon.total_loss

    def noting(self, losses, **more):
        total = plain(self, losses, **more)
        if self.second_phase:
            slopes = torch.autograd.grad(total, list(losses.values()), retain_graph=True)
            applied.append(((id(self.trainer), self.global_step), tuple(slope.item() for slope in slopes)))
        return total

    monkeypatch.setattr(example.KleinGordon, "total_loss", noting)
    runs = example.main(["--quick", "--out", str(tmp_path)])
    assert is_drawn(tmp_path / "pinn_lbfgs.png")
    within = {}
    for step, weights in applied:
        within.setdefault(step, []).append(weights)
    assert max(map(len, within.values())) >= 20
    assert all(len(set(weights)) == 1 for weights in within.values())

    ((moving,), (held,)) = runs["moving"], runs["held"]
    adam = moving.steps.index(200)
    assert moving.errors[: adam + 1] == held.errors[: adam + 1]
    assert all(weights == held.weights[adam] for weights in held.weights[adam:])
    assert moving.weights[-1] != moving.weights[adam]
    for history in (moving, held):
        assert history.errors[-1] < 0.5 * history.errors[adam]


@by_name("pinn_domains")
def test_the_exact_rod_meets_its_equation_and_its_interfaces(example):
    x = torch.linspace(0.01, 0.24, 50, dtype=torch.float64, requires_grad=True)
    for quarter, k in enumerate(example.CONDUCTIVITIES):
        (slope,) = torch.autograd.grad(example.exact(x + quarter / 4).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x)
        load = example.AMPLITUDE * torch.sin(example.WAVES * (x.detach() + quarter / 4))
        torch.testing.assert_close(-k * bend, load)
    ends = example.exact(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.zeros(2, dtype=torch.float64))
    step = 1e-6
    for i in range(1, example.DOMAINS):
        left, at, right = example.exact(torch.tensor([i / 4 - step, i / 4, i / 4 + step], dtype=torch.float64)).tolist()
        assert example.CONDUCTIVITIES[i - 1] * (at - left) == pytest.approx(example.CONDUCTIVITIES[i] * (right - at), rel=1e-3)


@by_name("pinn_domains")
def test_seven_tasks_on_four_networks_are_weighed_and_the_jumps_shrink(example, tmp_path, capsys):
    runs = example.main(["--quick", "--out", str(tmp_path)])
    assert is_drawn(tmp_path / "pinn_domains.png")
    assert "greatest jump of flux" in capsys.readouterr().out
    ((equal,), (balanced,)) = runs.values()
    assert list(balanced.weights[-1]) == [*(f"pde {i}" for i in (1, 2, 3, 4)), "continuity", "flux", "ends"]
    assert balanced.weights[-1]["continuity"] > 10 * balanced.weights[-1]["pde 2"]
    assert balanced.jumps[-1].u < 0.7 * equal.jumps[-1].u
    assert balanced.errors[-1] < equal.errors[-1]


@pytest.mark.filterwarnings("ignore:The weight of task 'boundary' rose")  # so it does, while the next level is learnt
@by_name("pinn_multilevel")
def test_the_weights_start_anew_at_each_level_only_where_they_are_reset(example, tmp_path):
    runs = example.main(["--quick", "--steps", "600", "--out", str(tmp_path)])
    assert is_drawn(tmp_path / "pinn_multilevel.png")
    ((kept,), (reset,)) = runs["kept"], runs["reset"]
    first = next(i for i, step in enumerate(reset.steps) if step > 200)
    assert kept.weights[:first] == reset.weights[:first]
    assert kept.errors[:first] == reset.errors[:first]
    assert reset.weights[first - 1]["boundary"] > 10
    at_the_next = [(run.weights[first - 1]["boundary"], run.weights[first]["boundary"]) for run in (kept, reset)]
    jumps = dict(zip(("kept", "reset"), (after / before for before, after in at_the_next), strict=True))
    assert jumps["reset"] < 0.5 < 0.8 < jumps["kept"] < 1.2, "one that is reset starts from one again"
    assert runs["equal"][0].weights == []


@by_name("pinn_adaptive")
def test_points_are_drawn_where_the_residual_is_large(example, monkeypatch):
    monkeypatch.setattr(example.Burgers, "residual", lambda self, points: (example.front(points).abs() < 0.05).float())
    module, shares = example.Burgers(), {}
    for method in ("even", "by residual"):
        example.Redraw(method, 0).on_train_batch_start(SimpleNamespace(global_step=250), module)
        assert module.points.shape == (example.COUNT, 2)
        shares[method] = module.residual(module.points).mean().item()
    assert 0.02 < shares["even"] < 0.12  # the band is 0.067 of the rectangle
    assert 0.35 < shares["by residual"] < 0.65  # it has half of the probability, and as much of the even part again


@by_name("pinn_adaptive")
def test_points_are_drawn_anew_unless_they_are_fixed_and_the_errors_fall(example, tmp_path, monkeypatch):
    drawn = {method: [] for method in example.METHODS}
    plain = example.Redraw.on_train_batch_start

    def noting(self, trainer, module, *args):
        plain(self, trainer, module, *args)
        if not any(module.points is points for points in drawn[self.method]):
            drawn[self.method].append(module.points)

    monkeypatch.setattr(example.Redraw, "on_train_batch_start", noting)
    found = example.main(["--quick", "--out", str(tmp_path)])
    assert is_drawn(tmp_path / "pinn_adaptive.png")
    assert {method: len(points) for method, points in drawn.items()} == {"fixed": 1, "even": 3, "by residual": 3}
    assert torch.equal(drawn["fixed"][0], drawn["even"][0])
    for ((_, history),) in found.values():
        assert history.errors[-1] < 0.7 * history.errors[0]
        assert set(history.weights[0]) == {"pde", "boundary", "initial"}
        assert history.weights[-1]["boundary"] > 3 * history.weights[-1]["pde"]
