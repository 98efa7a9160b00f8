"""Reading leaves the network as the plain backward does: every ``.grad``, how often hooks run, what modules count."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.descent import gradients_of

pytestmark = pytest.mark.usefixtures("float64")
ENGINES = pytest.mark.parametrize("engine", [JointBackward, PerTaskBackward])


class Net(nn.Module):
    """Two heads on a trunk of two layers, W the second."""

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Linear(6, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])
        self.kept = []

    def forward(self, x):
        z = self.shared(self.first(x).tanh())
        self.kept = [z]
        z = F.relu(z)
        self.kept.append(z)
        return [head(z) for head in self.heads]

    def losses(self, x):
        return {f"task{i}": y.square().mean() for i, y in enumerate(self(x))}


def plain(net, losses):
    sum(losses.values()).backward()


def read(engine, net, losses, w=None):
    losses = tap_losses(losses)
    total = sum(losses.values())
    reader = engine(total, losses, list(net.shared.parameters()) if w is None else w)
    total.backward()
    return reader.gradients()


def oracle(net, losses, w=None):
    w = list(net.shared.parameters()) if w is None else w
    rows = [torch.autograd.grad(loss, w, retain_graph=True, allow_unused=True) for loss in losses.values()]
    return torch.stack([torch.cat([g.flatten() for g in row if g is not None]).norm() for row in rows])


def grads(net):
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


def lay_counters(net, counts, losses_of):
    """A hook of every kind, at and above W, and what they count."""

    def counting(name):
        def hook(*args):
            counts[name] = counts.get(name, 0) + 1

        return hook

    net.shared.weight.register_hook(counting("W"))
    net.shared.weight.register_post_accumulate_grad_hook(counting("W has its grad"))
    net.first.weight.register_hook(counting("below W"))
    net.heads[0].weight.register_hook(counting("head"))
    for name in ("first", "shared"):
        getattr(net, name).register_full_backward_hook(counting(f"{name} backward"))
        getattr(net, name).register_full_backward_pre_hook(counting(f"{name} before backward"))
    losses = losses_of()
    for i, tensor in enumerate(net.kept):
        tensor.register_hook(counting(f"tensor {i}"))
        tensor.grad_fn.register_hook(counting(f"node {i}"))
        tensor.grad_fn.register_prehook(counting(f"before node {i}"))
    return losses


@ENGINES
@pytest.mark.parametrize("w", ["shared", "all"])
def test_hooks_run_as_often_as_in_the_plain_backward(engine, w):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6, requires_grad=True)
    other, counts, expected = copy.deepcopy(net), {}, {}
    parameters = list(net.shared.parameters()) if w == "shared" else list(net.parameters())
    read(engine, net, lay_counters(net, counts, lambda: net.losses(x)), parameters)
    plain(other, lay_counters(other, expected, lambda: other.losses(x)))
    assert counts == expected
    assert set(expected.values()) == {1}
    assert_same(grads(net), grads(other))


@ENGINES
def test_tensors_that_retain_their_gradient_have_the_plain_one(engine):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    other = copy.deepcopy(net)
    losses, others = net.losses(x), other.losses(x)
    for tensor in (*net.kept, *other.kept):
        tensor.retain_grad()
    found = read(engine, net, losses)
    plain(other, others)
    for tensor, expected in zip(net.kept, other.kept, strict=True):
        assert torch.equal(tensor.grad, expected.grad)
    torch.testing.assert_close(found.norms(), oracle(net, Net.losses(net, x)))


@ENGINES
@pytest.mark.parametrize("where", ["tensor", "module", "W"])
def test_hooks_that_change_a_gradient_where_tasks_have_met_change_grad_once_and_no_norm(engine, where):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    other = copy.deepcopy(net)
    expected = oracle(net, net.losses(x))

    def prepared(network):
        if where == "module":
            network.shared.register_full_backward_hook(lambda module, down, up: tuple(0.1 * g for g in down))
        if where == "W":
            network.shared.weight.register_hook(lambda gradient: 0.1 * gradient)
        losses = network.losses(x)
        if where == "tensor":
            network.kept[1].register_hook(lambda gradient: 0.1 * gradient)
        return losses

    found = read(engine, net, prepared(net))
    plain(other, prepared(other))
    assert_same(grads(net), grads(other))
    torch.testing.assert_close(found.norms(), expected)


@ENGINES
def test_a_module_whose_hook_changes_gradients_and_that_a_task_leaves_from_inside(engine):
    """The task's own way out lies within the module: the hook works on what arrives at the module's input, once."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x):
            z = self.a(x).tanh()
            self.side = self.auxiliary(z)
            return self.b(z)

    class Whole(Net):
        def __init__(self):
            super().__init__()
            self.inside = Inside()
            self.inside.register_full_backward_hook(lambda module, down, up: tuple(0.1 * g for g in down))

        def losses(self, x):
            y = self.inside(self.shared(x.tanh()))
            return {"main": self.heads[0](y).square().mean(), "auxiliary": self.inside.side.square().mean()}

    torch.manual_seed(0)
    net, x = Whole(), torch.randn(5, 8)
    other = copy.deepcopy(net)
    read(engine, net, net.losses(x))
    plain(other, other.losses(x))
    assert_same(grads(net), grads(other))


