"""The inner products of the tasks' gradients, measured: against one autograd.grad per task, through batches and ranks."""

import pytest
import torch
from torch import nn

from lightning_gradnorm import BalancingSession, GradNorm, GramianWeighting, Measurement
from lightning_gradnorm.window import MeasurementWindow
from tests.loops import Network, rows

pytestmark = pytest.mark.usefixtures("float64")


class Watching:
    """A weighting that gives ones, and remembers the Gram matrices that it has seen."""

    def __init__(self):
        self.seen = []

    def __call__(self, gramian):
        self.seen.append(gramian.clone())
        return torch.ones(len(gramian), dtype=gramian.dtype)


def session_of(network, watching, **settings):
    balancer = GramianWeighting(watching)
    return BalancingSession(balancer, network, shared_layer="trunk.2", **settings)


def gradients_of(network, batches, tensors=None):
    """Task → mean over the batches that have it of its gradient on the shared layer; or per batch, on its output."""
    sums = {}
    for x in batches:
        outputs = []
        handle = network.trunk[2].register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        losses = network.losses(x)
        handle.remove()
        of = outputs if tensors == "features" else list(network.trunk[2].parameters())
        for task, loss in losses.items():
            found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, of, retain_graph=True)])
            sums.setdefault(task, []).append(found)
    return sums


def train_a_step(session, network, batches):
    for x in batches:
        total = session.total(network.losses(x))
        session.before_backward(total)
        total.backward()
        session.after_backward()
    return session.step()


@pytest.mark.parametrize("engine", ["joint", "per_task"])
@pytest.mark.parametrize("count", [1, 3])
def test_of_the_mean_gradient_of_a_step(engine, count):
    network, watching = Network().double(), Watching()
    batches = rows(count, absent=[1] if count > 1 else []).double().split(8)
    sums = gradients_of(network, batches)
    train_a_step(session_of(network, watching, engine=engine), network, batches)
    means = torch.stack([torch.stack(found).mean(0) for found in sums.values()])
    torch.testing.assert_close(watching.seen[0], means @ means.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_of_features_each_batch_has_its_own(count):
    network, watching = Network().double(), Watching()
    batches = rows(count, absent=[1] if count > 1 else []).double().split(8)
    sums, tasks = gradients_of(network, batches, "features"), list(network.losses(batches[0]))
    train_a_step(session_of(network, watching, norm_of="features"), network, batches)
    expected = torch.zeros(3, 3)
    for a, one in enumerate(tasks):
        for b, other in enumerate(tasks):
            there = {task: [k for k in range(count) if task != "middle" or k != 1] for task in tasks}
            pairs = [(there[one].index(k), there[other].index(k)) for k in there[one] if k in there[other]]
            inner = sum((sums[one][i] @ sums[other][j] for i, j in pairs), torch.zeros(()))
            expected[a, b] = inner / (len(there[one]) * len(there[other]))
    torch.testing.assert_close(watching.seen[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm_of", ["parameters", "features"])
def test_the_ranks_measure_it_with_the_one_collective(norm_of):
    """Two ranks of which one lacks a task, added up by hand: as two batches of one process."""
    network = Network().double()
    batches = rows(2, absent=[1]).double().split(8)
    whole = Watching()
    train_a_step(session_of(network, whole, norm_of=norm_of), network, batches)
    windows = []
    for x in batches:
        session = session_of(network, Watching(), norm_of=norm_of)
        total = session.total(network.losses(x))
        session.before_backward(total)
        total.backward()
        session.after_backward()
        windows.append(session.window)
    agreed = ("small", "middle", "large"), max(window.entries for window in windows), torch.device("cpu"), torch.float64
    sent = []
    windows[1].reduce(lambda vector: sent.append(vector) or vector, *agreed)
    windows[0].reduce(lambda vector: sent.append(vector) or vector + sent[0], *agreed)
    measured = windows[0].measurement()
    torch.testing.assert_close(measured.gramian, whole.seen[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(measured.gradient_norms, measured.gramian.diagonal().sqrt())
    assert len(sent) == 2


def test_only_methods_that_need_it_pay_for_it():
    network = Network().double()
    session = BalancingSession(GradNorm(), network, shared_layer="trunk.2")
    step = train_a_step(session, network, [rows(1).double()])
    assert step.measurement.gradient_norms is not None and step.measurement.gramian is None
    assert MeasurementWindow().measurement() is None


def test_a_part_of_the_tasks_has_a_part_of_the_matrix():
    gramian = torch.arange(9.0).view(3, 3)
    part = Measurement(("a", "b", "c"), torch.ones(3), gramian=gramian).only([2, 0])
    assert part.tasks == ("c", "a")
    assert part.gramian.tolist() == [[8.0, 6.0], [2.0, 0.0]]


def test_a_task_without_a_gradient_is_left_out():
    """A head that starts at zero sends nothing down."""
    network, watching = Network().double(), Watching()
    nn.init.zeros_(network.heads["middle"].weight)
    session = session_of(network, watching)
    with pytest.warns(UserWarning, match="took no part so far.*'middle' in 1 step"):
        train_a_step(session, network, [rows(1).double()])
    assert watching.seen[0].shape == (2, 2)
    assert session.balancer.idle_steps.tolist() == [0, 1, 0]
