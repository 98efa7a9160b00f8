"""The engine against the slow oracle, on graphs of many shapes."""

import copy
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradnorm.autograd_graph import nodes_met
from lightning_gradnorm.gradients import (
    IncompleteBackwardError,
    JointBackward,
    PerTaskBackward,
    UnreachedSharedLayerError,
    tap_losses,
)
from lightning_gradnorm.task_gradients import TaskGradients, cosines
from tests import graphs

pytestmark = pytest.mark.usefixtures("float64")
ENGINES = [JointBackward, PerTaskBackward]


def oracle(losses, parameters):
    """∇_W L_i, [T, |W|], one plain autograd.grad each."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses.values()]
    return torch.stack(
        [
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, parameters, strict=True)])
            for row in rows
        ]
    )


def weighted(taps, weights):
    return sum(w * loss for w, loss in zip(weights, taps.values(), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 1 / 3], ids=["as is", "scaled up", "divided"])
@pytest.mark.parametrize("graph", graphs.ALL, ids=lambda graph: graph.__name__)
def test_norms_and_gradients_equal_one_autograd_grad_per_task(graph, scale, engine):
    losses, parameters = graph()
    expected = oracle(losses, parameters)
    taps = tap_losses(losses)
    root = weighted(taps, torch.rand(len(losses)) + 0.5) * scale
    reader = engine(root, taps, parameters)
    root.backward()
    gradients = reader.gradients()
    torch.testing.assert_close(gradients.norms(), expected.norm(dim=1), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients.flat(), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradients.gramian(), expected @ expected.T, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("graph", graphs.ALL, ids=lambda graph: graph.__name__)
@pytest.mark.parametrize("engine", ENGINES)
def test_reading_leaves_the_networks_gradients_bit_for_bit(graph, engine):
    def grads(read):
        torch.manual_seed(3)
        losses, parameters = graph()
        weights = torch.tensor([0.3, 1.9, 0.8])[: len(losses)]
        taps = tap_losses(losses) if read else losses
        total = weighted(taps, weights)
        reader = engine(total, taps, parameters) if read else None
        everything = _leaves(total)
        total.backward()
        if reader is not None:
            reader.gradients()
        return [leaf.grad for leaf in everything]

    plain, balanced = grads(False), grads(True)
    assert len(plain) == len(balanced) > 1
    assert all(torch.equal(a, b) for a, b in zip(plain, balanced, strict=True))


def _leaves(total):
    seen, stack, leaves = set(), [total.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack += [child for child, _ in node.next_functions]
    return leaves


@pytest.mark.parametrize("graph", graphs.ALL, ids=lambda graph: graph.__name__)
def test_further_terms_of_the_total_are_not_mistaken_for_a_task(graph):
    losses, parameters = graph()
    expected = oracle(losses, parameters).norm(dim=1)
    first, last = next(iter(losses.values())), list(losses.values())[-1]
    taps = tap_losses(losses)
    root = weighted(taps, torch.ones(len(losses))) + 0.7 * first + last.exp() + sum(p.pow(2).sum() for p in parameters)
    reader = JointBackward(root, taps, parameters)
    root.backward()
    torch.testing.assert_close(reader.gradients().norms(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("graph", graphs.ALL, ids=lambda graph: graph.__name__)
def test_what_was_read_does_not_change_with_the_parameters_grad(graph):
    """Clipping, or a second backward that adds to .grad in place, comes before the norms are asked for."""
    losses, parameters = graph()
    expected = oracle(losses, parameters)
    taps = tap_losses(losses)
    root = weighted(taps, torch.ones(len(losses)))
    reader = JointBackward(root, taps, parameters)
    root.backward()
    for parameter in parameters:
        parameter.grad.fill_(7.0)
    torch.testing.assert_close(reader.gradients().flat(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("graph", graphs.ALL, ids=lambda graph: graph.__name__)
def test_norms_are_the_same_where_gradients_are_let_go_of(graph, monkeypatch):
    monkeypatch.setattr("lightning_gradnorm.task_gradients._FEW", -1)  # none is small
    losses, parameters = graph()
    expected = oracle(losses, parameters)
    taps = tap_losses(losses)
    root = weighted(taps, torch.rand(len(losses)) + 0.5)
    reader = JointBackward(root, taps, parameters, keep=False)
    root.backward()
    gradients = reader.gradients()
    torch.testing.assert_close(gradients.norms(), expected.norm(dim=1), rtol=1e-10, atol=0)
    assert all(gradient is None for row in gradients.gradients for gradient in row)
    for ask in (gradients.flat, gradients.cosines):
        with pytest.raises(RuntimeError, match=r"let go of .* \(keep=False\).* Read them with keep=True"):
            ask()


def test_a_large_gradient_is_let_go_of_before_the_backward_is_over_and_small_ones_are_not():
    weights = [torch.randn(300, 300, requires_grad=True), torch.randn(3, requires_grad=True)]
    losses = {name: sum((w * torch.randn_like(w)).sum() for w in weights) for name in "ab"}
    expected, taps = oracle(losses, weights), tap_losses(losses)
    root = weighted(taps, torch.ones(2))
    reader = JointBackward(root, taps, weights, keep=False)
    root.backward()
    assert [[gradient is None for gradient in row] for row in reader._arrivals.gradients] == [[True, False]] * 2
    torch.testing.assert_close(reader.gradients().norms(), expected.norm(dim=1))


class _GivesNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_what_was_read_does_not_change_where_the_other_task_brings_nothing():
    """Then what one task brings to a weight is its .grad, with no sum between."""
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)

    def losses():
        return {"a": layer(x).square().mean(), "b": _GivesNothing.apply(layer(x)).sum() + layer.bias.sum()}

    expected = oracle(losses(), list(layer.parameters()))
    taps = tap_losses(losses())
    root = weighted(taps, torch.ones(2))
    reader = JointBackward(root, taps, layer.parameters())
    root.backward()
    for parameter in layer.parameters():
        parameter.grad.fill_(7.0)
    torch.testing.assert_close(reader.gradients().flat(), expected)


def test_a_linear_of_each_tasks_own_forward_is_read_by_one_hook():
    layer, x = nn.Linear(3, 3), torch.randn(2, 4, 3)
    losses = {"a": layer(x[0]).square().mean(), "b": layer(x[1]).square().mean()}
    expected, taps = oracle(losses, list(layer.parameters())), tap_losses(losses)
    root = weighted(taps, torch.ones(2))
    reader = JointBackward(root, taps, layer.parameters())
    assert [type(node).__name__ for node in reader.graph.leaving] == ["AddmmBackward0"] * 2
    root.backward()
    torch.testing.assert_close(reader.gradients().flat(), expected)


@pytest.mark.parametrize("shape", [(300, 400), (70_000,), (2, 3, 200, 100), (1, 1)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norms_of_large_float32_gradients(shape, size):
    """Whatever way the sum goes, it is the float64 norm to float32's precision."""
    gradient = torch.randn(shape, dtype=torch.float32) * size
    for laid_out in (gradient, gradient.transpose(0, -1), gradient[..., ::2]):
        read = TaskGradients(("a",), [[laid_out]], torch.ones(1), [laid_out]).norms()
        torch.testing.assert_close(read, laid_out.double().norm().unsqueeze(0), rtol=1e-6, atol=0)


