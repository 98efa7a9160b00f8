"""The reading proves its right to run: a second, slow reading where tasks, layer or shapes are new."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.reading import Reading
from lightning_gradnorm.task_gradients import TaskGradients


def net_and_losses(rows=5, tasks=2, net=None, hook=None, dtype=torch.float32):
    net = net or nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *[nn.Linear(8, 2) for _ in range(3)]).to(dtype)
    z = net[1](net[0](torch.ones(rows, 6, dtype=dtype)))
    own = [head(z) for head in list(net)[2 : 2 + tasks]]
    if hook is not None:
        own[0].register_hook(hook)
    return net, {f"task{i}": (y - i - 1).square().mean() for i, y in enumerate(own)}


def read(reading, losses, parameters):
    losses = tap_losses(losses)
    total = sum(losses.values())
    reading.begin(total, losses, parameters)
    total.backward()
    return reading.finish()


class Wrong(JointBackward):
    """Off by a hundredth for the second task."""

    def gradients(self):
        found = super().gradients()
        rows = [[g if g is None else g * (1.01 if i == 1 else 1) for g in row] for i, row in enumerate(found.gradients)]
        return TaskGradients(found.tasks, rows, found.cotangents, found.parameters)

    _keeps_factors = False


@pytest.fixture
def counted(monkeypatch):
    """How many slow readings were begun."""
    begun = []

    class Counted(PerTaskBackward):
        def _begin(self, root, losses):
            begun.append(tuple(losses))
            super()._begin(root, losses)

    monkeypatch.setattr("lightning_gradnorm.reading.PerTaskBackward", Counted)
    return begun


def test_a_wrong_reading_gives_way_and_says_so(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("lightning_gradnorm.reading.JointBackward", Wrong)
    reading = Reading("auto")
    net, losses = net_and_losses()
    expected = [torch.autograd.grad(loss, net[0].weight, retain_graph=True)[0].norm() for loss in losses.values()]
    found = read(reading, losses, [net[0].weight])
    torch.testing.assert_close(found.norms().float(), torch.stack(expected))
    (word,) = reading.words
    assert "the norm of task 'task1' is" in word and "From now on engine='per_task' is used, which is slower" in word
    assert reading.engine_used == reading.engine_to_use == "per_task"
    net, losses = net_and_losses(net=net)
    found = read(reading, losses, [net[0].weight])
    torch.testing.assert_close(found.norms().float(), torch.stack(expected))
    assert len(reading.words) == 1


def test_a_right_reading_is_proved_once(counted):
    reading = Reading("auto")
    net, _ = net_and_losses()
    for _ in range(3):
        read(reading, net_and_losses(net=net)[1], [net[0].weight])
    assert len(counted) == 1
    assert not reading.words
    assert reading.engine_used == "joint"


def test_it_is_proved_again_where_tasks_layer_or_shapes_are_new(counted):
    reading = Reading("joint")
    net, _ = net_and_losses()
    for rows, tasks, w in ((1, 2, 0), (2, 2, 0), (1, 3, 0), (1, 2, 0), (1, 2, "bias")):
        w = net[0].bias if w == "bias" else net[0].weight
        read(reading, net_and_losses(rows, tasks, net)[1], [w])
    assert len(counted) == 4
    reading.restart()
    read(reading, net_and_losses(1, 2, net)[1], [net[0].weight])
    assert len(counted) == 5


def test_it_is_not_proved_for_ever_where_every_batch_has_another_shape(counted):
    reading = Reading("auto")
    net, _ = net_and_losses()
    for rows in range(1, 30):
        read(reading, net_and_losses(rows, net=net)[1], [net[0].weight])
    assert len(counted) == 8


def test_a_hook_on_a_tasks_own_part_is_part_of_its_gradient(counted):
    """The second reading knows nothing of it; the whole gradient at W does."""
    torch.manual_seed(0)
    reading = Reading("auto")
    net, plain = net_and_losses()
    expected = [torch.autograd.grad(loss, net[0].weight, retain_graph=True)[0].norm() for loss in plain.values()]
    _, losses = net_and_losses(net=net, hook=lambda gradient: 3 * gradient)
    found = read(reading, losses, [net[0].weight])
    torch.testing.assert_close(found.norms().float(), torch.stack([3 * expected[0], expected[1]]))
    assert counted
    assert not reading.words


def test_a_checkpoint_on_a_tasks_own_part_is_proved_too(counted):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)])
    z = net[0](torch.ones(5, 6)).tanh()
    losses = {"a": checkpoint(net[1], z, use_reentrant=False).square().mean(), "b": (net[2](z) - 1).square().mean()}
    reading = Reading("auto")
    assert torch.isfinite(read(reading, losses, [net[0].weight]).norms()).all()
    assert len(counted) == 1
    assert not reading.words


@pytest.mark.parametrize(("share", "dtype"), [(1e-3, torch.float32), (1e-8, torch.float64)])
def test_a_hook_on_a_small_tasks_own_part_is_seen_beside_a_large_one(counted, share, dtype):
    torch.manual_seed(0)
    net, losses = net_and_losses(hook=lambda gradient: 0.1 * gradient, dtype=dtype)
    reading = Reading("auto")
    read(reading, {"task0": share * losses["task0"], "task1": losses["task1"]}, [net[0].weight])
    assert counted
    assert not reading.words


def test_gradients_of_the_wrong_tasks_are_noticed(monkeypatch):
    class Swapped(JointBackward):
        _keeps_factors = False

        def gradients(self):
            found = super().gradients()
            return TaskGradients(found.tasks, found.gradients[::-1], found.cotangents, found.parameters)

    monkeypatch.setattr("lightning_gradnorm.reading.JointBackward", Swapped)
    torch.manual_seed(0)
    net, losses = net_and_losses()
    reading = Reading("auto")
    read(reading, losses, [net[0].weight])
    assert len(reading.words) == 1


@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_a_wrong_reading_of_a_backward_that_a_loop_scales_gives_way_too(monkeypatch, scale):
    """As accelerate and a GradScaler do, after the reading was begun."""
    monkeypatch.setattr("lightning_gradnorm.reading.JointBackward", Wrong)
    torch.manual_seed(0)
    net, losses = net_and_losses()
    expected = [torch.autograd.grad(loss, net[0].weight, retain_graph=True)[0].norm() for loss in losses.values()]
    losses = tap_losses(losses)
    total = sum(losses.values())
    reading = Reading("auto")
    reading.begin(total, losses, [net[0].weight])
    (scale * total).backward()
    torch.testing.assert_close(reading.finish().norms().float(), torch.stack(expected))
    assert len(reading.words) == 1


def test_hooks_that_change_gradients_above_and_below_w_are_no_fault_of_the_reading():
    """What the backward brings is neither what the first nor what the second reading promises, and nothing is wrong."""
    torch.manual_seed(0)
    body, heads = [nn.Linear(6, 6) for _ in range(3)], [nn.Linear(6, 2), nn.Linear(6, 2)]
    z = [torch.randn(5, 6)]
    for layer in body:
        z.append(layer(z[-1]).tanh())
    z[2].register_hook(lambda gradient: 0.1 * gradient)
    own = heads[1](z[1])
    own.register_hook(lambda gradient: 3 * gradient)
    losses = {"a": heads[0](z[3]).square().mean(), "b": (own.sum(1) + heads[1](z[3]).sum(1)).square().mean()}
    reading = Reading("auto")
    read(reading, losses, [layer.weight for layer in body])
    assert not reading.words


def test_a_wrong_reading_beside_a_term_that_is_no_task_gives_way_too(monkeypatch):
    monkeypatch.setattr("lightning_gradnorm.reading.JointBackward", Wrong)
    torch.manual_seed(0)
    net, losses = net_and_losses()
    losses = tap_losses(losses)
    total = sum(losses.values()) + 0.3 * net[0].weight.square().sum()
    reading = Reading("auto")
    reading.begin(total, losses, [net[0].weight])
    total.backward()
    reading.finish()
    assert len(reading.words) == 1


def test_a_tensor_given_twice_is_one_for_the_proof_too(counted):
    torch.manual_seed(0)
    net, losses = net_and_losses(hook=lambda gradient: 3 * gradient)
    reading = Reading("auto")
    assert torch.isfinite(read(reading, losses, [net[0].weight, net[0].weight]).norms()).all()
    assert counted
    assert not reading.words


def test_hooks_on_the_way_to_a_complex_layer_are_no_fault_of_the_reading(counted):
    torch.manual_seed(0)
    net, x = nn.Linear(6, 4, dtype=torch.complex64), torch.randn(5, 6, dtype=torch.complex64)
    z = net(x)
    own = z.abs()
    own.register_hook(lambda gradient: 3 * gradient)
    reading = Reading("auto")
    read(reading, {"a": own.square().mean(), "b": (z.real - 1).square().mean()}, [net.weight])
    assert counted
    assert not reading.words


def test_half_precision_is_compared_as_half_precision_can_be():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2), nn.Linear(64, 2))
    reading = Reading("auto")
    with torch.autocast("cpu", torch.bfloat16):
        z = net[1](net[0](torch.randn(4, 64)))
        losses = {"a": net[2](z).float().square().mean(), "b": (net[3](z).float() - 1).square().mean()}
    assert read(reading, losses, [net[0].weight]).factors
    assert not reading.words


def test_gradients_of_zero_are_equal_to_what_rounding_makes_of_them():
    """In front of a normalisation a bias has no gradient but for rounding, which is another one on every way."""
    torch.manual_seed(0)
    net, norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
    heads = [nn.Linear(8, 2), nn.Linear(8, 2)]
    z = norm(net(100 * torch.randn(50, 6)))
    losses = {f"task{i}": (head(z) - i).square().mean() for i, head in enumerate(heads)}
    reading = Reading("auto")
    read(reading, losses, [net.weight, net.bias])
    assert not reading.words


def test_what_cannot_be_read_from_the_backward_is_read_by_the_other_engine():
    reading = Reading("auto")
    net, losses = net_and_losses()
    losses = tap_losses(losses)
    total = losses["task0"] + 0 * losses["task1"]
    reading.begin(total, losses, [net[0].weight])
    total.backward()
    with pytest.raises(RuntimeError, match="the weight 0"):
        reading.finish()
    (word,) = reading.words
    assert word.endswith("From the next step on, engine='per_task' is used, which is slower.")
    assert reading.engine_to_use == "per_task"


def test_nothing_begun_is_nothing_read():
    reading = Reading("joint")
    assert reading.finish() is None
    net, losses = net_and_losses()
    losses = tap_losses(losses)
    reading.begin(sum(losses.values()), losses, [net[0].weight])
    reading.discard()
    assert reading.finish() is None


DEEP = """
import torch
from lightning_gradnorm import BalancingSession, GradNorm

cell, heads = torch.nn.Linear(1, 1), torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
network = torch.nn.ModuleList([cell, heads])
session = BalancingSession(GradNorm(), network, shared_layer=cell)
for _ in range(2):
    z = torch.ones(1, 1)
    for _ in range(20_000):
        z = cell(z).tanh()
    with session.batch():
        total = session.total({name: head(z).sum() for name, head in zip("ab", heads)})
        session.before_backward(total)
        total.backward()
        session.after_backward()
    session.step()
    del z, total
print(session.balancer.steps, "steps")
"""


@pytest.mark.slow
def test_a_graph_of_twenty_thousand_layers_is_read_and_freed():
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "2 steps\n"), done.stderr[-2000:]
