"""Weights per point: masks against joint ascent by autograd, gradient norms against one backward per point."""

import io

import pytest
import torch
from torch import nn

from lightning_gradnorm import GradientNormPoints, SelfAdaptivePoints, UniformPoints
from lightning_gradnorm.pointwise import NotedPoints
from tests.helpers import same_state


def per_point(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def learn(points, steps, index=None):
    for losses in steps:
        points.update([NotedPoints(losses, index)])
    return points


MASKS = {
    "sigmoid": (lambda **s: SelfAdaptivePoints(**s), torch.sigmoid, 0.0),
    "polynomial": (
        lambda **s: SelfAdaptivePoints(mask="polynomial", coefficient=0.2, exponent=1.5, initial=2.0, **s),
        lambda x: 0.2 * x**1.5,
        2.0,
    ),
}
every_mask = pytest.mark.parametrize(("make", "mask", "start"), MASKS.values(), ids=MASKS)


@every_mask
@pytest.mark.parametrize("factory", [torch.optim.Adam, torch.optim.SGD], ids=["Adam", "SGD"])
def test_masks_ascend_as_by_autograd_with_the_same_optimiser(make, mask, start, factory):
    """The paper's saddle point: the network goes down on Σ m(λ_i) ℓ_i, the masks go up on it."""
    points = make(lr=0.05, optimizer=factory)
    lambdas = torch.full((6,), start, dtype=torch.float64, requires_grad=True)
    optimizer = factory([lambdas], lr=0.05, maximize=True)
    net = nn.Linear(1, 1).double()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(1)
    for _ in range(20):
        losses = (net(x) - torch.tanh(5 * x)).square().squeeze(1)
        term = points.term(losses)
        expected = (mask(lambdas) * losses).mean()
        assert term.item() == pytest.approx(expected.item(), rel=1e-12)
        optimizer.zero_grad()
        (mask(lambdas) * losses).sum().backward(inputs=[lambdas], retain_graph=True)
        net.zero_grad()
        term.backward()
        by_hand = torch.autograd.grad(
            (mask(lambdas).detach() * (net(x) - torch.tanh(5 * x)).square().squeeze(1)).mean(), net.weight
        )
        torch.testing.assert_close(net.weight.grad, by_hand[0])
        points.update([NotedPoints(losses.detach(), None)])
        optimizer.step()
        with torch.no_grad():
            net.weight -= 0.1 * net.weight.grad
    torch.testing.assert_close(points.masks, mask(lambdas.detach()))
    assert (points.masks > mask(torch.tensor(start))).all()


def test_points_of_a_mini_batch_are_known_by_their_index():
    """Batches of the fixed points, in any order, leave the others' masks and their optimiser's memory alone."""
    whole, parts = SelfAdaptivePoints(8, lr=0.1), SelfAdaptivePoints(8, lr=0.1)
    losses, index = per_point(8), torch.tensor([5, 0, 3])
    learn(parts, [losses[index]] * 3, index)
    others = torch.ones(8, dtype=torch.bool).index_fill(0, index, False)
    assert (parts.masks[others] == 0.5).all()
    assert (parts.masks[index] > 0.5).all()
    learn(whole, [losses] * 3)
    torch.testing.assert_close(parts.masks[index], whole.masks[index])
    assert parts.weights_for(losses[index], index).tolist() == parts.masks[index].tolist()


def test_a_point_seen_twice_in_a_window_counts_by_its_mean():
    twice, once = (SelfAdaptivePoints(2, lr=0.1, optimizer=torch.optim.SGD) for _ in range(2))
    one = torch.tensor([0])
    twice.update([NotedPoints(torch.tensor([1.0]), one), NotedPoints(torch.tensor([3.0]), one)])
    once.update([NotedPoints(torch.tensor([2.0]), one)])
    assert same_state(twice.state_dict(), once.state_dict())


def test_ranks_learn_from_the_mean_of_what_each_has():
    """The collective sums losses and counts; a rank that saw nothing takes part all the same."""
    a, b = (SelfAdaptivePoints(3, lr=0.1) for _ in range(2))
    whole = learn(SelfAdaptivePoints(3, lr=0.1), [torch.tensor([2.0, 0.5, 4.0])])
    seen: list[torch.Tensor] = []
    a.update([NotedPoints(torch.tensor([2.0, 0.5]), torch.tensor([0, 1]))], lambda t: seen.append(t) or t, torch.device("cpu"))
    total = seen[0] + torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, 1.0]])
    a.reset()
    a.update([NotedPoints(torch.tensor([2.0, 0.5]), torch.tensor([0, 1]))], lambda t: total, torch.device("cpu"))
    b.update([], lambda t: total, torch.device("cpu"))
    assert same_state(a.state_dict(), b.state_dict())
    assert a.masks.tolist() == pytest.approx(whole.masks.tolist())
    with pytest.raises(ValueError, match="distributed run SelfAdaptivePoints needs num_points"):
        SelfAdaptivePoints().update([], lambda t: t, torch.device("cpu"))


@every_mask
def test_a_restored_state_goes_on_as_if_uninterrupted(make, mask, start):
    steps = [per_point(5, seed) for seed in range(9)]
    whole, first = learn(make(), steps), learn(make(), steps[:4])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make()
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_state(learn(second, steps[4:]).state_dict(), whole.state_dict())
    whole.reset()
    assert same_state(whole.state_dict(), make().state_dict())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_point_whose_loss_is_not_finite_keeps_its_mask(bad):
    points = learn(SelfAdaptivePoints(), [per_point(4)] * 2)
    before = points.masks
    losses = per_point(4)
    losses[2] = bad
    learn(points, [losses])
    assert points.masks[2] == before[2]
    assert (points.masks[[0, 1, 3]] > before[[0, 1, 3]]).all()