def test_any_total_of_the_taps_will_do():
    """The product of the losses: what arrives at a tap is ∂total/∂L_i, and is divided out."""
    losses, parameters = graphs.trunk_and_heads()
    expected = oracle(losses, parameters).norm(dim=1)
    taps = tap_losses(losses)
    root = math.prod(taps.values()).log()
    reader = JointBackward(root, taps, parameters)
    root.backward()
    gradients = reader.gradients()
    torch.testing.assert_close(gradients.cotangents, torch.stack([1 / loss.detach() for loss in losses.values()]))
    torch.testing.assert_close(gradients.norms(), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_complex_parameter_is_two_real_ones(engine):
    """As the spectral weights of a Fourier neural operator; beside a real one."""
    pairs, bias, head = torch.randn(3, 3, 4, 2), torch.randn(3, 1), torch.randn(2, 3, 6)
    x = torch.randn(2, 3, 6)

    def gradients(parameters, weight, bias):
        z = torch.fft.irfft(torch.einsum("bik,iok->bok", torch.fft.rfft(x), weight), n=6) + bias
        losses = tap_losses({"a": (head * z).square().mean(), "b": z.sin().mean(), "c": weight.abs().square().sum()})
        root = weighted(losses, torch.tensor([0.5, 2.0, 3.0]))
        reader = engine(root, losses, parameters)
        root.backward()
        return reader.gradients()

    real = [pairs.clone().requires_grad_(), bias.clone().requires_grad_()]
    split = [torch.view_as_complex(pairs).clone().requires_grad_(), bias.clone().requires_grad_()]
    expected, found = gradients(real, torch.view_as_complex(real[0]), real[1]), gradients(split, *split)
    torch.testing.assert_close(found.flat(), expected.flat())
    torch.testing.assert_close(found.norms(), expected.norms())
    torch.testing.assert_close(found.cosines(), expected.cosines())
    assert found.entries == expected.entries == 75


@pytest.mark.parametrize("engine", ENGINES)
def test_sparse_gradients_are_those_of_the_dense_embedding(engine):
    weight, head, words = torch.randn(9, 4), torch.randn(3, 4, 2), torch.tensor([1, 3, 3, 8])

    def gradients(sparse):
        embedding = nn.Embedding(9, 4, sparse=sparse, _weight=weight.clone())
        z = embedding(words)
        losses = tap_losses({f"task{i}": (z @ w).square().mean() for i, w in enumerate(head)})
        root = weighted(losses, torch.tensor([0.5, 2.0, 3.0]))
        reader = engine(root, losses, [embedding.weight])
        root.backward()
        assert embedding.weight.grad.is_sparse == sparse
        return reader.gradients()

    found, expected = gradients(sparse=True), gradients(sparse=False)
    torch.testing.assert_close(found.flat(), expected.flat())
    torch.testing.assert_close(found.norms(), expected.norms())


def features_of_trunk():
    trunk, heads = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), [nn.Linear(16, 2) for _ in range(3)]
    z = trunk(torch.randn(5, 8))
    return {f"task{i}": head(z).pow(2).mean() for i, head in enumerate(heads)}, [z]


