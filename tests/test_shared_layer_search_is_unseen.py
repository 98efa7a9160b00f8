"""A search for the shared layer leaves nothing behind, and runs no backward twice that may run once only."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm.shared_layer import SharedLayerSearch, detect_shared_layer
from tests.test_shared_layer_search import TRUNK, Network


def stateful(run):
    net = Network()
    net.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), spectral_norm(nn.Linear(8, 8)), nn.Tanh())
    z = run(net.trunk, torch.randn(7, 6))
    return net, {task: net.heads[task](z).square().mean() for task in "abc"}


def kept(trunk, x):
    return checkpoint(trunk, x, use_reentrant=False)


def not_kept(trunk, x):
    return checkpoint(trunk, x, use_reentrant=False, preserve_rng_state=False)


def plain(trunk, x):
    return trunk(x)


@pytest.mark.parametrize("run", [plain, kept, not_kept])
def test_looking_leaves_gradients_buffers_and_random_numbers_as_they_were(run):
    torch.manual_seed(0)
    net, losses = stateful(run)
    net.decoder.weight.grad = torch.ones(8, 8)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    same_buffers, random = dict(net.named_buffers()), torch.get_rng_state()
    layer = detect_shared_layer(losses, net)
    assert "trunk.3.parametrizations.weight.original" in layer.names
    assert torch.equal(torch.get_rng_state(), random)
    for name, buffer in net.named_buffers():
        assert buffer is same_buffers[name]
        assert torch.equal(buffer, buffers[name]), name
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["decoder.weight"]
    assert torch.equal(net.decoder.weight.grad, torch.ones(8, 8))
    sum(losses.values()).backward()  # the graph is still there


class Marked(torch.autograd.Function):
    """A node that Python can watch."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_nothing_stays_of_the_graph_or_on_modules():
    net = Network()
    search = SharedLayerSearch(net)
    losses = {task: Marked.apply(loss) for task, loss in net.losses("abc").items()}
    assert search.look(losses).names == TRUNK
    nodes = [weakref.ref(loss.grad_fn) for loss in losses.values()]
    assert all(node() is not None for node in nodes)
    del losses
    gc.collect()
    assert all(node() is None for node in nodes)
    assert not torch.nn.modules.module._global_forward_pre_hooks


# -- what can be run once only ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_through_a_compiled_region_no_backward_is_run_that_was_not_asked_for():
    torch.compiler.reset()
    torch.manual_seed(0)
    net = Network()
    heads = {task: torch.compile(head, backend="aot_eager") for task, head in net.heads.items()}
    z = net.trunk(torch.randn(7, 6))
    losses = {task: head(z).square().mean() for task, head in heads.items()}
    expected = torch.autograd.grad(
        sum(net.heads[task](z).square().mean() for task in "abc"), net.trunk[2].weight, retain_graph=True
    )
    layer = detect_shared_layer(losses, net)
    assert layer.names == TRUNK
    assert "by the graph alone, part of which can run backward only once" in layer.reason
    sum(losses.values()).backward()
    torch.testing.assert_close(net.trunk[2].weight.grad, expected[0])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_region_below_the_layer_does_not_hinder():
    torch.compiler.reset()
    net = Network()
    stem = torch.compile(net.trunk[0], backend="aot_eager")
    z = net.trunk[1:](stem(torch.randn(7, 6)))
    p = torch.cat([head(z) for head in net.heads.values()], 1)
    losses = {task: p[:, i].square().mean() for i, task in enumerate("abc")}
    assert detect_shared_layer(losses, net).names == TRUNK
    sum(losses.values()).backward()


def test_a_reentrant_checkpoint_below_the_layer_does_not_hinder():
    net = Network()
    z = net.trunk[2:](checkpoint(net.trunk[1], net.trunk[0](torch.randn(7, 6)), use_reentrant=True))
    p = torch.cat([head(z) for head in net.heads.values()], 1)
    losses = {task: p[:, i].square().mean() for i, task in enumerate("abc")}
    assert detect_shared_layer(losses, net).names == TRUNK