def test_frozen_masks_and_masks_at_rate_0_stay():
    points = learn(SelfAdaptivePoints(), [per_point(4)] * 2)
    before = points.state_dict()
    points.frozen = True
    assert same_state(learn(points, [per_point(4)]).state_dict(), before)
    assert (learn(SelfAdaptivePoints(lr=0.0), [per_point(4)] * 3).masks == 0.5).all()


def test_the_state_is_that_of_before_until_update_is_called():
    points = learn(SelfAdaptivePoints(), [per_point(4)])
    before = points.state_dict()
    points.term(per_point(4))
    assert same_state(points.state_dict(), before)


WRONG = {
    "another number": (lambda p: p.term(torch.ones(5)), "a mask for each of 4 fixed points, and this batch has 5 losses"),
    "an index of another length": (lambda p: p.term(torch.ones(2), torch.tensor([0])), r"index of 2 .* shape \(1,\)"),
    "coordinates": (lambda p: p.term(torch.ones(2), torch.rand(2)), "tensor of whole numbers of shape .2,.; got torch.float32"),
    "beyond the end": (
        lambda p: p.term(torch.ones(2), torch.tensor([1, 4])),
        "index goes from 1 to 4; the fixed points are 0 to 3",
    ),
    "below 0": (lambda p: p.term(torch.ones(2), torch.tensor([-1, 3])), "index goes from -1 to 3"),
    "update": (lambda p: p.update([NotedPoints(torch.ones(5), None)]), "4 fixed points, and this batch has 5"),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_points_that_do_not_fit_are_refused_and_change_nothing(call, words):
    points = learn(SelfAdaptivePoints(), [per_point(4)])
    before = points.state_dict()
    with pytest.raises(ValueError, match=words):
        call(points)
    assert same_state(points.state_dict(), before)


def test_an_index_needs_to_know_how_many_there_are():
    with pytest.raises(ValueError, match="needs to know how many points there are: give num_points"):
        SelfAdaptivePoints().term(torch.ones(2), torch.tensor([0, 1]))


def test_a_checkpoint_of_other_points_is_refused():
    state = learn(SelfAdaptivePoints(4), [per_point(4)]).state_dict()
    with pytest.raises(ValueError, match="masks of 4 points, and SelfAdaptivePoints was given num_points=5"):
        SelfAdaptivePoints(5).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_points": 0}, "num_points is a whole number of points"),
        ({"mask": "step"}, "mask is one of 'sigmoid', 'polynomial'"),
        ({"lr": -1.0}, "lr is a finite number at least 0"),
        ({"mask": "polynomial", "initial": 0.0}, "initial is a finite number above 0"),
        ({"exponent": 0.0}, "exponent is a finite number above 0"),
        ({"coefficient": -1.0}, "coefficient is a finite number above 0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SelfAdaptivePoints(**settings)


# -- gradient norms --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double()
        self.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        return self.layers(x).squeeze(-1)


def laplace(net, x):
    """u_xx + u_yy of one point."""
    return torch.func.jacrev(torch.func.jacrev(net))(x).diagonal().sum()


def value(net, x):
    return net(x) - x.sum()


@pytest.mark.parametrize("residual", [value, laplace])
@pytest.mark.parametrize("chunk_size", [2, 256])
def test_norms_are_those_of_one_backward_per_point(residual, chunk_size):
    net, x = Net(), torch.rand(5, 2, dtype=torch.float64)
    expected = []
    for point in x:
        gradients = torch.autograd.grad(residual(net, point), list(net.layers.parameters()), allow_unused=True)
        expected.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm().item())
    points = GradientNormPoints(residual, chunk_size=chunk_size, max_weight=1e9)
    assert points.gradient_norms(x, net).tolist() == pytest.approx(expected, rel=1e-10)
    weights = points.weights_for(torch.ones(5), x, net)
    assert weights.tolist() == pytest.approx([max(expected) / g for g in expected], rel=1e-10)
    assert all(p.grad is None for p in net.parameters())


def test_a_point_without_a_gradient_gets_the_greatest_weight_and_no_more():
    net, x = Net(), torch.rand(3, 2, dtype=torch.float64)
    points = GradientNormPoints(lambda net, x: net(x) * (x[0] > 0.5), max_weight=50.0)
    x[:, 0] = torch.tensor([0.9, 0.1, 0.8])
    weights = points.weights_for(torch.ones(3), x, net)
    assert weights[1] == 50.0
    nothing = GradientNormPoints(lambda net, x: 0 * net(x))
    assert nothing.weights_for(torch.ones(3), x, net).tolist() == [1.0] * 3


def test_gradient_norm_points_ask_for_coordinates():
    points = GradientNormPoints(value)
    for wrong in ((None, Net()), (torch.rand(2, 2), Net())):
        with pytest.raises(ValueError, match=r"needs the coordinates of each of the 3 points; got (none|2)"):
            points.weights_for(torch.ones(3), *wrong)
    with pytest.raises(TypeError, match="takes the residual of one point, a function"):
        GradientNormPoints(3)
    with pytest.raises(ValueError, match="max_weight is a finite number at least 1"):
        GradientNormPoints(value, max_weight=0.5)


def test_uniform_points_are_the_mean():
    losses = per_point(7)
    assert torch.equal(UniformPoints().term(losses), losses.mean())