def features_used_again():
    """The layer is called twice, the second time on what came of the first; one task reads both."""
    layer, heads = nn.Linear(8, 8), [nn.Linear(8, 2) for _ in range(3)]
    first = layer(torch.randn(5, 8))
    second = layer(first.tanh())
    losses = [heads[0](first).pow(2).mean(), heads[1](second).pow(2).mean(), heads[2](first * second).pow(2).mean()]
    return {f"task{i}": loss for i, loss in enumerate(losses)}, [first, second]


def features_below_a_shared_decoder():
    trunk, decoder, heads = nn.Linear(8, 16), nn.Linear(16, 16), [nn.Linear(16, 2) for _ in range(2)]
    z = trunk(torch.randn(5, 8))
    d = decoder(z.tanh())
    return {f"task{i}": head(d).pow(2).mean() for i, head in enumerate(heads)}, [z]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "graph", [features_of_trunk, features_used_again, features_below_a_shared_decoder], ids=lambda g: g.__name__
)
def test_gradients_at_features_equal_the_oracle(graph, engine):
    losses, features = graph()
    expected = oracle(losses, features)
    taps = tap_losses(losses)
    root = weighted(taps, torch.rand(len(losses)) + 0.5)
    reader = engine(root, taps, features)
    root.backward()
    torch.testing.assert_close(reader.gradients().flat(), expected, rtol=1e-10, atol=1e-13)


@given(st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=2), st.integers(0, 2**16))
def test_norms_do_not_depend_on_the_weights(weights, seed):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    losses, parameters = graphs.skip_connection()
    expected = oracle(losses, parameters).norm(dim=1)
    taps = tap_losses(losses)
    root = weighted(taps, torch.tensor(weights))
    reader = JointBackward(root, taps, parameters)
    root.backward()
    torch.testing.assert_close(reader.gradients().norms(), expected, rtol=1e-10, atol=0)


def test_norms_of_float32_gradients_neither_overflow_nor_underflow():
    torch.set_default_dtype(torch.float32)
    net = nn.Linear(4, 3)
    z = net(torch.randn(5, 4))
    losses = {"huge": z.pow(2).mean() * 1e30, "tiny": z.pow(2).mean() * 1e-30}
    expected = oracle(losses, [net.weight]).double().norm(dim=1)
    taps = tap_losses(losses)
    root = weighted(taps, torch.ones(2))
    reader = JointBackward(root, taps, [net.weight])
    root.backward()
    torch.testing.assert_close(reader.gradients().norms(), expected, rtol=1e-6, atol=0)