class Checkpointed(Net):
    """W, a BatchNorm and a spectral norm inside a checkpoint."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.old_spectral = torch.nn.utils.spectral_norm(nn.Linear(8, 8))
        self.instance = nn.BatchNorm1d(8, affine=False)

    def block(self, z):
        return self.instance(self.old_spectral(self.spectral(self.norm(self.shared(z)).tanh())))

    def forward(self, x):
        z = checkpoint(self.block, self.first(x).tanh(), use_reentrant=False)
        return [head(z) for head in self.heads]


@ENGINES
def test_what_modules_count_inside_a_checkpoint(engine):
    torch.manual_seed(0)
    net, x = Checkpointed(), torch.randn(5, 6)
    other = copy.deepcopy(net)
    for network in (net, other):
        network.shared.weight.register_hook(lambda gradient: 0.5 * gradient)
    for _ in range(3):
        found = read(engine, net, net.losses(x))
        plain(other, other.losses(x))
        assert_same(dict(net.named_buffers()), dict(other.named_buffers()))
        assert_same(grads(net), grads(other))
    assert torch.isfinite(found.norms()).all()


@ENGINES
def test_hooks_at_and_around_a_checkpoint_run_once(engine):
    torch.manual_seed(0)
    net, x = Checkpointed(), torch.randn(5, 6, requires_grad=True)
    other, counts, expected = copy.deepcopy(net), {}, {}

    def losses(network, counted, kept):
        def count(name):
            return lambda *args: counted.update({name: counted.get(name, 0) + 1})

        network.shared.weight.register_hook(count("W"))
        network.norm.register_full_backward_hook(count("module"))
        h = network.first(x).tanh()
        z = checkpoint(network.block, h, use_reentrant=False)
        for name, tensor in (("before", h), ("after", z)):
            tensor.register_hook(count(name))
            tensor.grad_fn.register_prehook(count(f"node {name}"))
            tensor.retain_grad()
        kept += [h, z]
        return {f"task{i}": head(z).square().mean() for i, head in enumerate(network.heads)}

    kept, others = [], []
    read(engine, net, losses(net, counts, kept), [net.shared.weight, net.first.weight])
    plain(other, losses(other, expected, others))
    assert counts == expected
    assert_same({"before": kept[0].grad, "after": kept[1].grad}, {"before": others[0].grad, "after": others[1].grad})
    assert_same(grads(net), grads(other))


@ENGINES
def test_several_checkpoints_one_after_the_other(engine):
    torch.manual_seed(0)
    blocks, heads, x = [nn.Linear(6, 6) for _ in range(3)], [nn.Linear(6, 2) for _ in range(2)], torch.randn(5, 6)

    def losses(wrap):
        z = blocks[0](x)
        skip = z
        for block in blocks:
            z = wrap(lambda z, block=block: block(z.tanh()) + z, z)
        return {f"task{i}": head(z + i * skip).square().mean() for i, head in enumerate(heads)}

    w = [block.weight for block in blocks]
    found = read(engine, None, losses(lambda block, z: checkpoint(block, z, use_reentrant=False)), w)
    torch.testing.assert_close(found.norms(), oracle(None, losses(lambda block, z: block(z)), w))


@ENGINES
def test_a_slice_written_in_place_inside_a_checkpoint(engine):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)

    def block(z):
        z = net.shared(z)
        factor = z.clone()
        z[:, :4] = factor[:, :4].exp() * factor[:, 4:]
        z[:, 2:6].mul_(factor[:, 4:8].tanh())
        return z * 2

    def losses(wrap):
        z = wrap(block, net.first(x).tanh())
        return {f"task{i}": head(z).square().mean() for i, head in enumerate(net.heads)}

    found = read(engine, net, losses(lambda f, z: checkpoint(f, z, use_reentrant=False)))
    torch.testing.assert_close(found.norms(), oracle(net, losses(lambda f, z: f(z))))


def test_what_is_saved_on_the_cpu_is_read_too():
    net, x = Net(), torch.randn(5, 6)
    with torch.autograd.graph.save_on_cpu():
        losses = net.losses(x)
    torch.testing.assert_close(read(JointBackward, net, losses).norms(), oracle(net, net.losses(x)))


@ENGINES
def test_norms_inside_a_checkpoint(engine):
    torch.manual_seed(0)
    net, x = Checkpointed().eval(), torch.randn(5, 6)
    torch.testing.assert_close(read(engine, net, net.losses(x)).norms(), oracle(net, net.losses(x)))


@ENGINES
@pytest.mark.parametrize("preserved", [True, False])
def test_random_numbers_go_on_as_after_the_plain_backward(engine, preserved):
    def losses(net):
        z = checkpoint(
            lambda z: F.dropout(net.shared(z), 0.5),
            net.first(torch.ones(5, 6)).tanh(),
            use_reentrant=False,
            preserve_rng_state=preserved,
        )
        return {f"task{i}": head(z).square().mean() for i, head in enumerate(net.heads)}

    draws = []
    torch.manual_seed(0)
    net = Net()
    for backward in (plain, lambda *args: read(engine, *args)):
        torch.manual_seed(1)
        backward(net, losses(net))
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


@pytest.mark.parametrize("make", [Net, Checkpointed])
def test_gradients_of_single_losses(make):
    torch.manual_seed(0)
    net, x, ran = make(), torch.randn(5, 6), []
    losses = net.losses(x)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.shared.weight.register_hook(lambda gradient: ran.append(gradient))
    tensors = [net.shared.weight, net.heads[1].bias, net.first.weight]
    gradients_of(losses, tensors)
    assert_same(dict(net.named_buffers()), before)
    assert not ran
    assert all(gradient is None for gradient in grads(net).values())
    losses = net.eval().losses(x)  # power iterations within the checkpoint would go on
    for row, loss in zip(gradients_of(losses, tensors), losses.values(), strict=True):
        expected = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        assert [g is None for g in row] == [g is None for g in expected]
        torch.testing.assert_close([g for g in row if g is not None], [g for g in expected if g is not None])


# -- functions whose backward expects to run once -----------------------------------------------------------------------


class Frees(torch.autograd.Function):
    """Lets go of what its context holds."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = torch.full_like(x, 2.0)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        factor, ctx.factor = ctx.factor, None
        return factor * gradient


