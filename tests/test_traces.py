"""Traces of tangent kernels by random signs, against one gradient per point."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm.gradients import CompiledSharedLayerError, HiddenUseError
from lightning_gradnorm.traces import generator_of, ntk_trace, random_signs

POINTS = 5


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def points(dtype=torch.float64):
    return torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def residuals(net, x):
    """Of a first-order equation, with the derivatives by autograd, ``[N]``."""
    x = x.clone().requires_grad_()
    u, v = net(x).unbind(1)
    slopes = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return slopes[:, 0] + u * slopes[:, 1] - v


def point_by_point(r, tensors):
    """The mean of ‖∇r‖² over the points, the slow way."""
    rows = [torch.autograd.grad(one, tensors, retain_graph=True, allow_unused=True) for one in r.flatten()]
    return sum(g.double().square().sum() for row in rows for g in row if g is not None) / r.numel()


def all_signs(*shape):
    """All that can be drawn, each once: the mean over them is the expectation."""
    return torch.tensor(list(itertools.product([1.0, -1.0], repeat=math.prod(shape)))).view(-1, *shape)


EVERY = all_signs(POINTS)
W = {"one weight": lambda net: [net[2].weight], "all": lambda net: list(net.parameters())}


@pytest.mark.parametrize("tensors", W.values(), ids=W)
def test_the_expectation_is_the_trace_point_by_point(tensors):
    net = network()
    r, w = residuals(net, points()), tensors(net)
    expected = point_by_point(r, w)
    assert ntk_trace(r.square(), w, EVERY).item() == pytest.approx(expected.item(), rel=1e-12)
    assert ntk_trace(4 * r.square(), w, EVERY).item() == pytest.approx(4 * expected.item(), rel=1e-12)
    shuffled = (r * torch.tensor([1.0, -1, 1, -1, -1])).square()  # the sign of a residual says nothing
    assert ntk_trace(shuffled, w, EVERY).item() == pytest.approx(expected.item(), rel=1e-12)


def test_each_entry_of_several_residuals_counts():
    net = network()
    w, r = [net[0].weight], net(points())
    found = ntk_trace(r.square(), w, all_signs(POINTS, 2))
    assert found.item() == pytest.approx(point_by_point(r, w).item(), rel=1e-12)


def test_a_few_draws_are_near_and_one_is_not_far():
    net = network()
    r, w = residuals(net, points()), list(net.parameters())
    expected = point_by_point(r, w).item()

    def drawn(count, step):
        return random_signs((count, POINTS), generator_of(step))

    ones = [ntk_trace(r.square(), w, drawn(1, step)).item() / expected for step in range(400)]
    assert torch.tensor(ones).mean().item() == pytest.approx(1, abs=0.2)
    assert 0.1 < torch.tensor(ones).std().item() <= 2**0.5 * 1.1
    many = [ntk_trace(r.square(), w, drawn(400, step)).item() / expected for step in range(3)]
    assert many == pytest.approx([1.0] * 3, abs=0.25)
    assert len(set(ones)) > 8, "the signs are others in every step"


def test_points_whose_residual_is_zero_are_left_out():
    net = network()
    r, w = residuals(net, points()), list(net.parameters())
    squares = (r * torch.tensor([1.0, 0, 1, 0, 1])).square()
    kept = point_by_point(r[[0, 2, 4]], w)
    assert ntk_trace(squares, w, EVERY).item() == pytest.approx(kept.item(), rel=1e-12)
    assert ntk_trace(0 * squares, w, EVERY).item() == 0


def test_a_loss_that_is_no_square_is_no_number():
    net = network()
    found = ntk_trace(residuals(net, points()).square() - 10, list(net.parameters()), EVERY)
    assert found.isnan()


def test_signs_are_a_function_of_their_numbers_alone():
    assert torch.equal(random_signs((3, 7), generator_of(5, 1)), random_signs((3, 7), generator_of(5, 1)))
    draws = [random_signs((1, 40), generator_of(*numbers)) for numbers in itertools.product(range(3), repeat=3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    assert set(torch.cat(draws).unique().tolist()) == {-1.0, 1.0}


def test_nothing_is_left_behind():
    """No hook runs, no gradient is filled, random numbers go on, and the ordinary backward is what it was."""
    net, again, heard = network(), network(), []
    net[2].register_full_backward_hook(lambda *args: heard.append("module"))
    net[2].weight.register_hook(lambda gradient: heard.append("tensor"))
    r = residuals(net, points())
    before, stream = len(heard), torch.get_rng_state()
    ntk_trace(r.square(), list(net.parameters()), EVERY)
    assert len(heard) == before
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), stream)
    r.square().mean().backward()
    residuals(again, points()).square().mean().backward()
    for ours, theirs in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_half_precision_it_is_near(dtype):
    exact = network()
    expected = point_by_point(exact(points())[:, 0] - 1, list(exact.parameters())).item()
    net = copy.deepcopy(exact).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        r = net(points(torch.float32))[:, 0] - 1
        squares = r.square()
    found = ntk_trace(squares, list(net.parameters()), EVERY).item()
    assert found == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 0.03)


def test_a_checkpoint_is_run_again_and_a_reentrant_one_is_refused():
    net = network()
    w = [net[0].weight]
    expected = point_by_point(net(points())[:, 0], w).item()
    r = checkpoint(net[1:], net[0](points()), use_reentrant=False)[:, 0]
    assert ntk_trace(r.square(), w, EVERY).item() == pytest.approx(expected, rel=1e-12)
    r = checkpoint(net[1:], net[0](points()), use_reentrant=True)[:, 0]
    with pytest.raises(HiddenUseError, match=r"Between the residuals and the shared layer lies.*use_reentrant=False"):
        ntk_trace(r.square(), w, EVERY)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_what_was_compiled_is_refused_with_the_way_out():
    net = network(torch.float32)
    r = torch.compile(net[1:], backend="aot_eager")(net[0](points(torch.float32)))[:, 0]
    with pytest.raises(CompiledSharedLayerError, match=r"from the residuals to the shared layer leads.*run only once.*outside"):
        ntk_trace(r.square(), [net[0].weight], EVERY)
    torch.compiler.reset()