def test_half_precision_gradients_are_summed_in_float64():
    net = nn.Linear(512, 512, bias=False, dtype=torch.float16)
    losses = {
        "a": net(torch.ones(2, 512, dtype=torch.float16)).float().sum(),
        "b": net(torch.ones(1, 512, dtype=torch.float16)).float().sum(),
    }
    taps = tap_losses(losses)
    root = weighted(taps, torch.ones(2))
    reader = JointBackward(root, taps, [net.weight])
    root.backward()
    assert reader.gradients().norms().tolist() == [1024.0, 512.0]  # 2^18 entries of 2 and of 1: 65,504 is float16's largest


def test_measurement_is_detached_and_named():
    losses, parameters = graphs.trunk_and_heads()
    taps = tap_losses(losses)
    root = weighted(taps, torch.ones(3))
    reader = JointBackward(root, taps, parameters)
    root.backward()
    measured = reader.measurement()
    assert measured.tasks == ("task0", "task1", "task2")
    assert measured.losses.tolist() == [loss.item() for loss in losses.values()]
    assert not measured.losses.requires_grad and not measured.gradient_norms.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_a_task_that_misses_the_layer_is_named(engine):
    shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(2, 4)
    taps = tap_losses({"on": shared(x).pow(2).mean(), "beside": other(x).pow(2).mean()})
    with pytest.raises(UnreachedSharedLayerError, match=r"task 'beside' does not reach the shared layer") as caught:
        engine(weighted(taps, torch.ones(2)), taps, [shared.weight])
    assert caught.value.tasks == ("beside",)


def test_losses_that_were_not_tapped_are_refused():
    net = nn.Linear(4, 1)
    loss = net(torch.randn(2, 4)).mean()
    with pytest.raises(ValueError, match=r"tap_losses\(\) first"):
        JointBackward(2 * loss, {"a": loss, "b": loss}, [net.weight])


@pytest.mark.parametrize("engine", [JointBackward, PerTaskBackward])
def test_a_total_of_other_tensors_is_refused(engine):
    losses, parameters = graphs.trunk_and_heads()
    taps = tap_losses(losses)
    nodes = {tap.grad_fn for tap in taps.values()}
    assert not nodes_met(weighted(losses, torch.ones(3)), nodes)
    assert nodes_met(weighted(taps, torch.ones(3)), nodes) == nodes
    with pytest.raises(
        ValueError, match="total was not built from the tapped loss of task 'task0', task 'task1', task 'task2'"
    ):
        engine(weighted(losses, torch.ones(3)), taps, parameters)


def test_gradients_before_a_whole_backward_are_refused():
    losses, parameters = graphs.trunk_and_heads()
    taps = tap_losses(losses)
    root = weighted(taps, torch.ones(3))
    with pytest.raises(IncompleteBackwardError, match=r"Call backward\(\) once on the total"):
        JointBackward(root, taps, parameters).gradients()
    restricted = JointBackward(root, taps, parameters)
    root.backward(inputs=[taps["task0"]])
    with pytest.raises(IncompleteBackwardError):
        restricted.gradients()


@pytest.mark.parametrize("run_backward", [True, False])
def test_nothing_holds_the_graph_afterwards(run_backward):
    losses, parameters = graphs.trunk_and_heads()
    taps = tap_losses(losses)
    root = weighted(taps, torch.ones(3))
    watched = weakref.ref(root)
    reader = JointBackward(root, taps, parameters)
    if run_backward:
        root.backward()
        reader.gradients()
    else:
        reader.discard()
    gc.disable()
    try:
        del root, taps, losses
        assert watched() is None
    finally:
        gc.enable()
    copy.deepcopy(reader)


def test_cosines_are_those_of_the_gradients():
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[1.0, half, -1.0], [half, 1.0, -half], [-1.0, -half, 1.0]])
    torch.testing.assert_close(cosines(rows)[:3, :3], expected)
    assert cosines(rows)[3].isnan().all()


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_cosines_neither_over_nor_underflow(size):
    x, w = torch.randn(5, 3, dtype=torch.float32), torch.randn(3, requires_grad=True, dtype=torch.float32)
    losses = tap_losses({"a": size * (x @ w).sum(), "b": size * (x @ w).square().sum(), "c": -size * (x @ w).sum()})
    root = sum(losses.values())
    reader = JointBackward(root, losses, [w])
    root.backward()
    cosines = reader.gradients().cosines()
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3, dtype=cosines.dtype))
    torch.testing.assert_close(cosines[0, 2], -cosines[0, 0])