class ScalesInPlace(torch.autograd.Function):
    """Has its gradient since the forward, and gives it away, as fused cross entropies do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.full_like(x, 2.0))
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].mul_(gradient)


class ScalesUnseen(ScalesInPlace):
    """By a kernel of its own, of which no version counter hears."""

    @staticmethod
    def backward(ctx, gradient):
        (held,) = ctx.saved_tensors
        held.data.mul_(gradient)
        return held


@pytest.mark.parametrize("function", [Frees, ScalesInPlace, ScalesUnseen])
@pytest.mark.parametrize("merged", [False, True], ids=["a loss", "where tasks have met"])
@ENGINES
def test_a_backward_that_expects_to_run_once_may_be_run_to_read(engine, function, merged):
    class Fused(Net):
        def forward(self, x):
            z = self.shared(self.first(x).tanh())
            z = function.apply(z) if merged else 2 * z
            return [head(z.relu()) for head in self.heads]

    class Plain(Net):
        def forward(self, x):
            return [head((2 * self.shared(self.first(x).tanh())).relu()) for head in self.heads]

    x, fused, plainly = torch.randn(5, 6), Fused(), Plain()
    plainly.load_state_dict(fused.state_dict())
    losses = fused.losses(x) if merged else {task: function.apply(loss) / 2 for task, loss in fused.losses(x).items()}
    weights = (0.5, 3.0)
    sum(w * loss for w, loss in zip(weights, plainly.losses(x).values(), strict=True)).backward()
    tapped = tap_losses(losses)
    total = sum(w * loss for w, loss in zip(weights, tapped.values(), strict=True))
    reader = engine(total, tapped, list(fused.shared.parameters()))
    gradients_of({"total": total}, reader.wanted)  # the proof of a first step
    total.backward()
    torch.testing.assert_close(reader.gradients().norms(), oracle(plainly, plainly.losses(x)))
    for name, value in grads(plainly).items():
        torch.testing.assert_close(grads(fused)[name], value)
