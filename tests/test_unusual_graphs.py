"""Graphs that are not of the usual kind, read by both engines."""

import pytest
import torch
from torch import nn

from lightning_gradnorm import JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.gradients import IncompleteBackwardError
from tests.test_no_trace import ENGINES, Net, oracle, read

pytestmark = pytest.mark.usefixtures("float64")


@ENGINES
def test_a_tensor_given_twice_counts_once(engine):
    net, x = Net(), torch.randn(5, 6)
    found = read(engine, net, net.losses(x), [net.shared.weight, net.shared.weight])
    torch.testing.assert_close(found.norms(), oracle(net, net.losses(x), [net.shared.weight]))


@ENGINES
def test_a_feature_that_is_one_of_several_outputs(engine):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)

    def losses():
        a, b = net.shared(net.first(x).tanh()).split([3, 5], dim=1)
        return (a, b), {"a": a.square().sum() + b.sum(), "both": a.exp().sum() * b.square().sum()}

    (a, _), made = losses()
    found = read(engine, net, made, [a])
    (a, _), made = losses()
    torch.testing.assert_close(found.norms(), oracle(net, made, [a]))


@ENGINES
def test_a_feature_of_a_module_with_a_backward_hook(engine):
    torch.manual_seed(0)
    net, x, features = Net(), torch.randn(5, 6), []
    net.shared.register_full_backward_hook(lambda module, down, up: None)
    net.shared.register_forward_hook(lambda module, inputs, output: features.append(output))
    losses = net.losses(x)
    found = read(engine, net, losses, [features[-1]])
    losses = net.losses(x)
    torch.testing.assert_close(found.norms(), oracle(net, losses, [features[-1]]))


class Blocks(torch.autograd.Function):
    """Gives nothing to its first argument."""

    @staticmethod
    def forward(ctx, x, factor, y):
        return x * factor + y

    @staticmethod
    def backward(ctx, gradient):
        return None, None, gradient


@ENGINES
def test_a_function_whose_backward_gives_none_is_a_gradient_of_zero(engine):
    net, x = Net(), torch.randn(5, 6)
    zero = torch.zeros(5, 8, requires_grad=True)

    def losses():
        z = net.shared(net.first(x).tanh())
        return {"a": z.square().mean(), "blocked": Blocks.apply(z, 2.0, zero).square().mean()}

    assert read(engine, net, losses()).norms()[1] == 0


@ENGINES
def test_a_function_with_arguments_that_are_no_tensors_below_the_meeting_place(engine):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, name, x, factor, y):
            ctx.factor = factor
            return x * factor, y + 1

        @staticmethod
        def backward(ctx, to_x, to_y):
            return None, to_x * ctx.factor, None, to_y

    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)

    def losses():
        h = net.first(x).tanh()
        z, other = Scale.apply("name", net.shared(h), 3.0, h)
        return {"a": z.square().mean(), "b": (z.exp() * other).mean()}

    torch.testing.assert_close(read(engine, net, losses()).norms(), oracle(net, losses()))


def test_a_task_without_a_say_in_the_total_cannot_be_read_from_it():
    net, x = Net(), torch.randn(5, 6)
    losses = tap_losses(net.losses(x))
    total = losses["task0"] + 0 * losses["task1"]
    reader = JointBackward(total, losses, net.shared.parameters())
    total.backward()
    with pytest.raises(IncompleteBackwardError, match=r"task 'task1' the weight 0.*or choose engine='per_task'"):
        reader.gradients()


def test_a_task_without_a_say_in_the_total_is_read_by_the_other_engine():
    net, x = Net(), torch.randn(5, 6)
    losses = tap_losses(net.losses(x))
    total = losses["task0"] + 0 * losses["task1"]
    reader = PerTaskBackward(total, losses, net.shared.parameters())
    total.backward()
    torch.testing.assert_close(reader.gradients().norms(), oracle(net, net.losses(x)))


@ENGINES
@pytest.mark.parametrize("broadcast", ["bias", "dtype", "complex"])
def test_what_the_engine_fits_on_the_way_is_fitted(engine, broadcast):
    """Sums over what was broadcast, casts, the real part of what was made complex."""
    torch.manual_seed(0)
    w, x = nn.Parameter(torch.randn(8)), torch.randn(5, 8)

    def losses():
        z = {"bias": lambda: x + w, "dtype": lambda: x.float() * w, "complex": lambda: (torch.complex(x, x) * w).abs()}[
            broadcast
        ]()
        z = (z * z.detach()).tanh()
        return {"a": z.square().mean(), "b": (z.double().sum(1) * x.sum(1)).square().mean()}

    found = read(engine, None, losses(), [w])
    torch.testing.assert_close(found.norms(), oracle(None, losses(), [w]))
    assert found.gradients[0][0].shape == w.shape


@ENGINES
def test_convolutions_of_one_dimension_in_float32(engine):
    """Some kernels give back what was not asked for, in another shape."""
    torch.manual_seed(0)
    first, layer, heads = nn.Conv1d(2, 4, 2), nn.Conv1d(4, 4, 2), [nn.Linear(4, 2), nn.Linear(4, 2)]
    modules = nn.ModuleList([first, layer, *heads]).float()
    x = torch.randn(4, 2, 5, dtype=torch.float32)

    def losses():
        z = layer(first(x).tanh()).mean(2)
        return {f"task{i}": (head(z) - i).square().mean() for i, head in enumerate(heads)}

    for w in ([layer.bias], [layer.weight], list(modules.parameters())[:4]):
        found = read(engine, None, losses(), w).norms()
        torch.testing.assert_close(found.float(), oracle(None, losses(), w), rtol=1e-5, atol=0)


@ENGINES
def test_an_embedding_used_sparsely_and_densely(engine):
    torch.manual_seed(0)
    table, index = nn.Embedding(7, 4, sparse=True), torch.tensor([1, 2, 2, 5])

    def losses():
        z = table(index)
        return {"a": z.square().mean() + table.weight.square().sum(), "b": z.exp().mean() + table.weight.exp().mean()}

    w = [table.weight]
    expected = [sum(g.to_dense() for g in torch.autograd.grad(loss, w, retain_graph=True)).norm() for loss in losses().values()]
    torch.testing.assert_close(read(engine, None, losses(), w).norms(), torch.stack(expected))
